"""Scenes as pixels: plain fills drawn at twice the size and reduced, so edges are smooth. About 1 ms a scene."""

import math

import numpy as np
from PIL import Image, ImageDraw

from flux_ir.demo.scenes import Scene, Thing

RGB = {
    "red": (220, 40, 40),
    "green": (40, 165, 75),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 50),
    "purple": (125, 50, 180),
    "orange": (245, 135, 25),
    "cyan": (60, 210, 225),
    "pink": (245, 140, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "beige": (225, 205, 165),
}
SIDE_PX = 128
OVERSAMPLING = 2


def draw(scene: Scene, side_px: int = SIDE_PX) -> np.ndarray:
    """The scene as uint8 [side_px, side_px, 3]."""
    canvas_px = side_px * OVERSAMPLING
    canvas = Image.new("RGB", (canvas_px, canvas_px), RGB[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(pen, thing, canvas_px, RGB[thing.colour], RGB[scene.background])
    return np.array(canvas.resize((side_px, side_px), Image.Resampling.LANCZOS))


def silhouette(thing: Thing, side_px: int = SIDE_PX) -> np.ndarray:
    """Where the object is, as bool [side_px, side_px]: the template that evaluation compares with."""
    canvas_px = side_px * OVERSAMPLING
    canvas = Image.new("L", (canvas_px, canvas_px), 0)
    _draw_thing(ImageDraw.Draw(canvas), thing, canvas_px, 255, 0)
    return np.asarray(canvas.resize((side_px, side_px), Image.Resampling.LANCZOS)) > 127


Fill = tuple[int, int, int] | int


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, canvas_px: int, fill: Fill, hole: Fill) -> None:
    x, y, r = thing.x * canvas_px, thing.y * canvas_px, thing.radius * canvas_px
    match thing.shape:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            inner = 0.55 * r
            pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=hole)
        case "square":
            half = 0.85 * r
            pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        case "cross":
            arm = 0.34 * r
            pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        case "triangle":
            pen.polygon(_corners(x, y, [r] * 3), fill=fill)
        case "star":
            pen.polygon(_corners(x, y, [r, 0.42 * r] * 5), fill=fill)
        case other:
            raise ValueError(f"no way to draw the shape {other!r}")


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Points at these distances from the centre, evenly around it, the first straight up."""
    turns = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.sin(turn), y - r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]
