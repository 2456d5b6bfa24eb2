"""Stopping early: nothing is computed behind the last value asked for, and no bit of what is recorded changes."""

from fnmatch import fnmatchcase

import pytest
import torch

from flux_ir.recording.recorder import MemorySink, Recorder, RecordingComplete, until_recorded
from flux_ir.sampling.denoise import denoise
from flux_ir.sites import Site, block_outputs
from tests.recording.listeners import Failing, every_site, hooks_on


def steps_of(model, inputs, timesteps=(1.0, 0.6, 0.3, 0.0)):
    img, img_ids, txt, txt_ids, _, y, _ = inputs
    return denoise(model, img, img_ids, txt, txt_ids, y, list(timesteps), guidance=1.0)


def called(model):
    """The blocks that are called from now on, by name, in a list that grows."""
    names = []
    for name, module in model.named_modules():
        if name.count(".") == 1 or name == "final_layer":
            module.register_forward_pre_hook(lambda module, args, name=name: names.append(name))
    return names


@pytest.mark.parametrize(
    ("site", "deepest"),
    [
        *[(f"double.0.{stream}{part}", 1) for stream in ("img", "txt") for part in ("", ".attn", ".mlp", ".update")],
        ("double.1.txt.neurons", 2),
        ("single.0.neurons", 3),
        ("single.0.img", 3),
        ("single.1.out", 4),
        ("single.2.update", 5),
    ],
)
def test_nothing_behind_the_deepest_site_is_called(tiny_flux, tiny_inputs, site, deepest):
    model, sink = tiny_flux(), MemorySink()
    blocks = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]
    names = called(model)
    with Recorder(model, [Site.parse(site)], sink, steps=[0], stop_early=True), pytest.raises(RecordingComplete):
        model(*tiny_inputs())
    assert [name for name in names if name in {*blocks, "final_layer"}] == blocks[:deepest]
    assert list(sink.values) == [(0, Site.parse(site))]


@pytest.mark.parametrize("patterns", [["double.0.*"], ["double.*"], ["double.1.txt.*", "single.1*"], ["*"]])
def test_stopping_early_changes_no_bit_of_what_is_recorded(tiny_flux, tiny_inputs, patterns):
    model, inputs = tiny_flux(), tiny_inputs()
    sites = [site for site in every_site(model) if any(fnmatchcase(str(site), pattern) for pattern in patterns)]
    whole, stopped = MemorySink(), MemorySink()
    with Recorder(model, sites, whole, steps=[0, 2]):
        assert len(list(steps_of(model, inputs))) == 3
    with Recorder(model, sites, stopped, steps=[0, 2], stop_early=True):
        steps = list(until_recorded(steps_of(model, inputs)))
    assert [step.number for step in steps] == [0, 1]  # the last has no velocity
    assert hooks_on(model) == 0
    assert list(stopped.values) == list(whole.values)
    assert all(torch.equal(value, whole.values[key]) for key, value in stopped.values.items())
    assert all(torch.equal(context.img, whole.contexts[step].img) for step, context in stopped.contexts.items())


def test_steps_behind_the_last_recorded_one_are_not_begun(tiny_flux, tiny_inputs):
    model, names = tiny_flux(), []
    model.register_forward_pre_hook(lambda module, args: names.append("forward"))
    with Recorder(model, [Site.parse("double.0.img")], MemorySink(), steps=[1], stop_early=True):
        assert len(list(until_recorded(steps_of(model, tiny_inputs())))) == 1
    assert len(names) == 2
    assert torch.is_grad_enabled()


def test_without_sites_the_last_step_ends_before_it_begins(tiny_flux, tiny_inputs):
    model, sink = tiny_flux(), MemorySink()
    names = called(model)
    with Recorder(model, [], sink, steps=[0], stop_early=True):
        assert list(until_recorded(steps_of(model, tiny_inputs()))) == []
    assert list(sink.contexts) == [0]
    assert names == []


def test_other_errors_pass_until_recorded(tiny_flux, tiny_inputs):
    model, site = tiny_flux(), Site.parse("double.0.img")
    recorder = Recorder(model, [site], Failing(0, RuntimeError("stop")), steps=[0], stop_early=True)
    with pytest.raises(RuntimeError, match="stop"), recorder:
        list(until_recorded(steps_of(model, tiny_inputs())))


@pytest.mark.parametrize("steps", [None, []])
def test_stopping_early_needs_to_know_where(tiny_flux, steps):
    with pytest.raises(ValueError, match="stop_early needs the steps"):
        Recorder(tiny_flux(), block_outputs(2, 3), MemorySink(), steps=steps, stop_early=True)
