"""Which pictures of a run are shown, and in which order."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder
from flux_ir.visualize.frames import (
    Cell,
    Choice,
    choose_cells,
    find_cells,
    in_ranges,
    make_frames,
    run_facts,
)

GRID = [
    Cell(step, kind, block)
    for step in range(11)
    for kind, blocks in (("double", 2), ("single", 12))
    for block in range(blocks)
]


def make_run(output_dir, generation_id="0123abcd", *, lens="euler", cells=GRID):
    folder = RunFolder(output_dir, generation_id)
    for cell in cells:
        path = folder.decoded_image(lens, *cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a picture")
    return folder


def write_metadata(folder, timestamp, content="{}"):
    folder.intermediates.mkdir(parents=True, exist_ok=True)
    folder.metadata_file(timestamp, "flux-tiny").write_text(content, encoding="utf-8")


def test_cells_come_by_number_with_double_blocks_before_single_ones(tmp_path):
    cells = find_cells(make_run(tmp_path), "euler")
    assert cells == GRID
    assert cells.index(Cell(2, "single", 2)) < cells.index(Cell(2, "single", 10)) < cells.index(Cell(10, "double", 0))


def test_lenses_are_told_apart(tmp_path):
    make_run(tmp_path, lens="euler", cells=GRID[:3])
    folder = make_run(tmp_path, lens="x0", cells=GRID[:2])
    assert (len(find_cells(folder, "euler")), len(find_cells(folder, "x0"))) == (3, 2)


def test_what_is_not_a_decoded_picture_is_no_cell(tmp_path):
    folder = make_run(tmp_path, cells=GRID[:2])
    step = folder.decoded("euler") / "step_0"
    for name in ("double_block_9.jpg.partial", "double_block_x.jpg", "triple_block_9.jpg", "Thumbs.db"):
        (step / name).write_bytes(b"")
    (folder.decoded("euler") / "step_x").mkdir()
    assert find_cells(folder, "euler") == GRID[:2]


def test_a_hole_in_the_grid_is_still_a_cell(tmp_path):
    folder = make_run(tmp_path)
    folder.decoded_image("euler", 3, "double", 1).unlink()
    assert find_cells(folder, "euler") == GRID


def test_pictures_that_lens_json_counts_are_cells_even_if_a_whole_step_is_gone(tmp_path):
    folder = make_run(tmp_path, cells=GRID[:14])
    numbers = {"step": 1, "cosine": 1.0, "psnr_euler_db": None}
    folder.lens_json.write_text(json.dumps({"sites": {"double.0": [numbers], "single.3.img": [numbers]}}))
    assert find_cells(folder, "euler") == GRID[:28]


def test_lens_json_without_this_lens_adds_nothing(tmp_path):
    folder = make_run(tmp_path, cells=GRID[:14])
    folder.lens_json.write_text(json.dumps({"sites": {"double.0": [{"step": 1, "psnr_x0_db": 9.0}]}}))
    assert find_cells(folder, "euler") == GRID[:14]


def test_broken_json_names_the_file(tmp_path):
    folder = make_run(tmp_path, cells=GRID[:1])
    folder.lens_json.write_text("{")
    with pytest.raises(FluxIRError, match=r"lens\.json must be JSON"):
        find_cells(folder, "euler")


def test_nothing_decoded_gives_the_command_that_decodes(tmp_path):
    folder = make_run(tmp_path / "my output", lens="x0")
    with pytest.raises(FluxIRError, match="0123abcd has no pictures of the euler lens") as raised:
        find_cells(folder, "euler")
    command = f"flux-ir lens --generation_id 0123abcd --lens euler --output_dir '{tmp_path}/my output'"
    assert raised.value.hint == f"make them: {command}; or show those that there are: --lens x0"


def test_max_blocks_are_the_first_of_each_step_in_depth_order():
    chosen = choose_cells(GRID, Choice(max_blocks=3))
    assert chosen[:4] == [Cell(0, "double", 0), Cell(0, "double", 1), Cell(0, "single", 0), Cell(1, "double", 0)]
    assert len(chosen) == 3 * 11


def test_max_blocks_count_within_the_block_type():
    chosen = choose_cells(GRID, Choice(block_type="single", max_blocks=2, steps=(10, 2)))
    assert chosen == [Cell(step, "single", block) for step in (2, 10) for block in (0, 1)]


def test_order_steps_follows_one_block_through_the_steps():
    chosen = choose_cells(GRID, Choice(order="steps"))
    assert chosen[:12] == [Cell(step, "double", 0) for step in range(11)] + [Cell(0, "double", 1)]
    assert chosen[-1] == Cell(10, "single", 11)
    assert sorted(chosen) == GRID


def test_steps_that_were_not_decoded_are_refused():
    with pytest.raises(FluxIRError, match="decoded, 0-10: got 11, 30") as raised:
        choose_cells(GRID, Choice(steps=(1, 30, 11)))
    assert raised.value.hint is not None


def test_a_block_type_that_was_not_decoded_is_refused():
    with pytest.raises(FluxIRError, match="no single blocks were decoded, only double ones"):
        choose_cells(GRID[:2], Choice(block_type="single"))


def test_a_frame_has_the_picture_of_every_generation(tmp_path):
    folders = [RunFolder(tmp_path, "0123abcd"), RunFolder(tmp_path, "89abcdef")]
    (frame,) = make_frames(folders, "x0", [Cell(2, "double", 7)])
    assert [path.relative_to(tmp_path).as_posix() for path in frame.pictures] == [
        f"{name}/intermediates/decoded_x0/step_2/double_block_7.jpg" for name in ("0123abcd", "89abcdef")
    ]


def test_the_fullest_caption_is_the_original_programs():
    assert Cell(2, "double", 7).captions[0] == "Step 2 | double block 7"


def test_facts_are_empty_without_metadata_and_refuse_what_is_not_an_object(tmp_path):
    folder = RunFolder(tmp_path, "0123abcd")
    assert run_facts(folder) == {}
    write_metadata(folder, "20250102_030405", '{"seed": 3}')
    assert run_facts(folder) == {"seed": 3}
    write_metadata(folder, "20250102_030405", "[]")
    with pytest.raises(FluxIRError, match="JSON object"):
        run_facts(folder)


@given(st.sets(st.integers(0, 60)))
def test_ranges_read_back_as_the_same_numbers(numbers):
    text = in_ranges(sorted(numbers))
    parts = [part.split("-") for part in text.split(",") if part]
    read = [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]
    assert read == sorted(numbers)
    assert in_ranges([0, 1, 2, 5, 8, 9]) == "0-2,5,8-9"
