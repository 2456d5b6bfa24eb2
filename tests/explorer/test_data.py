import json
import shutil

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import (
    Block,
    decoded_runs,
    read_run,
    run_entry,
    weights_of,
)


def test_blocks_come_in_depth_order_and_steps_in_numeric_order(make_run, output_dir):
    make_run(double=2, single=11, steps=(0, 2, 10))
    entry = run_entry(read_run(output_dir, "1a2b3c4d"))
    assert entry["blocks"] == ["double.0", "double.1", *(f"single.{i}" for i in range(11))]
    assert entry["steps"] == [0, 2, 10]


def test_the_entry_repeats_the_metadata_and_pairs_the_flow_times(make_run, output_dir):
    make_run(steps=(0, 1, 3), prompt="cats, dogs", seed=0, size=(48, 32))
    entry = run_entry(read_run(output_dir, "1a2b3c4d"))
    assert (entry["id"], entry["prompt"], entry["model"], entry["seed"]) == ("1a2b3c4d", "cats, dogs", "flux-tiny", 0)
    assert (entry["width"], entry["height"], entry["num_steps"], entry["guidance"]) == (48, 32, 4, 2.5)
    assert entry["times"] == [(1.0, 0.75), (0.75, 0.5), (0.25, 0.0)]


def test_numbers_stand_at_the_place_of_their_block_and_step(make_run, output_dir):
    make_run(double=1, single=2, steps=(0, 4))
    entry = run_entry(read_run(output_dir, "1a2b3c4d"))
    assert set(entry["numbers"]) == {"relative_distance", "cosine", "psnr_euler_db", "psnr_x0_db"}
    assert entry["numbers"]["relative_distance"] == [[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]]
    assert entry["numbers"]["psnr_x0_db"] == [[20.0, 20.0], [21.0, 21.0], [None, None]]


def test_pictures_of_a_tuned_lens_are_a_lens_of_their_own(make_run, output_dir):
    folder = make_run(double=1, single=1, steps=(0,), lenses=("x0", "tuned"))
    report = json.loads(folder.lens_json.read_text())
    report["sites"]["single.0"][0]["psnr_tuned_db"] = 30.5
    folder.lens_json.write_text(json.dumps(report))
    run = read_run(output_dir, "1a2b3c4d")
    assert list(run.pictures) == ["x0", "tuned"]
    assert run_entry(run)["numbers"]["psnr_tuned_db"] == [[None], [30.5]]


def test_text_streams_and_parts_of_blocks_are_not_taken_for_blocks(make_run, output_dir):
    folder = make_run(double=1, single=1, steps=(0,))
    report = json.loads(folder.lens_json.read_text())
    for site in ("double.0.txt", "double.0.img.mlp", "single.0.txt", "single.0.update"):
        report["sites"][site] = [{"step": 0, "relative_distance": 99.0}]
    folder.lens_json.write_text(json.dumps(report))
    assert run_entry(read_run(output_dir, "1a2b3c4d"))["numbers"]["relative_distance"] == [[1.0], [0.0]]


def test_a_run_without_numbers_is_shown_without_them(make_run, output_dir):
    make_run(with_numbers=False)
    assert run_entry(read_run(output_dir, "1a2b3c4d"))["numbers"] == {}


def test_numbers_that_json_has_no_word_for_count_as_unknown(make_run, output_dir):
    folder = make_run(double=1, single=1, steps=(0,))
    folder.lens_json.write_text('{"sites": {"single.0": [{"step": 0, "cosine": NaN, "psnr_euler_db": Infinity}]}}')
    assert run_entry(read_run(output_dir, "1a2b3c4d"))["numbers"] == {}


def test_missing_pictures_are_named_by_row_and_column(make_run, output_dir):
    folder = make_run(double=2, single=1, steps=(0, 1))
    folder.decoded_image("x0", 1, "single", 0).unlink()
    run = read_run(output_dir, "1a2b3c4d")
    assert run.missing("x0") == [(2, 1)]
    assert run.missing("euler") == []
    assert Block("single", 0) in run.blocks


