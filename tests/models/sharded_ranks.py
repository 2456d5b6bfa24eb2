"""What one of two ranks finds of a sharded flux-tiny, started by torchrun: `python -m tests.models.sharded_ranks`."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from flux_ir.distributed import joined, wait_for_all
from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import block_names
from flux_ir.models.checkpoints.load import load_flux, load_sharded_flux
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.registry import get_spec
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.recorder import MemorySink, Recorder, until_recorded
from flux_ir.sampling.denoise import StateNotFiniteError, denoise
from flux_ir.sites import Site, all_sites

DTYPE = torch.bfloat16
TIMESTEPS = [1.0, 0.6, 0.0]


def inputs_of(params, seed):
    """Pictures of 2 x 3 tokens and texts of 5, other ones on every rank."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(DTYPE)

    img, img_ids = normal(2, 6, params.in_channels), torch.zeros(2, 6, 3)
    txt, txt_ids = normal(2, 5, params.context_in_dim), torch.zeros(2, 5, 3)
    return img, img_ids, txt, txt_ids, normal(2, params.vec_in_dim)


def gathered(network):
    """Weights of blocks that are there whole."""
    names = tuple(block_names(network.params))
    return [name for name, w in network.named_parameters() if name.startswith(names) and not isinstance(w, DTensor)]


def recorded(network, inputs, **kwargs):
    sites, sink = all_sites(network.params.depth, network.params.depth_single_blocks), MemorySink()
    edits = {"double.1.img": lambda value, step: value * 1.5, "single.2.out": lambda value, step: -value}
    with Intervention(network, edits), Recorder(network, sites, sink, **kwargs):
        steps = list(denoise(network, *inputs, TIMESTEPS, 2.5))
    return steps, sink.values


def check(ranks):
    spec = get_spec("flux-tiny")
    source = locate_model(spec, text=False, autoencoder=False)
    whole = load_flux(spec, source.transformer, "cpu", DTYPE)
    sharded = load_sharded_flux(spec, source.transformer, "cpu", DTYPE, ranks=ranks.world_size)

    # Of every weight of a block there is half, in memory of its own, and it is the file's.
    assert gathered(sharded) == []
    state = whole.state_dict()
    for name, weight in sharded.named_parameters():
        if isinstance(weight, DTensor):
            own, half = weight.to_local(), state[name].chunk(2)[ranks.rank]
            assert own.untyped_storage().nbytes() == half.nbytes
            assert torch.equal(own, half)
        else:
            assert torch.equal(weight, state[name])

    # Every step and site has the bits of the whole network, with other inputs on every rank.
    inputs = inputs_of(spec.flux, ranks.rank)
    (steps, values), (ours, mine) = recorded(whole, inputs), recorded(sharded, inputs)
    assert all(torch.equal(a.after, b.after) for a, b in zip(steps, ours, strict=True))
    assert values.keys() == mine.keys()
    assert all(type(value) is torch.Tensor and torch.equal(value, values[key]) for key, value in mine.items())
    assert gathered(sharded) == []

    # Left in the middle of a block, nothing stays gathered, and the next forward is as it was.
    for site in ("double.1.img.neurons", "single.3.out", "single.3"):
        for _ in range(2):
            sink = MemorySink()
            with Recorder(sharded, [site], sink, steps=[0], stop_early=True):
                assert list(until_recorded(denoise(sharded, *inputs, TIMESTEPS, 2.5))) == []
            with Recorder(whole, [site]) as recorder, torch.no_grad():
                list(denoise(whole, *inputs, TIMESTEPS, 2.5))
            assert torch.equal(sink.read(site, 0), recorder.sink.read(site, 0))
            assert gathered(sharded) == []
    assert all(torch.equal(value, values[key]) for key, value in recorded(sharded, inputs)[1].items())

    # A state that is not finite is an error that needs no other rank.
    with pytest.raises(FluxIRError, match="cannot compute beside itself"):
        sharded.twin()
    spoilt = {Site.parse("single.1"): lambda value, step: value * torch.inf}
    with Intervention(sharded, spoilt), pytest.raises(StateNotFiniteError, match="the other ranks do not compute it"):
        list(denoise(sharded, *inputs, TIMESTEPS, 2.5))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as job:
        check(job)
        wait_for_all(job)
