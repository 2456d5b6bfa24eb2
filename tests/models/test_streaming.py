"""Streamed weights: the same bits as resident ones, in time, in memory that is used again."""

import copy
import time

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import block_names
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.streaming import BlockStream, HostMemory, unit_of
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.denoise import StateNotFiniteError, denoise
from flux_ir.sites import all_sites


@pytest.fixture
def state(tiny_flux):
    return tiny_flux(guidance=True).state_dict()


@pytest.fixture
def resident(tiny_flux):
    return tiny_flux(guidance=True)


def late(state, *, seconds=0.0, log=None):
    """Fetches from a state dict; until a weight has come, its slot holds NaN."""

    def fetch(target, name):
        target.fill_(torch.nan)
        time.sleep(seconds)
        target.copy_(state[name])
        if log is not None:
            log.append(name)

    return fetch


def streamed_of(resident, state, **kwargs):
    return StreamedFlux(resident.params, late(state), "cpu", resident.dtype, **kwargs)


def steps_of(model, inputs, guidance=3.0):
    img, img_ids, txt, txt_ids, _, y, _ = inputs
    return list(denoise(model, img, img_ids, txt, txt_ids, y, [1.0, 0.7, 0.4, 0.0], guidance))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [(), (0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("slots", [2, 3])
def test_every_step_has_the_bits_of_resident_weights(tiny_flux, tiny_inputs, device, dtype, kept, slots):
    resident = tiny_flux(guidance=True, dtype=dtype)
    fetch = late(resident.state_dict(), seconds=0.0005)
    if device == "cuda":
        fetch = HostMemory(fetch, pinned=True).fetch
    streamed = StreamedFlux(resident.params, fetch, device, dtype, resident=kept, slots=slots)
    inputs = tiny_inputs(dtype=dtype, batch=2)
    inputs = type(inputs)(*(None if value is None else value.to(device) for value in inputs))
    resident.to(device)
    for ours, theirs in zip(steps_of(streamed, inputs), steps_of(resident, inputs), strict=True):
        assert torch.equal(ours.velocity, theirs.velocity)
        assert torch.equal(ours.after, theirs.after)


def test_weights_of_a_narrower_type_are_widened_exactly(tiny_flux, tiny_inputs):
    stored = tiny_flux(guidance=True, dtype=torch.bfloat16).state_dict()
    resident = tiny_flux(guidance=True)
    resident.load_state_dict(stored)
    streamed = streamed_of(resident, stored)
    assert torch.equal(streamed(*tiny_inputs(guidance=2.0)), resident(*tiny_inputs(guidance=2.0)))


def test_captures_are_the_same_and_interventions_hold(resident, state, tiny_inputs):
    streamed = streamed_of(resident, state)
    sites = all_sites(resident.params.depth, resident.params.depth_single_blocks)
    changed = next(site for site in sites if str(site) == "double.1.img")
    recorded = []
    for model in (resident, streamed):
        sink = MemorySink()
        with Intervention(model, {changed: lambda value, step: value * 1.5}), Recorder(model, sites, sink):
            steps_of(model, tiny_inputs())
        recorded.append(sink.values)
    assert recorded[0].keys() == recorded[1].keys()
    assert len(recorded[0]) == 3 * len(sites)
    for key, value in recorded[0].items():
        assert torch.equal(value, recorded[1][key]), key


def test_each_weight_comes_once_a_step_and_modulations_once_a_run(resident, state, tiny_inputs):
    log: list[str] = []
    streamed = StreamedFlux(resident.params, late(state, log=log), "cpu", torch.float32)
    log.clear()
    steps_of(streamed, tiny_inputs())
    streamed.stream.close()  # what was fetched ahead for another step is in
    modulations = [name for name in state if "_mod." in name or ".modulation." in name]
    assert [log.count(name) for name in modulations] == [1] * 14
    assert log.count("single_blocks.2.linear1.weight") == 3
    assert log.count("double_blocks.1.img_attn.qkv.weight") in (3, 4)  # the next step's has come already
    assert "img_in.weight" not in log


def test_nothing_computes_before_it_has_come_and_no_slot_is_filled_while_in_use(resident, state, tiny_inputs):
    events: list[tuple[str, str, int]] = []
    streamed = streamed_of(resident, state, watch=lambda *event: events.append(event))
    steps_of(streamed, tiny_inputs())
    busy: dict[int, str] = {}
    for event, unit, slot in events:
        if event == "fetch":
            assert slot not in busy, (unit, slot)
            busy[slot] = unit
        elif event == "compute":
            assert busy[slot] == unit
        else:
            assert busy.pop(slot) == unit
        assert len(busy) <= 2
    computed = [unit for event, unit, _ in events if event == "compute"]
    assert computed[-15:] == block_names(resident.params) * 3
    # The next block is asked for before this one computes: that is what the second slot is for.
    order = [event[:2] for event in events]
    assert order.index(("fetch", "single_blocks.1")) < order.index(("compute", "single_blocks.0"))


def test_a_block_that_raises_leaves_the_network_as_it_was(resident, state, tiny_inputs):
    streamed = streamed_of(resident, state)

    class StopError(Exception):
        pass

    def stop(module, args, output):
        raise StopError

    hook = streamed.double_blocks[1].img_attn.proj.register_forward_hook(stop)
    with pytest.raises(StopError):
        streamed(*tiny_inputs(guidance=2.0))
    hook.remove()
    assert all(p.is_meta for p in streamed.double_blocks.parameters())
    assert torch.equal(streamed(*tiny_inputs(guidance=2.0)), resident(*tiny_inputs(guidance=2.0)))


def test_a_weight_that_cannot_be_read_is_said_and_the_next_run_goes_well(resident, state, tiny_inputs):
    broken = {"double_blocks.1.txt_mlp.0.weight"}

    def fetch(target, name):
        if name in broken:
            raise FluxIRError(f"{name} cannot be read", hint="download it again")
        target.copy_(state[name])

    streamed = StreamedFlux(resident.params, fetch, "cpu", torch.float32)
    with pytest.raises(FluxIRError, match=r"txt_mlp.0.weight cannot be read"):
        streamed(*tiny_inputs(guidance=2.0))
    broken.clear()
    assert torch.equal(streamed(*tiny_inputs(guidance=2.0)), resident(*tiny_inputs(guidance=2.0)))


def test_two_runs_may_take_turns(resident, state, tiny_inputs):
    streamed = streamed_of(resident, state)
    runs = []
    for model in (streamed, resident):
        walks = []
        for seed in (0, 1):
            img, img_ids, txt, txt_ids, _, y, _ = tiny_inputs(seed=seed)
            walks.append(denoise(model, img, img_ids, txt, txt_ids, y, [1.0, 0.5, 0.0], 2.0 + seed))
        runs.append([step.after for pair in zip(*walks, strict=True) for step in pair])
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


def test_a_block_by_itself_finds_its_weights(resident, state, tiny_inputs):
    streamed = streamed_of(resident, state)
    vec = torch.randn(1, 64)
    img, txt = torch.randn(1, 12, 64), torch.randn(1, 7, 64)
    rotation = torch.ones(1, 1, 19, 8, dtype=torch.complex64)
    for ours, theirs in zip(
        streamed.double_blocks[1](img, txt, vec, rotation),
        resident.double_blocks[1](img, txt, vec, rotation),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_gradients_and_copies_are_refused(resident, state, tiny_inputs):
    streamed = streamed_of(resident, state)
    inputs = tiny_inputs(guidance=2.0)
    with pytest.raises(FluxIRError, match="gradients need every block's weights"):
        streamed(inputs.img.requires_grad_(), *inputs[1:])
    with (
        Intervention(streamed, {"double.0.img": lambda value, step: value.clone().requires_grad_()}),
        pytest.raises(FluxIRError, match="gradients need every block's weights"),
    ):
        streamed(*tiny_inputs(guidance=2.0))  # gradients that begin behind a block
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(streamed)


def test_a_state_that_is_not_finite_names_its_block(resident, state, tiny_inputs):
    state["single_blocks.1.linear2.bias"][3] = torch.inf
    streamed = streamed_of(resident, state)
    with pytest.raises(StateNotFiniteError, match=r"after step 0.*single.1"):
        steps_of(streamed, tiny_inputs())


def test_reading_out_needs_no_block(resident, state, tiny_inputs):
    log: list[str] = []
    streamed = StreamedFlux(resident.params, late(state, log=log), "cpu", torch.float32)
    inputs = tiny_inputs(guidance=2.0)
    vec = streamed.conditioning(inputs.timesteps, inputs.y, inputs.guidance)
    tokens = torch.randn(1, 12, 64)
    assert torch.equal(streamed.read_out(tokens, vec), resident.read_out(tokens, vec))
    assert not [name for name in log if "_blocks." in name]
    assert streamed.stream._free is None


def test_units_hold_every_parameter_once(resident):
    names = block_names(resident.params)
    held = [weight.name for name in names for weight in unit_of(resident, name).weights]
    assert sorted(held) == sorted(name for name, _ in resident.named_parameters() if "_blocks." in name)


def test_memory_is_that_of_the_slots(resident):
    units = [unit_of(resident, name) for name in block_names(resident.params)]
    stream = BlockStream(units, [1, 2, 3, 4, 0], late(resident.state_dict()), "cpu", torch.float32, slots=2)
    assert stream._free is None  # not before a block is asked for
    slots = list(stream.free)
    assert len(slots) == 2
    largest = max(unit.nbytes(torch.float32) for unit in units)
    assert all(slot._memory.nbytes == largest for slot in slots)
