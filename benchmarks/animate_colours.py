"""The 256 colours of a GIF: ours beside ffmpeg's palettegen and paletteuse, on the same frames with the same captions.

    uv run python benchmarks/animate_colours.py [--side_px 1024] [--frames 12]

Two films: all blocks of a generation of flux-tiny, and soft clouds of 1024 px. Of each way it tells the seconds, the
size of the file and what became of the colours. PSNR as the eye sees it, and the colour error (CIE 1976, Lab), are of
frames blurred by 2 px, as they look from further away: dithering is noise in every pixel, and a plain PSNR prefers
bands.
"Unsteady" is the share of the pixels that stand still in the film and not in the GIF.
"""

import argparse
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from animate_speed import FPS, make_pictures, write_ours
from measure import machine
from PIL import Image, ImageFilter, ImageSequence

from flux_ir import capture
from flux_ir.visualize.film import Film
from flux_ir.visualize.frames import Cell, Frame, find_cells, find_run, make_frames
from flux_ir.visualize.pictures import PictureReader

PROMPT = "a large red circle left of a small blue square on a white background"
BLUR_PX = 2
FFMPEG = {  # how paletteuse mixes the colours of one palette for the whole film (stats_mode=full)
    "ffmpeg, error diffusion": "dither=sierra2_4a",  # what it does unless told otherwise
    "ffmpeg, Bayer": "dither=bayer:bayer_scale=2",
    "ffmpeg, not mixed": "dither=none",
}
RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def main() -> None:
    """Print a table for each film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side_px", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=12)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = capture(PROMPT, model="flux-tiny", seed=1, output_dir=folder / "output").generation_id
        of_run = find_run(folder / "output", run)
        compare("flux-tiny", make_frames([of_run], "euler", find_cells(of_run, "euler")), folder)
        make_pictures(folder, options.side_px, options.frames)
        cells = [Cell(index // 57, "single", index % 57) for index in range(options.frames)]
        compare("clouds", [Frame(cell, (folder / f"{index}.jpg",)) for index, cell in enumerate(cells)], folder)


def compare(name: str, frames: list[Frame], folder: Path) -> None:
    """Write the film in every way, and print what it took and what became of it."""
    film = Film(frames, PictureReader(skip_broken=False), font_size=24)
    print(f"\n{name}: {len(film)} frames of {film.size_px[0]} x {film.size_px[1]} px\n")
    print("| way | seconds | file | PSNR as the eye sees it | colour error | plain PSNR | unsteady |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way in ("ours", *FFMPEG):
        target = folder / "film.gif"
        start = time.perf_counter()
        if way == "ours":
            write_ours(film, target)
        else:
            write_with_ffmpeg(film, target, FFMPEG[way])
        seconds = time.perf_counter() - start
        seen, error, plain, unsteady = judge(film, target)
        numbers = (f"{target.stat().st_size / 1e6:.1f} MB", f"{seen:.1f} dB", f"{error:.1f}", f"{plain:.1f} dB")
        print(
            f"| {way} | {seconds:.1f} | {' | '.join(numbers)} | {100 * unsteady:.1f} % |",
            flush=True,
        )


def write_with_ffmpeg(film: Film, target: Path, mixing: str) -> None:
    """Two passes, as ours: the palette of the whole film, then the film."""
    width, height = film.size_px
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    pixels = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-video_size",
        f"{width}x{height}",
        "-framerate",
        str(FPS),
        "-i",
        "-",
    ]
    palette = target.with_suffix(".png")
    passes = (
        ["-vf", "palettegen=stats_mode=full:reserve_transparent=0", "-frames:v", "1", "-update", "1", str(palette)],
        ["-i", str(palette), "-lavfi", f"paletteuse={mixing}", "-loop", "0", str(target)],
    )
    for arguments in passes:
        with subprocess.Popen([*program, *pixels, *arguments], stdin=subprocess.PIPE) as process:
            for frame in film:
                process.stdin.write(frame.tobytes())
            process.stdin.close()
        if process.returncode:
            raise RuntimeError(f"ffmpeg ended with {process.returncode}")


def judge(film: Film, gif: Path) -> tuple[float, float, float, float]:
    """PSNR of blurred frames [dB], their colour error, PSNR of the frames as they are [dB], and the unsteady share."""
    plain, seen, errors, unsteady = [], [], [], []
    before: tuple[np.ndarray, np.ndarray] | None = None
    for frame, drawn in zip(film, frames_of(gif), strict=True):
        true, got = np.asarray(frame, float), np.asarray(drawn, float)
        true_seen, got_seen = (
            np.asarray(picture.filter(ImageFilter.GaussianBlur(BLUR_PX)), float) for picture in (frame, drawn)
        )
        plain.append(np.mean((true - got) ** 2))
        seen.append(np.mean((true_seen - got_seen) ** 2))
        errors.append(np.sqrt(((lab(true_seen) - lab(got_seen)) ** 2).sum(-1)).mean())
        if before is not None and (still := (true == before[0]).all(-1)).any():
            unsteady.append((got[still] != before[1][still]).any(-1).mean())
        before = (true, got)
    return decibels(seen), float(np.mean(errors)), decibels(plain), float(np.mean(unsteady or [0.0]))


def frames_of(gif: Path) -> Iterator[Image.Image]:
    """Its frames in RGB, as a viewer puts them together."""
    with Image.open(gif) as film:
        for frame in ImageSequence.Iterator(film):
            yield frame.convert("RGB")


def decibels(squares: list[float]) -> float:
    """PSNR of all frames together."""
    return 10 * math.log10(255**2 / float(np.mean(squares)))


def lab(srgb: np.ndarray) -> np.ndarray:
    """Levels of 255 [..., 3] as CIE Lab (D65)."""
    share = srgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


if __name__ == "__main__":
    main()
