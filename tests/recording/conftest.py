"""Captures of a small network and of random values, alone and as a collection."""

from dataclasses import replace

import pytest
import torch

from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.recorder import MemorySink, Recorder, StepContext
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sites import all_sites, block_outputs, match_sites
from tests.recording.cases import IMG, METADATA, SITES, TIMESTEPS, TXT


@pytest.fixture
def plan(tiny_flux_params):
    """Makes a plan that fits `tiny_inputs`."""

    def make(sites=None, **changes):
        sites = block_outputs(2, 3) if sites is None else match_sites(sites, all_sites(2, 3))
        known = {"txt_tokens": 7, "img_tokens": 12, "timesteps": TIMESTEPS, "guidance": 2.5, "metadata": METADATA}
        return CapturePlan(tiny_flux_params, sites, **{**known, "dtype": torch.float32, **changes})

    return make


@pytest.fixture
def run(tiny_flux, tiny_inputs):
    """Runs the network for every step of the plan with the file and the memory listening: what memory heard."""

    def capture(path, plan, *, steps=None, queue_bytes=2**20):
        model, memory = tiny_flux(dtype=plan.dtype), MemorySink()
        with (
            CaptureWriter(path, plan, queue_bytes=queue_bytes) as writer,
            Recorder(model, plan.sites, writer, steps=plan.kept_steps),
            Recorder(model, plan.sites, memory, steps=plan.kept_steps),
        ):
            for step in range(len(plan.timesteps) - 1) if steps is None else steps:
                inputs = tiny_inputs(batch=plan.batch, dtype=plan.context_dtype or plan.dtype, seed=step)
                model(*inputs)
        return memory

    return capture


@pytest.fixture
def write(tiny_flux_params):
    """Writes a capture of random values; returns them by (step, site)."""

    def make(path, number=0, *, sites=SITES, model="tiny", width=None, **changes):
        flux = tiny_flux_params if width is None else replace(tiny_flux_params, hidden_size=width, axes_dim=(4, 2, 2))
        metadata = {"generation_id": f"{number:016x}", "model": model, "prompt": f"prompt {number // 2}", "used_txt": 3}
        known = {"txt_tokens": TXT, "img_tokens": IMG, "timesteps": (1.0, 0.75, 0.5, 0.0), "steps": [0, 2]}
        known |= {"guidance": 1.0, "metadata": metadata, "rounds": True}
        plan = CapturePlan(flux, match_sites(sites, all_sites(2, 3)), **{**known, **changes})
        draw = torch.Generator().manual_seed(number)
        values = {
            (step, site): torch.randn(plan.full_shape(site), generator=draw)
            for step in plan.kept_steps
            for site in plan.sites
        }
        context = StepContext(torch.zeros(plan.full_img_shape), torch.zeros(plan.y_shape), plan.txt_tokens)
        write_values(path, plan, values, dict.fromkeys(plan.kept_steps, context))
        return values

    return make


def write_values(path, plan, values, contexts):
    """Writes the capture of a plan from values that are there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with CaptureWriter(path, plan) as writer:
        for step in plan.kept_steps:
            writer.begin_step(step, contexts[step])
            for site in plan.sites:
                writer.write(step, site, values[step, site])
