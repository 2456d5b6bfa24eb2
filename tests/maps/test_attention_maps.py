"""Exact attention maps against a dense softmax in float64, on small random networks with 7 x 11 image tokens."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from flux_ir.errors import FluxIRError
from flux_ir.maps.attention import (
    GROUPS,
    AttentionMapper,
    MapTargets,
    attention_and_lse,
    block_maps,
    block_names,
    high_norm,
    log_sum_exp_in_chunks,
    probabilities,
)
from flux_ir.maps.words import Word
from flux_ir.models.flux1.attention import use_kernel
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.hooks import TokenCounts
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.generate import noise_for, prepare, sample

ROWS, COLUMNS, TXT, IMG, HEADS = 7, 11, 9, 77, 4
COND = 8
TARGETS = MapTargets([Word("red", (1,)), Word("circle", (2, 3))], patches=(0, 40, 76), end=(5,), padding=(6, 7, 8))
BLOCKS = ["double.0", "double.1", "single.0", "single.2"]
TOKENS = TokenCounts(TXT, IMG, 0)


def start(model, *, batch=1, reference=False):
    draw, params = torch.Generator().manual_seed(3), model.params
    txt = torch.randn(batch, TXT, params.context_in_dim, generator=draw)
    y = torch.randn(batch, params.vec_in_dim, generator=draw)
    noise = noise_for(list(range(batch)), ROWS * 16, COLUMNS * 16, "cpu", model.dtype)
    inputs = prepare(noise, TextEmbedding(txt.to(model.dtype), y.to(model.dtype)), ROWS * 16, COLUMNS * 16)
    if reference:
        inputs = inputs.with_reference(torch.randn(1, COND, params.in_channels, generator=draw), 32, 64)
    return inputs


def walk(model, inputs):
    return [step.after for step in sample(model, inputs, [1.0, 0.6, 0.0], 3.5)]


def mapped(model, inputs, blocks=BLOCKS, **choices):
    """The states after each step, and {(step, block): maps}."""
    found = {}
    take = lambda step, block, maps: found.setdefault((step, block), maps)  # noqa: E731
    with AttentionMapper(model, blocks, TARGETS, take, **choices):
        return walk(model, inputs), found


class Inside:
    """Queries, keys and values of every block, as hooks on its kernel see them, in float64 and without the batch."""

    def __init__(self, model):
        self.values, self.step = {}, -1
        model.register_forward_pre_hook(self._next)
        for name in BLOCKS:
            kind, number = name.split(".")
            kernel = model.get_submodule(f"{kind}_blocks.{number}.attention.kernel")
            kernel.register_forward_hook(lambda module, args, output, name=name: self._take(name, args))

    def _next(self, module, args):
        self.step += 1

    def _take(self, name, args):
        self.values[self.step, name] = tuple(value[0].double() for value in args)


def dense(q, k):
    """[heads, queries, keys] in float64."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


def same(found, expected, *, rtol=0.0):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
def test_maps_are_a_dense_softmax_in_both_directions_and_kinds_of_block(tiny_flux, reference):
    model = tiny_flux()
    inputs = start(model, reference=reference)
    inside = Inside(model)
    walk(model, inputs)
    _, found = mapped(model, inputs, keep_heads=True)
    assert set(found) == set(product(range(2), BLOCKS))
    img = slice(TXT, TXT + IMG)
    for (step, block), maps in found.items():
        q, k, v = inside.values[step, block]
        whole = dense(q, k)
        assert whole.shape[-1] == TXT + IMG + COND * reference
        for number, word in enumerate(TARGETS.words):
            tokens = list(word.tokens)
            same(maps.to_words[:, number], whole[:, img, tokens].sum(dim=-1))
            same(maps.from_words[:, number], whole[:, tokens, img].mean(dim=1))
            same(maps.value_to_words[number], norms_of_what_is_given(model, block, whole[:, img, tokens], v[:, tokens]))
        same(maps.from_patches, whole[:, [TXT + patch for patch in TARGETS.patches], img])
        keys = {"words": [1, 2, 3], "other words": [0, 4], "end": [5], "padding": [6, 7, 8], "registers": []}
        keys |= {"image": list(range(TXT, TXT + IMG)), "reference": list(range(TXT + IMG, whole.shape[-1]))}
        same(maps.to_groups, torch.stack([whole[:, img][:, :, keys[group]].sum(-1) for group in GROUPS], dim=1))
        assert (maps.to_groups[:, -1] > 0.01).all() == reference
        assert not maps.registers.any()


