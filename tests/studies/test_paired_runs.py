"""Networks side by side: what is told of each block is what the network puts out by itself."""

from collections import defaultdict

import pytest
import torch

from flux_ir.models.architecture import block_names
from flux_ir.recording.recorder import Recorder
from flux_ir.sampling.generate import Inputs, sample
from flux_ir.studies.paired_runs import ALONE, REFERENCE, PairedRun, PairedRuns

TIMES = [1.0, 0.7, 0.3, 0.0]


@pytest.fixture
def inputs(tiny_inputs):
    img, img_ids, txt, txt_ids, _, y, _ = tiny_inputs()
    return Inputs(img, img_ids, txt, txt_ids, y)


def told_of(first, other, inputs, *, guidance=(3.0, 3.0), others=None):
    """What is told of the free and the forced run and of the blocks alone, and the steps."""
    told = defaultdict(list)
    runs = [
        PairedRun("free", other, inputs if others is None else others, guidance[1]),
        PairedRun("forced", other, inputs, guidance[1], forced=True),
    ]
    paired = PairedRuns(
        first, inputs, TIMES, guidance[0], runs, lambda run, block, *pair: told[run, block].append(pair), alone=other
    )
    return told, list(paired.steps())


def test_outputs_are_those_of_runs_by_themselves(tiny_flux, inputs):
    first, other = tiny_flux(seed=0), tiny_flux(seed=1)
    told, steps = told_of(first, other, inputs)
    for network, name in ((first, REFERENCE), (other, "free")):
        with Recorder(network, "single.*, double.*.img") as recorder:
            walk = list(sample(network, inputs, TIMES, 3.0))
        assert all(torch.equal(done[name].after, one.after) for done, one in zip(steps, walk, strict=True))
        for number in range(3):
            outputs = told["free", "single_blocks.2"][number]
            assert torch.equal(outputs[name == "free"], recorder.sink.read("single.2", number))
            text_first = told["free", "double_blocks.1"][number][name == "free"]
            assert torch.equal(text_first[:, 7:], recorder.sink.read("double.1.img", number))


def test_a_forced_step_begins_where_the_reference_is_and_the_first_is_the_free_one(tiny_flux, inputs):
    told, steps = told_of(tiny_flux(seed=0), tiny_flux(seed=1), inputs)
    assert [done["forced"].number for done in steps] == [0, 1, 2]
    assert all(torch.equal(done["forced"].before, done[REFERENCE].before) for done in steps)
    assert torch.equal(steps[0]["forced"].velocity, steps[0]["free"].velocity)
    assert not torch.equal(steps[1]["forced"].velocity, steps[1]["free"].velocity)
    for block in block_names(tiny_flux().params):
        pairs = told["free", block][0], told["forced", block][0]
        assert torch.equal(pairs[0][1], pairs[1][1])


def test_a_block_alone_is_given_what_the_references_was_given(tiny_flux, inputs):
    first, other = tiny_flux(seed=0), tiny_flux(seed=0)
    torch.nn.init.zeros_(other.single_blocks[1].linear2.weight)
    told, _ = told_of(first, other, inputs)
    for block in block_names(first.params):
        equal = all(torch.equal(*pair) for pair in told[ALONE, block])
        assert equal == (block != "single_blocks.1")
    assert all(torch.equal(*told["forced", "single_blocks.0"][step]) for step in range(3))
    assert not torch.equal(*told["forced", "single_blocks.2"][0])


def test_a_network_beside_itself_is_equal_bit_by_bit(tiny_flux, inputs):
    network = tiny_flux()
    told, steps = told_of(network, network, inputs)
    assert len(told) == 3 * 5
    assert all(len(pairs) == 3 and all(torch.equal(*pair) for pair in pairs) for pairs in told.values())
    assert all(torch.equal(done[REFERENCE].after, done["free"].after) for done in steps)
    assert not any(module._forward_hooks for module in network.modules())


def test_guidance_alone_changes_no_block_but_what_it_is_told(tiny_flux, inputs):
    network = tiny_flux(guidance=True)
    told, _ = told_of(network, network, inputs, guidance=(1.0, 4.0))
    assert all(torch.equal(*pair) for block in block_names(network.params) for pair in told[ALONE, block])
    assert not torch.equal(*told["forced", "double_blocks.0"][0])
