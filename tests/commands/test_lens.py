"""`flux-ir lens` on earlier captures: the same pictures again, other readings beside them, and what fails."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_ir.commands.capture import main as capture
from flux_ir.commands.lens import main as lens
from flux_ir.commands.main import main as flux_ir
from flux_ir.models.registry import get_spec
from flux_ir.recording.reader import load_capture
from tests.commands.run_folder import full_beyond

SPEC = get_spec("flux-tiny")
LAST = f"single.{SPEC.flux.depth_single_blocks - 1}"
EULER = ("--lens", "euler")
QUICK = ("--model", "flux-tiny", "--num_steps", "2", "--seed", "3", "--prompt", "a red circle", *EULER)


@pytest.fixture
def folder(captured_run, output):
    """A copy of the shared run, to be changed."""
    return Path(shutil.copytree(captured_run.folder, output / captured_run.folder.name))


@pytest.fixture
def make(output, capsys):
    """Captures with these words. Returns the run's folder."""

    def run(*words):
        known = set(output.iterdir()) if output.exists() else set()
        assert capture([*QUICK, *words, "--output_dir", str(output)]) == 0, capsys.readouterr().err
        capsys.readouterr()
        (made,) = set(output.iterdir()) - known
        return made

    return run


@pytest.fixture
def read(capsys):
    """Reads a run again with these words, which must succeed. Returns what it told on stderr."""

    def again(folder, *words):
        words = words if "--lens" in words else (*EULER, *words)
        code = lens(["--generation_id", folder.name, "--output_dir", str(folder.parent), *words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.err

    return again


def refused(capsys, folder, *words):
    """The error and the hint of a reading that must fail with these two lines and change nothing."""
    before = contents(folder) if folder.exists() else {}
    assert lens(["--generation_id", folder.name, "--output_dir", str(folder.parent), *words]) == 2
    captured = capsys.readouterr()
    error, hint = captured.err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert captured.out == ""
    assert (contents(folder) if folder.exists() else {}) == before
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers_of(folder):
    return json.loads((folder / "intermediates" / "lens.json").read_text())["sites"]


# ---- The same again


def test_reading_again_gives_the_same_bytes(folder, output, capsys):
    before = contents(folder)
    shutil.rmtree(folder / "intermediates" / "decoded")
    (folder / "contact_sheet.jpg").unlink()
    (folder / "intermediates" / "lens.json").unlink()
    assert flux_ir(["lens", "--generation_id", folder.name, "--output_dir", str(output), *EULER]) == 0
    captured = capsys.readouterr()
    assert contents(folder) == before
    assert captured.out.splitlines()[0] == f"generation {folder.name}"
    for path in ("contact_sheet.jpg", "intermediates/decoded", "intermediates/lens.json"):
        assert re.search(rf"  {re.escape(str(folder / path))}$", captured.out, flags=re.MULTILINE)
    assert re.search(r"decode .* (\d+)/\1 ", captured.err)
    assert "note:" not in captured.err


def test_the_other_lens_is_added_and_nothing_is_lost(folder, read):
    before, numbers = contents(folder), numbers_of(folder)
    read(folder, "--lens", "x0")
    after = contents(folder)
    assert {name for name in after if name not in before} == {
        "contact_sheet_x0.jpg",
        *(name.replace("/decoded/", "/decoded_x0/") for name in before if "/decoded/" in name),
    }
    assert {name for name in before if after[name] != before[name]} == {"intermediates/lens.json"}
    for site, rows in numbers_of(folder).items():
        assert len(rows) == len(numbers[site]) == 3
        for row, old in zip(rows, numbers[site], strict=True):
            assert row.keys() - old.keys() == {"psnr_x0_db"}
            assert old.items() <= row.items()
            assert (row["psnr_x0_db"] is None) is (site == LAST and row["step"] == 2)
    assert after["contact_sheet_x0.jpg"] != after["contact_sheet.jpg"]


def test_both_lenses_at_once_and_any_batch_show_the_same(folder, read):
    before = {name: Image.open(folder / name).convert("RGB") for name in contents(folder) if "/decoded/" in name}
    read(folder, "--lens", "both", "--decode_batch", "5")
    for name, picture in before.items():
        again = Image.open(folder / name).convert("RGB")
        off = torch.frombuffer(bytearray(again.tobytes()), dtype=torch.uint8).int()
        off -= torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
        assert off.abs().float().mean() < 1.0, name  # bf16 may round otherwise in another batch
    assert sum("/decoded_x0/" in name for name in contents(folder)) == len(before)


# ---- What can be read


def test_halves_of_blocks_are_read_and_the_last_is_what_others_are_held_against(make, read):
    folder = make(
        "--sites", f"double.3.img,single.1.img,{LAST}.img,double.0.txt", "--should_decode_intermediates=False"
    )
    told = read(folder)
    assert "note:" not in told
    assert list(numbers_of(folder)) == ["double.3.img", "single.1.img", f"{LAST}.img"]
    for site, rows in numbers_of(folder).items():
        for row in rows:
            assert (row["cosine"] == 1.0) is (site == f"{LAST}.img")
            assert row["relative_distance"] < 2
    decoded = folder / "intermediates" / "decoded"
    blocks = {path.stem for path in decoded.rglob("*.jpg")}
    assert blocks == {"double_block_3", "single_block_1", LAST.replace(".", "_block_")}


def test_a_run_without_its_picture_is_read_all_the_same(folder, read):
    (folder / "img_0.jpg").unlink()
    (folder / "intermediates" / "lens.json").unlink()
    read(folder)
    for rows in numbers_of(folder).values():
        assert all(row["psnr_euler_db"] is None and row["cosine"] is not None for row in rows)


def test_a_capture_without_image_outputs_is_refused(make, capsys):
    folder = make("--sites", "double.*.txt", "--should_decode_intermediates", "False")
    error, hint = refused(capsys, folder)
    assert "holds none: it has double.0.txt and such" in error
    assert "double.*.img" in hint


# ---- Which weights


@pytest.fixture
def other_weights(tmp_path):
    """A transformer that predicts something else."""
    weights = load_file(SPEC.assets / "transformer.safetensors")
    weights["final_layer.linear.weight"] = -weights["final_layer.linear.weight"]
    path = tmp_path / "other.safetensors"
    save_file(weights, path)
    return path


def test_the_weights_of_the_capture_are_taken_without_being_named(make, read, other_weights, monkeypatch, capsys):
    folder = make("--sites", "single.*", "--checkpoint", str(other_weights))
    before = contents(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLUX_MODEL", str(SPEC.assets / "transformer.safetensors"))
    told = read(folder)
    assert contents(folder) == before
    assert "note:" not in told
    other_weights.unlink()
    error, _ = refused(capsys, folder)
    assert "must name a file or a folder that exists" in error
    assert str(other_weights) in error


def test_weights_named_by_a_variable_are_found_again(make, read, other_weights, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", str(other_weights))
    folder = make("--sites", "single.*")
    before = contents(folder)
    monkeypatch.delenv("FLUX_MODEL")
    read(folder)
    assert contents(folder) == before


def test_other_weights_than_those_of_the_capture_are_noticed(folder, read, other_weights):
    told = read(folder, "--checkpoint", str(other_weights))
    (note,) = [line for line in told.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: these are not the weights the capture was made with: read at the last block,")


def test_packaged_weights_are_found_wherever_the_package_is_now(folder, read):
    path = next((folder / "intermediates").glob("metadata_*.json"))
    metadata = json.loads(path.read_text())
    for file in metadata["files"].values():
        file["path"] = "/moved/since" + file["path"]
    path.write_text(json.dumps(metadata))
    before = contents(folder)
    read(folder)
    assert contents(folder) == before


# ---- What is wrong


def test_an_unknown_generation_names_the_nearest(folder, capsys):
    unknown = folder.parent / ("0" + folder.name[1:] if folder.name[0] != "0" else "1" + folder.name[1:])
    error, hint = refused(capsys, unknown)
    assert error == f"there is no generation {unknown.name} in {folder.parent}, which has 1 others"
    assert hint == f"the nearest are {folder.name}"
    assert not unknown.exists()


@pytest.mark.parametrize("name", ["../x", "..", "", "0123ABCD", "0123abcd/../0123abcd", "0123abcd\n"])
def test_a_generation_id_never_leads_out_of_the_folder(name, output, capsys):
    assert lens([f"--generation_id={name}", "--output_dir", str(output)]) == 2
    error, _ = capsys.readouterr().err.splitlines()
    assert error == f"error: a generation id is 8 hex digits in lower case: got {name!r}"
    assert not output.exists()


def test_an_output_folder_that_is_not_there_is_told(output, capsys):
    error, hint = refused(capsys, output / "0123abcd")
    assert error == f"the folder {output} does not exist, so there is no generation 0123abcd in it"
    assert "--output_dir" in hint


@pytest.mark.parametrize(
    ("pattern", "change", "error"),
    [
        ("capture_*.pt", lambda path: path.unlink(), r"must hold a file capture_\*\.pt: there is none"),
        ("capture_*.pt", lambda path: path.write_bytes(path.read_bytes()[:-5000]), "not a complete capture file"),
        ("capture_*.pt", lambda path: path.write_text("no capture"), "not a complete capture file"),
        ("capture_*.pt", lambda path: torch.save({"a": 1}, path), "a file of PyTorch, but no capture"),
        ("metadata_*.json", lambda path: path.unlink(), r"must hold a file metadata_\*\.json: there is none"),
        ("metadata_*.json", lambda path: path.write_text('{"model": '), "must be JSON"),
        ("lens.json", lambda path: path.write_text("[1, 2]"), "must be a JSON object"),
        ("lens.json", lambda path: path.write_bytes(b"\xff\xfe"), "must be JSON"),
    ],
)
def test_a_broken_run_is_one_line_before_anything_is_decoded(folder, capsys, pattern, change, error):
    change(next((folder / "intermediates").glob(pattern)))
    told, _ = refused(capsys, folder)
    assert re.search(error, told)
    assert str(folder) in told


def test_wrong_options_change_nothing(folder, capsys):
    error, _ = refused(capsys, folder, "--checkpoint", "nowhere")
    assert error.startswith("--checkpoint must name a file or a folder that exists")
    error, _ = refused(capsys, folder, "--device", "cuda:99")
    assert error.startswith("--device cuda:99 must be a GPU of this machine")


@pytest.mark.parametrize(("size", "what"), [(4_000, "_block_"), (20_000, "contact_sheet.jpg")])
def test_a_disk_that_runs_full_leaves_only_whole_files(make, capsys, size, what):
    folder = make("--sites", "single.*,double.*.img", "--should_decode_intermediates", "False")
    with full_beyond(size):
        assert lens(["--generation_id", folder.name, "--output_dir", str(folder.parent)]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert re.match(rf"error: cannot write .*{what}.*: File too large", error)
    assert hint.startswith("hint: free some space")
    assert not list(folder.rglob("*.partial"))
    for path in folder.rglob("*.jpg"):
        Image.open(path).load()
    assert load_capture(folder).steps == [0, 1]


def test_the_newest_run_is_named_latest(tmp_path, capsys):
    assert lens(["--generation_id", "latest", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: there is no generation in {tmp_path}")
