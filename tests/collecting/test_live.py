"""Live blocks are those of a collection of the same settings, bit for bit, whatever batch they are made in."""

import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.live import live_blocks
from flux_ir.collecting.recipe import Recipe
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.sites import Site
from flux_ir.threads import ahead
from tests.collecting.small_jobs import collected

PROMPTS = ["a red circle", "a small blue square", "a red circle", "a large green triangle on a white background"]
SITES = tuple(map(Site.parse, ("double.0.img", "double.1.txt", "single.1", "single.2.img.neurons")))


@pytest.fixture(scope="module")
def suite():
    spec = get_spec("flux-tiny")
    with pytest.MonkeyPatch.context() as patch:
        for variable in (*spec.transformer_env, *spec.autoencoder_env):
            patch.delenv(variable, raising=False)
        return Suite(spec, locate_model(spec), plan(0), torch.bfloat16)


def settings_of(dtype=torch.bfloat16, tokens_per_image=None, repeats=1, batch_size=3, prompts=PROMPTS):
    recipe = Recipe(
        spec=get_spec("flux-tiny"),
        width=64,
        height=48,
        num_steps=2,
        guidance=2.5,
        sites=SITES,
        steps=(0, 1),
        stored_dtype=dtype,
        network_dtype=torch.bfloat16,
        tokens_per_image=tokens_per_image,
    )
    return CollectSettings(recipe, prompts, repeats=repeats, seed=7, batch_size=batch_size)


def as_bytes(value):
    return None if value is None else value.contiguous().view(torch.uint8)


def assert_same(block, stored):
    for name, one, other in zip(block._fields, block, stored, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, name
            assert torch.equal(as_bytes(one), as_bytes(other)), name
        else:
            assert one == other, name


@pytest.mark.parametrize(
    ("dtype", "tokens_per_image"),
    [(torch.bfloat16, None), (torch.bfloat16, 5), (torch.float8_e4m3fn, 5), (torch.float16, None)],
)
def test_live_blocks_are_those_of_a_collection_bit_for_bit(suite, tmp_path, dtype, tokens_per_image):
    settings = settings_of(dtype, tokens_per_image)
    collected(tmp_path, settings, suite)
    source = open_source(tmp_path)
    expected = [
        source.read(generation, site, step)
        for generation in range(len(PROMPTS))
        for step in source.steps
        for site in source.sites
    ]
    with ahead(lambda: live_blocks(settings, suite), capacity=10**6, size=lambda block: block.nbytes) as blocks:
        live = list(blocks)
    assert len(live) == len(expected) == len(PROMPTS) * 2 * len(SITES)
    for block, stored in zip(live, expected, strict=True):
        assert_same(block, stored)


def test_a_stream_may_begin_anywhere_and_has_the_same_bits(suite):
    settings = settings_of(repeats=18, prompts=PROMPTS[:4])  # 72 generations: one whole group and part of another
    whole = list(live_blocks(settings, suite, start=59))
    per_generation = 2 * len(SITES)
    assert len(whole) == 13 * per_generation
    later = list(live_blocks(settings, suite, start=65))
    assert len(later) == 7 * per_generation
    for block, same in zip(later, whole[6 * per_generation :], strict=True):
        assert_same(block, same)


def test_ranks_share_the_groups(suite):
    settings = settings_of(repeats=33, prompts=PROMPTS[:2])  # 66 generations: groups of 64 and 2
    second = {block.generation for block in live_blocks(settings, suite, ranks=Ranks(1, 2))}
    assert second == {block.generation for block in live_blocks(settings, suite, start=64)}
    assert len(second) == 2


def test_every_iterator_of_a_stream_begins_anew_and_leaves_no_hook(suite):
    found = []
    for _ in range(2):
        with ahead(
            lambda: live_blocks(settings_of(), suite), capacity=10**6, size=lambda block: block.nbytes
        ) as blocks:
            found.append(next(blocks))
    assert_same(*found)
    with suite.transformer() as model:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_waiting_block_keeps_no_batch_in_memory(suite):
    for block in live_blocks(settings_of(), suite):
        assert block.values.untyped_storage().nbytes() == block.values.nbytes


def test_values_that_are_not_finite_are_never_handed_on(suite):
    with suite.transformer() as model:
        weight = model.double_blocks[0].img_mlp[2].weight
        before = weight[5, 5].item()
        weight.data[5, 5] = float("inf")
        try:
            with pytest.raises(FluxIRError, match=r"not finite after step 0: .* double\.0\.img"):
                next(live_blocks(settings_of(), suite))
        finally:
            weight.data[5, 5] = before
