"""Held-out data: whole prompts, always the same ones, and at least one on each side."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.activations.blocks import Generation
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.splits import Split, split_prompts, split_source
from flux_ir.sites import Site


class Prompts:
    """A source of which only the prompts count."""

    steps, model, identity, runs = (0,), None, "", ()

    def __init__(self, prompts, tokens=64):
        self.generations = [Generation(f"{i:016x}", prompt, None) for i, prompt in enumerate(prompts)]
        self.sites, self._tokens = [Site.parse("double.0.img")], tokens

    def d(self, site):
        return 4

    def tokens(self, site):
        return self._tokens

    def read(self, generation, site, step):
        raise AssertionError("a split needs no tokens")

    read_run = read


def held_out(split, source):
    return [one.prompt for one in source.generations if split.has("held_out", one.id, one.prompt)]


@settings(max_examples=200, deadline=None)
@given(prompts=st.lists(st.text(min_size=1), min_size=2, unique=True), share=st.floats(0.001, 0.999))
def test_there_is_at_least_one_prompt_on_each_side(prompts, share):
    split = split_prompts(prompts, share)
    held = [prompt for prompt in prompts if split.has("held_out", "", prompt)]
    assert 0 < len(held) < len(prompts)
    assert all(split.has("training", "", prompt) != (prompt in held) for prompt in prompts)


def test_about_the_share_asked_for_is_held_out():
    prompts = [f"prompt {i}" for i in range(5000)]
    assert 0.09 < len(held_out(split_prompts(prompts, 0.1), Prompts(prompts))) / 5000 < 0.11


def test_all_repeats_of_a_prompt_are_on_one_side():
    source = Prompts([f"prompt {i % 10}" for i in range(40)])
    held = held_out(split_source(source, 0.3), source)
    assert len(held) == 4 * len(set(held))
    assert held


def test_a_prompt_stays_on_its_side_when_others_are_added():
    few, many = ([f"prompt {i}" for i in range(count)] for count in (100, 300))
    split, later = split_prompts(few, 0.2), split_prompts(many, 0.2)
    assert all(split.has("held_out", "", prompt) == later.has("held_out", "", prompt) for prompt in few)


def test_nothing_is_held_out_where_nothing_is_asked_for():
    source = Prompts(["a", "b", "c"])
    split = split_source(source, 0.0)
    assert held_out(split, source) == []
    assert split.note == "nothing is held out"


def test_several_images_of_one_prompt_are_split_by_image():
    source = Prompts(["the same"] * 20)
    split = split_source(source, 0.3)
    assert split.by == "image"
    assert 0 < len(held_out(split, source)) < 20
    assert "do not show new prompts" in split.note


@pytest.mark.parametrize("tokens", [12, 64, 4096])
def test_one_image_is_split_by_runs_of_neighbouring_tokens(tokens):
    source = Prompts(["alone"], tokens)
    split = split_source(source, 0.3)
    name = source.generations[0].id
    positions = torch.arange(tokens, dtype=torch.int32)
    held, trained = (split.tokens(side, name, positions) for side in ("held_out", "training"))
    assert split.has("held_out", name, "alone")
    assert split.has("training", name, "alone")
    assert held.any()
    assert not held.all()
    assert torch.equal(held, ~trained)
    runs = held[: tokens // split.run_tokens * split.run_tokens].view(-1, split.run_tokens)
    assert all(run.all() or not run.any() for run in runs)
    assert "neither new prompts nor new images" in split.note
    # the same places, whichever of them were kept and in whatever order
    some = positions[torch.randperm(tokens)[: tokens // 2]]
    assert torch.equal(split.tokens("held_out", name, some), held[some.long()])


def test_other_splits_take_all_tokens_of_a_generation():
    assert Split("prompt", 0.5).tokens("training", "0", torch.arange(4)) is None


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(FluxIRError, match=r"must be in \[0, 1\)"):
        split_prompts(["a", "b"], share)
