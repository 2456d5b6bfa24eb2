"""Files that are no captures are refused by name, and run no code."""

import os
import pickle
import zipfile

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.store import load_capture
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
