"""The layers around the blocks: time embedding and modulation."""

import math

import pytest
import torch

from flux_ir.models.flux1.blocks import Modulation, timestep_embedding


def test_time_embedding_holds_cosines_then_sines_of_a_thousand_times_t():
    embedding = timestep_embedding(torch.tensor([0.25]))
    assert embedding.shape == (1, 256)
    assert embedding[0, 0] == pytest.approx(math.cos(250), abs=1e-5)
    assert embedding[0, 128] == pytest.approx(math.sin(250), abs=1e-5)
    assert embedding[0, 127] == pytest.approx(math.cos(250 * 10_000 ** (-127 / 128)), abs=1e-5)


def test_time_embedding_rounds_in_bf16_as_the_published_models_saw_it():
    """1000 * 0.75 is 752 in bf16, whose neighbours there are four apart."""
    embedding = timestep_embedding(torch.tensor([0.75], dtype=torch.bfloat16))
    rounded = timestep_embedding(torch.tensor([0.752], dtype=torch.float64)).bfloat16()
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, rounded)


@pytest.mark.parametrize(("double", "branches"), [(True, 2), (False, 1)])
def test_modulation_gives_shift_scale_and_gate_in_this_order(double, branches):
    dim = 8
    modulation = Modulation(dim, double=double)
    torch.nn.init.zeros_(modulation.lin.weight)
    modulation.lin.bias.data = torch.arange(3 * branches).repeat_interleave(dim).float()
    parts = modulation(torch.zeros(1, dim))
    assert [[part.unique().item() for part in branch] for branch in parts] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in range(branches)
    ]
