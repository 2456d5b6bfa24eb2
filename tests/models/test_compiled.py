"""Blocks compiled one by one: what they compute, what is seen of them, and what is said where they cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from flux_ir.errors import FluxIRError
from flux_ir.models import compiled
from flux_ir.models.compiled import CompiledForward, check_compiles, compile_blocks
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.recorder import MemorySink, Recorder


@pytest.fixture
def calls(monkeypatch):
    """Notes which blocks ran compiled. The compiler itself does not run: it would trace the shape checks of tests."""
    seen = []

    def compile_nothing(forward, backend):
        def run(block, *args, **kwargs):
            seen.append(block)
            return forward(block, *args, **kwargs)

        return run

    monkeypatch.setattr(compiled, "_compiled", compile_nothing)
    return seen


def test_every_block_runs_compiled(tiny_flux, tiny_inputs, calls):
    model = tiny_flux()
    compile_blocks(model)
    with torch.no_grad():
        model(*tiny_inputs())
    assert calls == [*model.double_blocks, *model.single_blocks]


@pytest.mark.parametrize("site", ["double.0.img", "double.0.txt.update", "single.1", "single.1.update"])
def test_outputs_and_updates_are_recorded_of_compiled_blocks(tiny_flux, tiny_inputs, calls, site):
    model, sink = tiny_flux(), MemorySink()
    compile_blocks(model)
    with torch.no_grad(), Recorder(model, site, sink):
        model(*tiny_inputs())
    assert calls == [*model.double_blocks, *model.single_blocks]
    assert len(sink.values) == 1


def test_every_site_can_be_recorded_and_changed(tiny_flux, tiny_inputs, calls):
    model, sink = tiny_flux(), MemorySink()
    compile_blocks(model)
    with torch.no_grad(), Recorder(model, "double.*, single.*", sink) as recorder:
        model(*tiny_inputs())
    assert {site for _, site in sink.values} == set(recorder.sites)
    assert calls == []  # sites inside were among them
    changed = []
    edits = {site: lambda value, step, site=site: changed.append(site) or value for site in recorder.sites}
    with torch.no_grad(), Intervention(model, edits):
        model(*tiny_inputs())
    assert sorted(changed) == sorted(recorder.sites)


def test_only_the_block_around_a_hook_is_not_compiled(tiny_flux, tiny_inputs, calls):
    model = tiny_flux()
    compile_blocks(model)
    with torch.no_grad(), Recorder(model, "double.0.img.mlp"):
        model(*tiny_inputs())
    assert calls == [*model.double_blocks[1:], *model.single_blocks]
    with torch.no_grad():
        model(*tiny_inputs())
    assert calls[-len(model.single_blocks) - len(model.double_blocks)] is model.double_blocks[0]


def test_gradients_go_through_blocks_as_they_are(tiny_flux, tiny_inputs, calls):
    model = tiny_flux()
    compile_blocks(model)
    img, *rest = tiny_inputs()
    img.requires_grad_()
    model(img, *rest).sum().backward()
    assert calls == []
    assert img.grad is not None


def test_a_block_that_cannot_be_compiled_is_one_line(tiny_flux, monkeypatch):
    def fail(*args):
        raise TorchDynamoException("No working C++ compiler found\nand much more")

    monkeypatch.setattr(compiled, "_compiled", lambda forward, backend: fail)
    forward = CompiledForward(tiny_flux().single_blocks[0])
    with (
        torch.no_grad(),
        pytest.raises(FluxIRError, match=r"here: No working C\+\+ compiler found \(") as raised,
    ):
        forward(torch.zeros(1))
    assert "leave out --compile" in raised.value.hint


def test_a_machine_without_a_compiler_is_told_before_anything_is_read(monkeypatch):
    import torch._inductor.config as settings

    monkeypatch.setattr(settings.cpp, "cxx", ("no-such-compiler",))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(FluxIRError, match="the blocks cannot be compiled here"):
        check_compiles("cpu")
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()


# Without the shape checks of tests, which no compiler can trace.
REAL = """
import json, sys, torch, flux_ir
from flux_ir.api.progress import unwatched
from flux_ir.recording.recorder import MemorySink, Recorder
from pathlib import Path

model = flux_ir.load_model("flux-tiny", device="cpu", compile=True)
plain = flux_ir.load_model("flux-tiny", device="cpu")
def last(model, sites):
    text = flux_ir.encode_prompt(model, "a red circle")
    with Recorder(model, sites) as recorder:
        *_, step = flux_ir.sample(model, text, seed=1, num_steps=2)
    return step, recorder.sink
outside, seen = last(model, "*.img, single.*.update")
bare, _ = last(model, "single.7")
inside, all_seen = last(model, "double.*, single.*")
eager, eager_seen = last(plain, "double.*, single.*")
site = sorted(s for _, s in seen.values if s.kind == "single" and s.part is None)[-1]
context = seen.contexts[1]
with torch.no_grad(), model.transformer() as flux:
    vec = flux.conditioning(torch.full((1,), outside.t_curr, dtype=model.dtype), context.y,
                            torch.full((1,), model.spec.default_guidance, dtype=model.dtype))
    read = flux.read_out(seen.read(site, 1).contiguous()[:, -64:], vec)
done = flux_ir.capture("a red circle", model=model, seed=1, num_steps=2, output_dir=sys.argv[1])
print(json.dumps({
    "recorder changes no bit": torch.equal(outside.after, bare.after),
    "all inside is eager": torch.equal(inside.after, eager.after),
    "sites": len(all_seen.values) == len(eager_seen.values),
    "anchor": torch.equal(read, outside.velocity),
    "drift": float((outside.after - eager.after).float().norm() / eager.after.float().norm()),
    "metadata": json.loads(Path(done.metadata).read_text())["compiled"],
}))
"""


@pytest.mark.slow
def test_a_compiled_run_records_reads_and_says_what_it_is(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)], capture_output=True, text=True, check=True, timeout=280
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("drift") < 0.03
    assert told == dict.fromkeys(told, True)
    assert len(list(Path(tmp_path).iterdir())) == 1
