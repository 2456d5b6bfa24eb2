"""One palette for a film: bright colours stay bright, gradients smooth, flat areas flat, captions white."""

import pytest
from PIL import Image, ImageChops, ImageStat

from flux_ir.errors import FluxIRError
from flux_ir.visualize.palette import Palette, film_palette, thumbnail_side


def gradients(side=64):
    """Three pictures that need far more than 256 colours together."""
    across, down = Image.linear_gradient("L").resize((side, side)), Image.radial_gradient("L").resize((side, side))
    turned = across.transpose(Image.Transpose.ROTATE_90)
    return [
        Image.merge("RGB", bands) for bands in ((across, down, turned), (turned, across, down), (down, turned, across))
    ]


def rms(one, other):
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).rms) / 3


def test_few_colours_are_kept_exactly_and_without_a_pattern():
    flat = [Image.new("RGB", (16, 16), colour) for colour in ((230, 30, 30), (20, 60, 220), (250, 250, 248))]
    palette = film_palette(flat)
    assert palette.dither == 0
    assert all(ImageChops.difference(palette.apply(frame).convert("RGB"), frame).getbbox() is None for frame in flat)


def test_gradients_are_smoother_with_the_pattern_than_without():
    pictures = gradients(256)
    palette = film_palette(pictures)
    assert 2 <= palette.dither <= 20
    plain = Palette(palette.colours, dither=0)

    def seen_from_afar(picture):
        return picture.convert("RGB").reduce(4)

    for picture in pictures:
        mixed, banded = (rms(seen_from_afar(p.apply(picture)), picture.reduce(4)) for p in (palette, plain))
        assert mixed < 0.8 * banded


def test_the_pattern_stands_still():
    picture, *_ = gradients()
    palette = film_palette(gradients())
    changed = picture.copy()
    changed.paste((0, 0, 0), (0, 0, 30, 64))
    before, after = (palette.apply(frame).crop((30, 0, 64, 64)) for frame in (picture, changed))
    assert before.tobytes() == after.tobytes()


def test_bright_colours_stay_bright():
    pictures = gradients()
    pictures[0].paste((255, 0, 0), (0, 0, 12, 12))
    shown = film_palette(pictures).apply(pictures[0]).convert("RGB").crop((0, 0, 12, 12))
    red, green, blue = ImageStat.Stat(shown).mean
    assert red > 235
    assert max(green, blue) < 30


def test_captions_stay_white_whatever_the_pictures():
    palette = film_palette([Image.new("RGB", (16, 16), colour) for colour in ((90, 20, 20), (20, 90, 20))])
    assert palette.apply(Image.new("RGB", (4, 4), (255, 255, 255))).convert("RGB").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (100, 3)])
def test_every_size_is_covered_by_the_pattern(size):
    palette = Palette(film_palette(gradients()).colours, dither=60)
    assert palette.apply(Image.new("RGB", size, (128, 128, 128))).size == size


def test_thumbnails_of_a_long_film_are_smaller():
    assert thumbnail_side(1) == 128
    assert thumbnail_side(100) == 38
    assert thumbnail_side(10**9) == 8


def test_a_palette_of_nothing_is_refused():
    with pytest.raises(FluxIRError, match="at least one frame"):
        film_palette([])
