"""Exact attention maps against a dense softmax in float64, on small random networks with 7 x 11 image tokens."""

from itertools import product

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.maps.attention import (
    GROUPS,
    AttentionSink,
    MapTargets,
    attention_sites,
    block_maps,
    block_names,
    key_probabilities,
    log_sum_exp,
    log_sum_exp_in_chunks,
    query_probabilities,
)
from flux_ir.maps.words import Word
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.generate import noise_for, prepare, sample

ROWS, COLUMNS, TXT, IMG, HEADS = 7, 11, 9, 77, 4
TARGETS = MapTargets([Word("red", (1,)), Word("circle", (2, 3))], patches=(0, 40, 76), end=(5,), padding=(6, 7, 8))
BLOCKS = ["double.0", "double.1", "single.0", "single.2"]


def start(model, *, batch=1, reference=False):
    draw, params = torch.Generator().manual_seed(3), model.params
    txt = torch.randn(batch, TXT, params.context_in_dim, generator=draw)
    y = torch.randn(batch, params.vec_in_dim, generator=draw)
    noise = noise_for(list(range(batch)), ROWS * 16, COLUMNS * 16, "cpu", model.dtype)
    inputs = prepare(noise, TextEmbedding(txt.to(model.dtype), y.to(model.dtype)), ROWS * 16, COLUMNS * 16)
    if reference:
        inputs = inputs.with_reference(torch.randn(1, 8, params.in_channels, generator=draw), 32, 64)
    return inputs


def walk(model, inputs, sites, sink):
    with Recorder(model, sites, sink):
        return [step.after for step in sample(model, inputs, [1.0, 0.6, 0.0], 3.5)]


def dense(sink, step, block, *, cond=False):
    """[heads, queries, keys] in float64, from the recorded queries and keys."""
    q, k = (sink.read(f"{block}.{part}", step).double() for part in "qk")
    if cond:
        k = torch.cat([k, sink.read(f"{block}.cond.k", step).double()], dim=1)
    q, k = (x[0].unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


@pytest.mark.parametrize("reference", [False, True])
def test_maps_are_a_dense_softmax_in_both_directions_and_kinds_of_block(tiny_flux, reference):
    model = tiny_flux()
    inputs, sites = start(model, reference=reference), attention_sites(BLOCKS, cond=reference)
    plain, found = MemorySink(), {}
    walk(model, inputs, sites, plain)
    take = lambda step, block, maps: found.setdefault((step, block), maps)  # noqa: E731
    walk(model, inputs, sites, AttentionSink(HEADS, TARGETS, take, keep_heads=True))
    assert set(found) == set(product(range(2), BLOCKS))
    for (step, block), maps in found.items():
        whole = dense(plain, step, block, cond=reference)
        img = slice(TXT, TXT + IMG)
        for number, word in enumerate(TARGETS.words):
            tokens = list(word.tokens)
            same(maps.to_words[:, number], whole[:, img, tokens].sum(dim=-1))
            same(maps.from_words[:, number], whole[:, tokens, img].mean(dim=1))
        same(maps.from_patches, whole[:, [TXT + patch for patch in TARGETS.patches], img])
        keys = {"words": [1, 2, 3], "other words": [0, 4], "end": [5], "padding": [6, 7, 8]}
        keys |= {"image": list(range(TXT, TXT + IMG)), "reference": list(range(TXT + IMG, whole.shape[-1]))}
        same(maps.mass, torch.stack([whole[:, img][:, :, keys[group]].sum(-1).mean(-1) for group in GROUPS], dim=1))
        assert (maps.mass[:, -1] > 0.01).all() == reference


def same(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_heads_that_are_not_kept_are_their_mean(tiny_flux):
    q, k = (torch.randn(1, HEADS, TXT + IMG, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    by_head, mean = block_maps(q, k, TARGETS, TXT, keep_heads=True), block_maps(q, k, TARGETS, TXT)
    for kept, averaged in zip(by_head, mean, strict=True):
        assert torch.equal(kept.mean(dim=0), averaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_probabilities_and_both_ways_to_the_log_sum_exp(dtype):
    draw = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, HEADS, 90, 16, generator=draw).to(dtype) for _ in range(2))
    whole = (q.double() @ k.double().mT / 4).softmax(dim=-1)
    atol = 1e-6 if dtype == torch.float32 else 1e-4  # the kernel's products of bf16 are summed in another order
    for lse in (log_sum_exp(q, k), log_sum_exp_in_chunks(q, k, 1000)):
        given = key_probabilities(q, k[:, :, 3:8], lse)
        torch.testing.assert_close(given.double(), whole[..., 3:8], rtol=0, atol=atol)
    torch.testing.assert_close(query_probabilities(q[:, :, 3:8], k).double(), whole[:, :, 3:8], rtol=0, atol=1e-6)


def test_the_picture_keeps_its_bits(tiny_flux):
    model = tiny_flux(dtype=torch.bfloat16)
    inputs = start(model)
    plain = [step.after for step in sample(model, inputs, [1.0, 0.6, 0.0], 3.5)]
    watched = walk(model, inputs, attention_sites(BLOCKS), AttentionSink(HEADS, TARGETS, lambda *maps: None))
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def test_several_pictures_together_are_refused(tiny_flux):
    model = tiny_flux()
    with pytest.raises(FluxIRError, match=r"one picture at a time: got 2 .*sample prompts one by one"):
        walk(model, start(model, batch=2), attention_sites(BLOCKS), AttentionSink(HEADS, TARGETS, lambda *maps: None))


def test_blocks_are_chosen_by_patterns_and_one_that_is_not_there_is_refused():
    assert block_names(None, 1, 2) == ["double.0", "single.0", "single.1"]
    assert block_names(["single.*", "double.0"], 1, 2) == ["double.0", "single.0", "single.1"]
    with pytest.raises(FluxIRError, match=r"has 4 double and 8 single blocks, and none matches 'double\.7'.*double\.3"):
        block_names(["double.7"], 4, 8)