def norms_of_what_is_given(model, block, shares, v):
    """The norm of the whole vector that each image token gets through the output projection, made as it is."""
    heads = torch.einsum("hit,hte->ihe", shares, v).flatten(1)
    if block.startswith("double"):
        weight = model.get_submodule(f"double_blocks.{block[-1]}.img_attn.proj").weight.double()
        return (heads @ weight.T).norm(dim=-1)
    weight = model.get_submodule(f"single_blocks.{block[-1]}.linear2").weight.double()
    return (F.pad(heads, (0, weight.shape[1] - heads.shape[1])) @ weight.T).norm(dim=-1)


def random_qkv(dtype=torch.float32):
    draw = torch.Generator().manual_seed(5)
    return (torch.randn(1, HEADS, TXT + IMG, 16, generator=draw).to(dtype) for _ in range(3))


def test_image_tokens_of_high_norm_are_a_group_of_their_own():
    q, k, v = random_qkv()
    tokens = torch.randn(IMG, 64, generator=torch.Generator().manual_seed(1))
    tokens[[4, 30]] *= 10
    registers = high_norm(tokens)
    assert registers.nonzero()[:, 0].tolist() == [4, 30]
    lse, output = attention_and_lse(q, k, v)[1], torch.randn(64, HEADS, 16)
    maps = block_maps(q, k, v, lse, output, TARGETS, TOKENS, registers=registers, keep_heads=True)
    whole = dense(q[0].double(), k[0].double())[:, TXT:]
    same(maps.to_groups[:, GROUPS.index("registers")], whole[:, :, [TXT + 4, TXT + 30]].sum(dim=-1))
    same(maps.to_groups.sum(dim=1), torch.ones(HEADS, IMG).double())
    assert maps.registers.nonzero()[:, 0].tolist() == [4, 30]


def test_registers_are_found_in_what_comes_into_each_block(tiny_flux):
    model = tiny_flux()
    inputs, entering = start(model), MemorySink()
    raise_one = lambda module, args, output: (grown(output[0]), output[1])  # noqa: E731
    hook = model.double_blocks[0].register_forward_hook(raise_one)
    with Recorder(model, "double.0.img, double.1.img", entering):
        walk(model, inputs)
    _, found = mapped(model, inputs)
    hook.remove()
    assert not found[0, "double.0"].registers.any()
    for step, block in product(range(2), ("double.1", "single.0")):
        before = "double.0.img" if block == "double.1" else "double.1.img"
        assert torch.equal(found[step, block].registers, high_norm(entering.read(before, step)[0]).float())
        assert found[step, block].registers.nonzero()[:, 0].tolist() == [12]


def grown(img):
    return torch.cat([img[:, :12], 100 * img[:, 12:13], img[:, 13:]], dim=1)


def test_heads_that_are_not_kept_are_their_mean():
    q, k, v = random_qkv()
    given = q, k, v, attention_and_lse(q, k, v)[1], torch.randn(64, HEADS, 16), TARGETS, TOKENS
    by_head, mean = block_maps(*given, keep_heads=True), block_maps(*given)
    assert by_head.to_words.shape == (HEADS, 2, IMG)
    assert all(torch.equal(kept, averaged) for kept, averaged in zip(by_head.mean_of_heads(), mean, strict=True))


