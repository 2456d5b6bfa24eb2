"""The lens on FLUX.2, through a real capture file: its invariants are those of FLUX.1."""

import pytest
import torch

from flux_ir.lens.readout import read_step
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import Recorder
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sampling.denoise import clean_estimate
from flux_ir.sampling.generate import Inputs, sample
from flux_ir.sampling.schedule import shift_times
from flux_ir.sites import Site, block_outputs

GUIDANCE = 4.0
LAST = Site("single", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_last_block_readout_equals_the_sampler_step(
    tmp_path, tiny_flux2, tiny_flux2_inputs, tiny_references, dtype, guidance, reference
):
    model = tiny_flux2(guidance=guidance, dtype=dtype)
    given = tiny_flux2_inputs(batch=2, dtype=dtype)
    cond = tiny_references(batch=2, dtype=dtype) if reference else (None, None)
    inputs = Inputs(given.img, given.img_ids, given.txt, given.txt_ids, given.y, *cond)
    times = shift_times(torch.linspace(1, 0, 4), 2.0).tolist()
    sites = block_outputs(model.params.depth, model.params.depth_single_blocks)
    plan = CapturePlan(
        model.params,
        sites,
        times,
        txt_tokens=7,
        img_tokens=12,
        guidance=GUIDANCE,
        metadata={},
        dtype=dtype,
        batch=2,
        cond_tokens=11 if reference else 0,
    )
    with CaptureWriter(tmp_path / "capture.pt", plan) as sink, Recorder(model, sites, sink):
        steps = list(sample(model, inputs, times, GUIDANCE))
    unwatched = list(sample(model, inputs, times, GUIDANCE))
    capture = load_capture(tmp_path / "capture.pt")
    contents = torch.load(tmp_path / "capture.pt", mmap=True, weights_only=True)
    assert contents["denoising_context"]["y"][0].shape == (2, 0)
    for step, same in zip(steps, unwatched, strict=True):
        assert torch.equal(step.after, same.after)
        readings = {reading.site: reading for reading in read_step(model, capture, step.number)}
        assert set(readings) == {site for site in sites if site.stream != "txt"}
        assert torch.equal(readings[LAST].velocity, step.velocity)
        assert torch.equal(readings[LAST].euler, step.after)
        assert torch.equal(readings[LAST].x0, clean_estimate(step.before, step.velocity, step.t_curr))
        assert not torch.equal(readings[Site("single", 1)].velocity, step.velocity)