def test_only_names_this_program_writes_are_read(make_run, output_dir):
    folder = make_run(double=1, single=1, steps=(0,))
    step = folder.decoded("x0") / "step_0"
    for name in ("single_block_00.jpg", "single_block_1.jpg.partial", "triple_block_2.jpg", "xsingle_block_3.jpg"):
        shutil.copy(step / "single_block_0.jpg", step / name)
    shutil.copytree(step, folder.decoded("x0") / "step_x")
    run = read_run(output_dir, "1a2b3c4d")
    assert [str(block) for block in run.blocks] == ["double.0", "single.0"]
    assert run.steps == [0]


def test_runs_are_found_oldest_first_and_only_with_pictures(make_run, output_dir):
    make_run("bbbbbbbb").find_metadata().rename(
        output_dir / "bbbbbbbb" / "intermediates" / "metadata_20260101_000000_flux-tiny.json"
    )
    make_run("aaaaaaaa")
    shutil.rmtree(make_run("cccccccc", lenses=("euler",)).decoded("euler"))
    (output_dir / "notes").mkdir()
    (output_dir / "dddddddd").write_text("a file")
    assert decoded_runs(output_dir) == ["bbbbbbbb", "aaaaaaaa"]


def test_no_run_at_all_says_what_to_do(output_dir):
    with pytest.raises(FluxIRError, match="has 0 runs") as caught:
        decoded_runs(output_dir)
    assert caught.value.hint == "make one with capture_sample.py"
    with pytest.raises(FluxIRError, match="does not exist"):
        decoded_runs(output_dir / "elsewhere")


def test_runs_without_pictures_name_the_command_that_makes_them(make_run, output_dir):
    folder = make_run(lenses=("euler",))
    shutil.rmtree(folder.decoded("euler"))
    with pytest.raises(FluxIRError, match="generation 1a2b3c4d has no decoded pictures") as caught:
        read_run(output_dir, "1a2b3c4d")
    assert caught.value.hint == "flux-ir lens --generation_id 1a2b3c4d --lens both makes them"
    with pytest.raises(FluxIRError, match="none of them has any") as caught:
        decoded_runs(output_dir)
    assert caught.value.hint == "flux-ir lens --generation_id ID decodes a run"


def test_an_unknown_run_names_the_nearest(make_run, output_dir):
    make_run("1a2b3c4d")
    with pytest.raises(FluxIRError, match="there is no generation 1a2b3c4e") as caught:
        read_run(output_dir, "1a2b3c4e")
    assert "1a2b3c4d" in caught.value.hint


@pytest.mark.parametrize("name", ["../1a2b3c4d", "1A2B3C4D", "1a2b3c4d/", ""])
def test_what_is_not_an_id_is_refused(name, output_dir):
    with pytest.raises(FluxIRError, match="a generation id is 8 hex digits"):
        read_run(output_dir, name)


@pytest.mark.parametrize("text", ["{", "[]", '{"sites": 3}', '{"sites": {"single.0": [{"cosine": 1}]}}', "\x00"])
def test_a_broken_lens_json_is_named(text, make_run, output_dir):
    folder = make_run()
    folder.lens_json.write_text(text)
    with pytest.raises(FluxIRError, match=r"lens\.json (must be|is not what this program writes)"):
        read_run(output_dir, "1a2b3c4d")


def test_broken_metadata_is_named(make_run, output_dir):
    make_run().find_metadata().write_bytes(b"\xff\xfe")
    with pytest.raises(FluxIRError, match=r"metadata_\S+\.json must be JSON"):
        read_run(output_dir, "1a2b3c4d")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, None),
        ({"files": "hostile", "loras": 3}, None),
        ({"files": {"transformer": {"path": "a"}}, "loras": 3}, "not quantised"),
        ({"files": {"transformer": {"path": "a"}}, "quantize": "nf4"}, "quantised: nf4"),
        (
            {
                "files": {"transformer": {"path": "a", "stored_as": {"GGUF Q4_K": 3}}},
                "loras": [{"path": "/some/where/style.safetensors", "strength": 0.8}],
            },
            "quantised: a file of GGUF Q4_K, LoRA style.safetensors at 0.8",
        ),
    ],
)
def test_a_run_says_what_its_weights_were(metadata, told):
    assert weights_of(metadata) == told
