"""Names of a run's files, and how runs and files are found again."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.layout import (
    RunFolder,
    check_generation_id,
    find_run,
    folders_with_captures,
    is_run_folder,
    new_generation_id,
    newest_capture,
    picture_of,
    run_of,
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


def test_latest_is_the_run_whose_metadata_says_so(tmp_path):
    for name, timestamp in (
        ("aaaaaaaa", "20250102_030405"),
        ("bbbbbbbb", "20260102_030405"),
        ("cccccccc", "20250102_030406"),
    ):
        make_run(tmp_path, name, f"metadata_{timestamp}_flux-tiny.json")
    os.utime(tmp_path / "aaaaaaaa", (2**31, 2**31))
    (tmp_path / "zzzz" / "intermediates").mkdir(parents=True)
    (tmp_path / "zzzz" / "intermediates" / "metadata_20990101_000000_x.json").write_text("{}")
    assert find_run(tmp_path, "latest").generation_id == "bbbbbbbb"


def test_latest_of_nothing_says_so(tmp_path):
    with pytest.raises(FluxIRError, match="there is no generation in"):
        find_run(tmp_path / "absent", "latest")


def test_an_unknown_id_names_the_nearest(tmp_path):
    make_run(tmp_path, "0123abcd")
    with pytest.raises(FluxIRError, match="no generation 0123abce") as raised:
        find_run(tmp_path, "0123abce")
    assert "0123abcd" in raised.value.hint


@pytest.mark.parametrize("name", ["../x", "..", "/etc", "", "0123ABCD", "Latest"])
def test_what_is_no_id_is_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(FluxIRError, match="8 hex digits"):
        find_run(tmp_path, name)


def test_decoded_pictures_are_found_by_the_names_that_they_are_given(tmp_path):
    run = RunFolder(tmp_path, "0123abcd")
    written = {run.decoded_image("x0", step, kind, 10) for step in (0, 12) for kind in ("double", "single")}
    for path in written | {
        run.decoded("x0") / "step_0" / name for name in ("single_block_01.jpg", "double_block_1.png")
    }:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = list(run.decoded_images("x0"))
    assert {image.path for image in found} == written
    assert all(image.path == run.decoded_image("x0", image.step, image.kind, image.block) for image in found)
    assert list(run.decoded_images("euler")) == []


def test_a_renamed_run_is_known_by_what_is_in_it(tmp_path):
    run = make_run(tmp_path, "0123abcd", "capture_20250102_030405_flux-tiny.pt")
    run.image().write_bytes(b"")
    renamed = run.path.rename(tmp_path / "my favourite")
    (capture,) = (renamed / "intermediates").iterdir()
    assert folders_with_captures(tmp_path) == [renamed]
    assert is_run_folder(renamed)
    assert picture_of(capture) == renamed / "img_0.jpg"
    assert picture_of(tmp_path / "elsewhere" / "capture.pt") is None
    with pytest.raises(FluxIRError, match="8 hex digits"):
        run_of(capture)
