"""Files that are no captures are refused by name, and run no code."""

import os
import pickle
import zipfile

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.reader import load_capture
from tests.recording.cases import left_in


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(tmp_path, plan, run, keep):
    run(tmp_path / "c.pt", plan())
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(FluxIRError, match=r"c\.pt is not a complete capture file"):
        load_capture(tmp_path / "c.pt")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FluxIRError, match=r"nowhere\.pt: No such file"):
        load_capture(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("value", [{"weight": torch.zeros(3)}, [1, 2], {"double_blocks": {}, "metadata": {}}, 5])
def test_other_files_of_torch_save_are_refused_by_name(tmp_path, value):
    torch.save(value, tmp_path / "c.pt")
    with pytest.raises(FluxIRError, match=r"c\.pt is a file of PyTorch, but no capture"):
        load_capture(tmp_path / "c.pt")


def test_a_zip_of_something_else_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FluxIRError, match="not one of torch"):
        load_capture(tmp_path / "c.pt")


def test_lists_of_unequal_length_are_refused(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan())
    file = torch.load(tmp_path / "c.pt", weights_only=True)
    file["single_blocks"]["block_1"].pop()
    torch.save(file, tmp_path / "c.pt")
    with pytest.raises(FluxIRError, match=r"'single_blocks\.block_1': 3"):
        load_capture(tmp_path / "c.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by a pickle"),)

    torch.save({"metadata": Malicious()}, tmp_path / "c.pt", pickle_module=pickle)
    with pytest.raises(FluxIRError, match="mkdir"):
        load_capture(tmp_path / "c.pt")
    assert left_in(tmp_path) == ["c.pt"]


# ---- Zipped again


def _zipped_again(path, method, *, zip64=False):
    with zipfile.ZipFile(path) as before:
        records = [(info.filename, before.read(info)) for info in before.infolist()]
    with zipfile.ZipFile(path, "w", method) as after:
        for name, data in records:
            with after.open(name, "w", force_zip64=zip64) as record:
                record.write(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_capture_that_was_zipped_again_is_read_right(tmp_path, plan, run, method):
    """`torch.load` reads the first two as well. The records are no longer aligned, either."""
    run(tmp_path / "c.pt", plan())
    before = load_capture(tmp_path / "c.pt")
    values = {(site, step): before.read(site, step).clone() for site in before.sites for step in before.steps}
    states = [before.context(step).img.clone() for step in before.steps]
    _zipped_again(tmp_path / "c.pt", method, zip64=method == zipfile.ZIP_STORED)
    again = load_capture(tmp_path / "c.pt")
    for (site, step), value in values.items():
        assert torch.equal(again.read(site, step), value), (site, step)
    for step, state in zip(again.steps, states, strict=True):
        assert torch.equal(again.context(step).img, state)


def test_damage_inside_a_compressed_record_is_one_clear_error(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan())
    _zipped_again(tmp_path / "c.pt", zipfile.ZIP_DEFLATED)
    capture = load_capture(tmp_path / "c.pt")
    site = capture.sites[0]
    record = capture.archive.infos[capture.stored_site(site, 0).values.record]
    content = bytearray((tmp_path / "c.pt").read_bytes())
    middle = record.header_offset + record.compress_size // 2
    content[middle : middle + 40] = bytes(40)
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(FluxIRError, match=r"c\.pt cannot be unpacked"):
        load_capture(tmp_path / "c.pt").read(site, 0)


def test_numbers_in_the_byte_order_of_another_machine_are_refused(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan())
    with zipfile.ZipFile(tmp_path / "c.pt") as before:
        records = [(info.filename, before.read(info)) for info in before.infolist()]
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as after:
        for name, data in records:
            after.writestr(name, b"big" if name.endswith("/byteorder") else data)
    with pytest.raises(FluxIRError, match="its numbers are big-endian, and this machine is little-endian"):
        load_capture(tmp_path / "c.pt")


def test_a_record_shorter_than_its_tensor_is_one_clear_error(tmp_path, plan, run):
    run(tmp_path / "c.pt", plan())
    capture = load_capture(tmp_path / "c.pt")
    site = capture.sites[0]
    record = capture.stored_site(site, 0).values.record
    with zipfile.ZipFile(tmp_path / "c.pt") as before:
        records = [(info.filename, before.read(info)) for info in before.infolist()]
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as after:
        for name, data in records:
            after.writestr(name, data[:-2] if name.endswith(f"/{record}") else data)
    with pytest.raises(FluxIRError, match=rf"is damaged: {record} has \d+ bytes and its tensor \d+"):
        load_capture(tmp_path / "c.pt").read(site, 0)
