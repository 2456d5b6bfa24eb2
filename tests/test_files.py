"""Files that are complete or absent, and JSON that is read or refused in one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, disk_error, read_json, write_json


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
        "import os, pathlib\nfrom flux_ir.files import complete_file\nfrom flux_ir.errors import FluxIRError\n"
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


def test_json_is_read_as_it_was_written_also_behind_a_byte_order_mark(tmp_path):
    write_json(tmp_path / "x.json", {"prompt": "größer"})
    assert read_json(tmp_path / "x.json", required=("prompt",)) == {"prompt": "größer"}
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "bom.json") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b'{"a": ', "must be JSON: Expecting value"),
        (b"\xff", "must be JSON: "),
        (b"[1, 2]", r"must be a JSON object: got \[1, 2\]"),
        (b"{}", "must have the keys a, b: it lacks a, b"),
    ],
)
def test_what_is_not_the_expected_json_is_one_line_and_the_callers_hint(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FluxIRError, match=rf"x\.json {message}") as caught:
        read_json(path, required=("a", "b"), hint="make it again")
    assert caught.value.hint == "make it again"
