"""Captions fit pictures of any size, and can be read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from flux_ir.visualize.frames import Cell
from flux_ir.visualize.overlay import (
    COMFORTABLE_PX,
    MOST_ENLARGED_PX,
    READABLE_PX,
    draw_caption,
    draw_label,
    enlargement,
    fit_captions,
    fit_label,
)

ONE = [Cell(2, "double", 7).captions]
MANY = [Cell(step, kind, block).captions for step in (0, 9, 49) for kind in ("double", "single") for block in (1, 37)]


def drawn_on(width, height, captions, font_size=24, ground=(200, 120, 40)):
    picture = Image.new("RGB", (width, height), ground)
    style = fit_captions(captions, width, height, font_size)
    draw_caption(picture, captions[-1], style)
    return picture, style


def changed(picture, ground=(200, 120, 40)):
    return ImageChops.difference(picture, Image.new("RGB", picture.size, ground)).getbbox()


@settings(deadline=None)
@given(st.integers(16, 4096), st.integers(16, 4096), st.integers(1, 200))
def test_every_caption_fits_in_its_box_and_the_box_in_the_picture(width, height, font_size):
    style = fit_captions(MANY, width, height, font_size)
    left, top, right, bottom = style.box.edges
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert 1 <= style.box.text_px <= font_size


@pytest.mark.parametrize("width", [16, 17, 24, 40, 64, 100, 256, 1024, 4096])
@pytest.mark.parametrize("caption", MANY[-3:])
def test_no_ink_leaves_the_box(width, caption):
    ground = (0, 0, 0)  # on black the box is invisible, and only the text shows
    picture = Image.new("RGB", (width, 64), ground)
    style = fit_captions(MANY, width, 64, 24)
    draw_caption(picture, caption, style)
    ink = changed(picture, ground)
    assert ink is not None
    left, top, right, bottom = style.box.edges
    assert left <= ink[0] < ink[2] <= right
    assert top <= ink[1] < ink[3] <= bottom
    assert max(picture.getextrema()[0]) > 150, "the text is not white"


def test_the_font_size_asked_for_is_used_where_there_is_room():
    assert fit_captions(MANY, 1024, 1024, 24).box.text_px == 24
    assert fit_captions(MANY, 4096, 4096, 120).box.text_px == 120


def test_the_sentence_is_shortened_only_where_it_could_not_be_read():
    forms = [fit_captions(ONE, width, 256, 24).form for width in (300, 150, 100, 70, 30)]
    assert forms[0] == 0
    assert forms == sorted(forms)
    assert forms[-1] == 4


def test_all_captions_of_a_film_share_one_box():
    few, _ = drawn_on(512, 512, [MANY[-1], MANY[0]])
    many, _ = drawn_on(512, 512, [MANY[0], MANY[-1]])
    assert changed(few) == changed(many)


def test_the_picture_shows_through_the_box_and_is_untouched_around_it():
    picture, style = drawn_on(512, 512, ONE)
    left, top, right, bottom = style.box.edges
    assert changed(picture) == style.box.edges
    assert picture.getpixel((left, top)) == tuple(round(0.35 * value) for value in (200, 120, 40))
    assert picture.getpixel((right, bottom)) == (200, 120, 40)


@pytest.mark.parametrize(("side", "factor"), [(16, 18), (64, 5), (128, 3), (256, 1), (512, 1), (4096, 1)])
def test_tiny_pictures_are_enlarged_by_a_whole_factor(side, factor):
    assert enlargement(ONE, side, side, 24) == factor
    assert fit_captions(ONE, side * factor, side * factor, 24).box.text_px >= READABLE_PX
    if factor > 1:
        assert fit_captions(ONE, side * factor, side * factor, 24) == fit_captions(ONE, 4096, 4096, COMFORTABLE_PX)


def test_pictures_are_not_enlarged_for_a_huge_font_alone():
    assert enlargement(ONE, 256, 256, 500) == 1
    assert enlargement(ONE, 16, 16, 500) * 16 <= MOST_ENLARGED_PX


def test_a_long_thin_picture_is_not_enlarged_beyond_the_limit():
    assert enlargement(ONE, 16, 4096, 24) == 1
    assert enlargement(ONE, 16, 512, 24) == 2


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.integers(16, 600), st.integers(16, 600))
def test_a_label_stays_inside_its_panel(text, width, height):
    panel = (50, 10, 50 + width, 10 + height)
    line, box = fit_label(text, panel, 24)
    assert panel[0] <= box.edges[0]
    assert panel[1] <= box.edges[1]
    assert box.edges[2] <= panel[2] or len(line) <= 2
    assert box.edges[3] <= panel[3]
    assert "\n" not in line


def test_a_long_label_is_cut_and_a_short_one_is_not():
    panel = (0, 0, 300, 300)
    line, box = fit_label("a very " * 30 + "long prompt", panel, 24)
    assert line.startswith("a very a very")
    assert line.endswith("…")
    assert box.edges[2] > 250, "it is cut too early"
    assert fit_label("seed 3", panel, 24)[0] == "seed 3"


def test_a_label_is_drawn_at_the_bottom():
    picture = Image.new("RGB", (300, 300), (200, 120, 40))
    line, box = fit_label("seed 3", (0, 0, 300, 300), 24)
    draw_label(picture, line, box)
    _, top, _, bottom = changed(picture)
    assert top > 240
    assert bottom < 300
