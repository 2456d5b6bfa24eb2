"""Names of a run's files, how runs are found again, and files that are complete or absent."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.layout import (
    RunFolder,
    check_generation_id,
    complete_file,
    disk_error,
    new_generation_id,
    newest_capture,
    write_json,
)


def make_run(output_dir, generation_id, *names):
    folder = RunFolder(output_dir, generation_id)
    folder.intermediates.mkdir(parents=True)
    for name in names:
        (folder.intermediates / name).write_bytes(b"")
    return folder


def test_new_ids_are_valid_and_differ():
    ids = {new_generation_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(check_generation_id(one) == one for one in ids)


@given(st.text(max_size=12))
def test_what_is_not_8_hex_digits_is_refused(text):
    if len(text) == 8 and set(text) <= set("0123456789abcdef"):
        return
    with pytest.raises(FluxIRError, match="8 hex digits"):
        check_generation_id(text)


@pytest.mark.parametrize("text", ["../../ab", "ABCDEF01", "abcdef0", "abcdef012", "abcdef01\n", "abcd/f01"])
def test_a_run_folder_never_leaves_its_output_folder(text, tmp_path):
    with pytest.raises(FluxIRError):
        RunFolder(tmp_path, text)


def test_names_are_those_of_the_original_program():
    run = RunFolder(Path("output"), "0123abcd")
    names = {
        run.image(): "img_0.jpg",
        run.image(2): "img_2.jpg",
        run.capture_file("20250102_030405", "flux-tiny"): "intermediates/capture_20250102_030405_flux-tiny.pt",
        run.metadata_file("20250102_030405", "flux-tiny"): "intermediates/metadata_20250102_030405_flux-tiny.json",
        run.decoded_image("euler", 3, "double", 18): "intermediates/decoded/step_3/double_block_18.jpg",
        run.decoded_image("x0", 3, "single", 0): "intermediates/decoded_x0/step_3/single_block_0.jpg",
        run.lens_json: "intermediates/lens.json",
        run.sheet("euler"): "contact_sheet.jpg",
        run.sheet("x0"): "contact_sheet_x0.jpg",
    }
    assert {path: path.relative_to("output/0123abcd").as_posix() for path in names} == names


def test_of_several_captures_the_newest_is_found(tmp_path):
    names = ["20250909_235959_flux-tiny", "20251010_000000_flux-dev", "20240101_000000_z"]
    files = [name for stem in names for name in (f"capture_{stem}.pt", f"metadata_{stem}.json")]
    run = make_run(tmp_path, "0123abcd", *files, "capture_20260101_000000_m.pt.partial", "lens.json")
    assert run.find_capture().name == "capture_20251010_000000_flux-dev.pt"
    assert run.find_metadata().name == "metadata_20251010_000000_flux-dev.json"
    assert newest_capture(run.path) == run.find_capture()


def test_an_unknown_id_is_refused_with_the_nearest_and_their_number(tmp_path):
    for known in ("0123abcd", "0123abce", "ffffffff", "99999999"):
        make_run(tmp_path, known)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FluxIRError) as caught:
        RunFolder(tmp_path, "0123abcf").find_capture()
    assert "0123abcf" in caught.value.message
    assert "4 others" in caught.value.message
    assert "0123abcd" in (caught.value.hint or "")
    assert "notes" not in str(caught.value)


def test_a_missing_output_folder_is_named(tmp_path):
    with pytest.raises(FluxIRError, match="nowhere does not exist"):
        RunFolder(tmp_path / "nowhere", "0123abcd").find_metadata()


def test_a_run_without_a_capture_says_so(tmp_path):
    run = make_run(tmp_path, "0123abcd")
    with pytest.raises(FluxIRError, match=r"capture_\*\.pt"):
        run.find_capture()


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with complete_file(path) as beside:
        beside.write_text("all of it")
        assert beside.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with complete_file(path) as beside:
            beside.write_text("half of")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxIRError) as caught, complete_file(tmp_path / "file" / "below.json"):
        pytest.fail("the body must not run")
    assert "below.json" in caught.value.message
    assert "--output_dir" in (caught.value.hint or "")


def test_a_folder_in_the_files_place_is_refused_at_once(tmp_path):
    with pytest.raises(FluxIRError, match="folder of that name"), complete_file(tmp_path):
        pytest.fail("the body must not run")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as on POSIX")
def test_a_folder_that_must_not_be_written_is_refused_at_once(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    become_nobody = "os.seteuid(65534)" if os.geteuid() == 0 else "None"
    program = (
        "import os, pathlib\nfrom flux_ir.layout import complete_file\nfrom flux_ir.errors import FluxIRError\n"
        f"{become_nobody}\n"
        f"try:\n    with complete_file(pathlib.Path({str(closed / 'x.json')!r})): print('ran')\n"
        "except FluxIRError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Permission denied" in done.stdout
    assert "--output_dir" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_disk_that_runs_full_is_said_in_one_line(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(FluxIRError, match="No space left") as caught, complete_file(path):
        Path("/dev/full").write_bytes(b"x")
    assert "free some space" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_type(tmp_path):
    with pytest.raises(FileNotFoundError), complete_file(tmp_path / "file.bin"):
        (tmp_path / "not there").read_bytes()


def test_a_disk_error_says_what_is_needed_and_what_is_free(tmp_path):
    error = disk_error(tmp_path / "not" / "there" / "x.pt", OSError(errno.ENOSPC, "No space"), needed_bytes=123456)
    assert "x.pt: No space (it needs 123456 bytes, " in error.message
    assert "--sites" in (error.hint or "")


def test_json_is_written_whole_and_readable(tmp_path):
    value = {"prompt": "größer", "steps": [1, 2.5, None]}
    write_json(tmp_path / "deep" / "x.json", value)
    text = (tmp_path / "deep" / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "größer" in text


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": object()}])
def test_what_json_cannot_say_leaves_the_old_file(tmp_path, value):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text() == "1\n"