def test_without_words_and_patches_groups_are_left():
    q, k, v = random_qkv()
    lse = attention_and_lse(q, k, v)[1]
    maps = block_maps(q, k, v, lse, torch.randn(64, HEADS, 16), MapTargets([]), TOKENS)
    assert maps.to_words.shape == maps.value_to_words.shape == maps.from_patches.shape == (0, IMG)
    same(maps.to_groups.sum(dim=0), torch.ones(IMG).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_probabilities_and_both_ways_to_the_log_sum_exp(dtype):
    q, k, v = random_qkv(dtype)
    whole = dense(q.double(), k.double())
    atol = 1e-6 if dtype == torch.float32 else 1e-4  # the kernel's products of bf16 are summed in another order
    for lse in (attention_and_lse(q, k, v)[1], log_sum_exp_in_chunks(q, k, 1000)):
        assert lse.dtype == torch.float32
        given = probabilities(q, k[:, :, 3:8], lse)
        torch.testing.assert_close(given.double(), whole[..., 3:8], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [4, 16, 128])
def test_the_kernel_that_is_asked_for_its_log_sum_exp_is_the_one_that_pytorch_calls(dtype, head_dim):
    draw = torch.Generator().manual_seed(5)
    joint = torch.randn(1, TXT + IMG, 3, HEADS, head_dim, generator=draw).to(dtype)
    q, k, v = (part.transpose(1, 2) for part in joint.unbind(dim=2))  # as single blocks have them: not contiguous
    assert torch.equal(attention_and_lse(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_both_are_the_same_too(dtype):
    q, k, v = (value.cuda() for value in random_qkv(dtype))
    out, lse = attention_and_lse(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, log_sum_exp_in_chunks(q, k), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_picture_keeps_its_bits_and_the_model_its_kernels(tiny_flux, dtype, kernel):
    model = use_kernel(tiny_flux(dtype=dtype), kernel)
    inputs = start(model)
    plain, kernels = walk(model, inputs), [block.attention.kernel for block in model.double_blocks]
    watched, _ = mapped(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert kernels == [block.attention.kernel for block in model.double_blocks]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_maps_of_edited_keys_are_those_that_the_block_computes_with(tiny_flux):
    model = tiny_flux()
    inputs = start(model)
    _, plain = mapped(model, inputs)
    hook = model.double_blocks[1].attention.keys.register_forward_hook(lambda module, args, k: 0 * k)
    _, edited = mapped(model, inputs)
    hook.remove()
    assert torch.equal(edited[0, "double.0"].to_words, plain[0, "double.0"].to_words)
    same(edited[0, "double.1"].to_words[0], torch.full((IMG,), 1 / (TXT + IMG)).double())


def test_chosen_steps_alone_are_mapped(tiny_flux):
    model = tiny_flux()
    _, found = mapped(model, start(model), ["single.1"], steps=[1])
    assert set(found) == {(1, "single.1")}


def test_a_hook_hangs_inside_of_mapped_blocks_so_that_compiled_ones_run_as_written(tiny_flux):
    model = tiny_flux()
    with AttentionMapper(model, BLOCKS, TARGETS, lambda *_: None):
        assert model.double_blocks[0].attention._forward_hooks
        assert not model.single_blocks[1].attention._forward_hooks
        walk(model, start(model))


def test_streamed_blocks_have_the_same_maps(tiny_flux):
    model = tiny_flux()
    weights = model.state_dict()
    streamed = StreamedFlux(model.params, lambda target, name: target.copy_(weights[name]), "cpu", torch.float32)
    states, found = mapped(model, start(model))
    again, of_streamed = mapped(streamed, start(model))
    assert all(torch.equal(one, two) for one, two in zip(states, again, strict=True))
    for key, maps in found.items():
        assert all(torch.equal(one, two) for one, two in zip(maps, of_streamed[key], strict=True))


def test_a_second_mapper_inside_the_first_is_told(tiny_flux):
    model = tiny_flux()
    with (
        pytest.raises(FluxIRError, match=r"did not come to double\.0\.k"),
        AttentionMapper(model, ["double.0"], TARGETS, lambda *_: None),
        AttentionMapper(model, ["double.0"], TARGETS, lambda *_: None),
    ):
        walk(model, start(model))


def test_several_pictures_together_are_refused(tiny_flux):
    model = tiny_flux()
    with pytest.raises(FluxIRError, match=r"one picture at a time: got 2 .*sample prompts one by one"):
        mapped(model, start(model, batch=2))


def test_blocks_are_chosen_by_patterns_and_one_that_is_not_there_is_refused():
    assert block_names(None, 1, 2) == ["double.0", "single.0", "single.1"]
    assert block_names(["single.*", "double.0"], 1, 2) == ["double.0", "single.0", "single.1"]
    with pytest.raises(FluxIRError, match=r"has 4 double and 8 single blocks, and none matches 'double\.7'.*double\.3"):
        block_names(["double.7"], 4, 8)
