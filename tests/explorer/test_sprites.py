import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import read_run
from flux_ir.explorer.page import (
    BAND_PIXELS,
    MOST_TILE_PX,
    NOTHING,
    SHEET_PIXELS,
    TileLayout,
    draw_bands,
    lay_out_tiles,
    picture_size,
)


@given(width=st.integers(1, 4096), height=st.integers(1, 4096), rows=st.integers(1, 64), columns=st.integers(1, 64))
def test_tiles_fit_the_budget_and_are_never_enlarged(width, height, rows, columns):
    layout = lay_out_tiles(width, height, rows, columns)
    assert 1 <= layout.tile_width_px <= min(width, MOST_TILE_PX)
    assert 1 <= layout.tile_height_px <= min(height, MOST_TILE_PX)
    assert layout.tile_width_px * layout.tile_height_px * rows * columns <= SHEET_PIXELS
    one_row = layout.tile_width_px * layout.tile_height_px * columns
    assert layout.rows_per_band * one_row <= max(BAND_PIXELS, one_row)


def test_flux_at_fifty_steps_is_a_handful_of_bands():
    layout = lay_out_tiles(1024, 1024, rows=57, columns=50)
    assert layout == TileLayout(tile_width_px=52, tile_height_px=52, rows_per_band=12)


def test_wide_pictures_keep_their_shape():
    assert lay_out_tiles(512, 256, rows=4, columns=4)[:2] == (128, 64)


def test_every_tile_lies_at_its_block_and_step(make_run, output_dir):
    make_run(double=2, single=5, steps=(0, 3, 8), size=(64, 32))
    run = read_run(output_dir, "1a2b3c4d")
    layout = TileLayout(tile_width_px=16, tile_height_px=8, rows_per_band=3)
    bands = [Image.open(io.BytesIO(jpeg)) for jpeg in draw_bands(run, "x0", layout)]
    assert [band.size for band in bands] == [(48, 24), (48, 24), (48, 8)]
    for depth in range(7):
        for column, step in enumerate(run.steps):
            seen = bands[depth // 3].getpixel((16 * column + 8, 8 * (depth % 3) + 4))
            assert seen == pytest.approx((20 + 24 * step, 20 + 16 * depth, 220), abs=6)


def test_a_missing_picture_leaves_its_tile_empty(make_run, output_dir):
    make_run(double=1, single=1, steps=(0, 1)).decoded_image("euler", 1, "double", 0).unlink()
    run = read_run(output_dir, "1a2b3c4d")
    (jpeg,) = draw_bands(run, "euler", TileLayout(16, 16, 2))
    assert Image.open(io.BytesIO(jpeg)).getpixel((24, 8)) == pytest.approx(NOTHING, abs=4)


def test_a_broken_picture_is_named_with_the_command_that_mends_it(make_run, output_dir):
    folder = make_run(double=1, single=2, steps=(0, 1))
    folder.decoded_image("x0", 1, "single", 1).write_bytes(b"\xff\xd8 no more")
    run = read_run(output_dir, "1a2b3c4d")
    with pytest.raises(FluxIRError, match=r"step_1/single_block_1\.jpg must be a picture") as caught:
        list(draw_bands(run, "x0", lay_out_tiles(*picture_size(run), 3, 2)))
    assert caught.value.hint == "flux-ir lens --generation_id 1a2b3c4d decodes it again"


def test_a_broken_first_picture_is_named_too(make_run, output_dir):
    folder = make_run(lenses=("euler",))
    folder.decoded_image("euler", 0, "double", 0).write_bytes(b"")
    with pytest.raises(FluxIRError, match=r"double_block_0\.jpg must be a picture"):
        picture_size(read_run(output_dir, "1a2b3c4d"))
