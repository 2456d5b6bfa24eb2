"""A capture written at once: the very bytes of the writer that works a tensor at a time."""

import hashlib
import json
import resource
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch

from flux_ir.activations.whole import capture_content, write_capture
from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import StepContext
from flux_ir.recording.store import CapturePlan, CaptureWriter, file_bytes, load_capture
from flux_ir.sites import Site, all_sites, block_outputs, match_sites

TXT, IMG = 7, 12
METADATA = {"generation_id": "0123abcd", "prompt": "ein größerer Kreis \N{CAT}", "seed": 2**60, "note": None}


@pytest.fixture
def plan(tiny_flux_params):
    """Makes a plan."""

    def make(patterns=("double.1.img",), **changes):
        known = {"txt_tokens": TXT, "img_tokens": IMG, "timesteps": (1.0, 0.75, 0.0), "guidance": 2.5}
        sites = match_sites(patterns, all_sites(2, 3))
        return CapturePlan(tiny_flux_params, sites, **{**known, "metadata": METADATA, **changes})

    return make


def recorded(plan, seed=0):
    """What a network could have put out, for every site and step of the plan."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(shape, dtype):
        return torch.randn(shape, generator=draw).to(dtype)

    values = {
        (step, site): tensor(plan.full_shape(site), plan.dtype) for step in plan.kept_steps for site in plan.sites
    }
    contexts = {
        step: StepContext(tensor(plan.full_img_shape, plan.of_context), tensor(plan.y_shape, plan.of_context), TXT)
        for step in plan.kept_steps
    }
    return values, contexts


def write_by_steps(path, plan, values, contexts):
    with CaptureWriter(path, plan) as writer:
        for step in plan.kept_steps:
            writer.begin_step(step, contexts[step])
            for site in plan.sites:
                writer.write(step, site, values[step, site])


@pytest.mark.parametrize(
    ("patterns", "changes"),
    [
        (["double.1.img"], {}),
        (["double.0.img"], {"steps": [1], "metadata": {}}),
        (["double.*", "single.*"], {"dtype": torch.float32}),
        (["*.update", "single.*.txt"], {"batch": 3, "context_dtype": torch.float32}),
        (["double.1.*", "single.2"], {"rounds": True, "dtype": torch.float8_e4m3fn, "img_positions": [0, 5, 11]}),
        (["single.2.img"], {"rounds": True, "dtype": torch.float16, "img_positions": [4]}),
    ],
)
def test_the_bytes_are_those_of_the_writer(tmp_path, plan, patterns, changes):
    asked = plan(patterns, **changes)
    values, contexts = recorded(asked)
    write_by_steps(tmp_path / "steps.pt", asked, values, contexts)
    for _ in range(2):  # the second time with all that is remembered
        record = write_capture(tmp_path / "whole.pt", asked, values, contexts)
        written = (tmp_path / "whole.pt").read_bytes()
        assert written == (tmp_path / "steps.pt").read_bytes()
        assert record.bytes == len(written) == file_bytes(asked)
        assert record.sha256 == hashlib.sha256(written).hexdigest()
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        assert archive.testzip() is None


def test_what_is_remembered_of_one_plan_does_not_reach_another(tmp_path, plan):
    """Plans that differ in one thing each, written in turns."""
    one = plan(["double.1.*", "single.0"], rounds=True)
    plans = [
        one,
        replace(one, metadata={"prompt": "x" * 5000}),
        replace(one, img_positions=[1, 2]),
        replace(one, img_positions=[0, 7, 9]),
        replace(one, dtype=torch.float32),
        replace(one, dtype=torch.float8_e4m3fn),
        replace(one, sites=block_outputs(2, 3)[:1]),
        replace(one, timesteps=(1.0, 0.9, 0.5, 0.0), steps=[0, 2], guidance=4.0),
    ]
    for _ in range(2):
        for number, asked in enumerate(plans):
            values, contexts = recorded(asked, seed=number)
            write_by_steps(tmp_path / "steps.pt", asked, values, contexts)
            write_capture(tmp_path / "whole.pt", asked, values, contexts)
            assert (tmp_path / "whole.pt").read_bytes() == (tmp_path / "steps.pt").read_bytes(), number


@pytest.mark.parametrize("how", [{}, {"weights_only": True}, {"mmap": True, "weights_only": True}])
def test_torch_loads_it(tmp_path, plan, how):
    asked = plan(["double.1.*"], rounds=True, dtype=torch.float8_e4m3fn, img_positions=[2, 3])
    values, contexts = recorded(asked)
    write_capture(tmp_path / "c.pt", asked, values, contexts)
    file = torch.load(tmp_path / "c.pt", **how)
    assert file["token_positions"].tolist() == [2, 3]
    assert json.loads(json.dumps(file["metadata"]))["prompt"] == METADATA["prompt"]
    img, txt = file["double_blocks"]["block_1"][0]
    capture = load_capture(tmp_path / "c.pt")
    for site, value in ((Site("double", 1, "img"), img), (Site("double", 1, "txt"), txt)):
        assert torch.equal(capture.read_stored(site, 0)[0].view(torch.uint8), value.view(torch.uint8))


def test_values_that_do_not_lie_in_one_piece_are_written_in_their_order(tmp_path, plan):
    asked = plan(["single.1.img"], dtype=torch.float32, batch=2)
    values, contexts = recorded(asked)
    whole = {at: torch.cat([torch.zeros(2, TXT, 64), value], 1)[:, TXT:] for at, value in values.items()}
    write_capture(tmp_path / "c.pt", asked, whole, contexts)
    capture = load_capture(tmp_path / "c.pt")
    assert all(torch.equal(capture.read(site, step), value) for (step, site), value in values.items())


def test_what_is_missing_is_named_and_nothing_is_written(tmp_path, plan):
    asked = plan(["double.1.img", "single.0"])
    values, contexts = recorded(asked)
    without = {at: value for at, value in values.items() if at != (1, Site("single", 0))}
    with pytest.raises(FluxIRError, match=r"single\.0 is missing at step 1"):
        write_capture(tmp_path / "c.pt", asked, without, contexts)
    with pytest.raises(FluxIRError, match="the context is missing at step 1"):
        write_capture(tmp_path / "c.pt", asked, values, {0: contexts[0]})
    with pytest.raises(FluxIRError, match=r"must be torch.bfloat16 \[1, 12, 64\], as planned: got torch.float32"):
        write_capture(tmp_path / "c.pt", asked, {at: value.float() for at, value in values.items()}, contexts)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, plan):
    asked = plan()
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxIRError, match="cannot write"):
        write_capture(tmp_path / "file" / "c.pt", asked, *recorded(asked))


@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
def test_a_disk_that_runs_full_is_said_and_nothing_is_left(tmp_path, plan):
    asked = plan()
    values, contexts = recorded(asked)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes(asked) - 1000, hard))
    try:
        with pytest.raises(FluxIRError, match=r"c\.pt: File too large"):
            write_capture(tmp_path / "c.pt", asked, values, contexts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_small_capture_costs_little(plan, tiny_flux_params):
    """One site at one step, 46 kB: half a millisecond of one thread where it was measured, apart from the disk."""
    flux = replace(tiny_flux_params, hidden_size=256, axes_dim=(16, 24, 24))
    asked = replace(plan(["double.1.img"]), flux=flux, img_tokens=64, steps=[0])
    values, contexts = recorded(asked)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        hashlib.sha256(capture_content(asked, values, contexts)).hexdigest()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01  # with much to spare: under pytest, checks of shapes cost more than the work
