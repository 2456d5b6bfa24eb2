"""Rotary positions and norms: what must hold for any positions and any dtype."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_ir.models.flux1.attention import (
    Attention,
    RMSNorm,
    attend,
    attention_backend,
    attention_kernels,
    kernel_of,
    rotary_table,
    rotate,
    use_kernel,
)
from flux_ir.models.split import split
from flux_ir.models.streamed_flux import StreamedFlux

AXES_DIM, THETA = (4, 6, 6), 10_000
offsets = st.tuples(*[st.integers(-200, 200)] * 3)


def grid_ids(rows: int, columns: int) -> torch.Tensor:
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(1, -1, 3)


def heads(seed: int, tokens: int = 12) -> torch.Tensor:
    return torch.randn(1, 4, tokens, sum(AXES_DIM), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(offset=offsets)
def test_attention_sees_only_differences_of_positions(offset):
    q, k, v = heads(0), heads(1), heads(2)
    ids = grid_ids(4, 3)
    here = Attention()(q, k, v, rotary_table(ids, AXES_DIM, THETA))
    there = Attention()(q, k, v, rotary_table(ids + torch.tensor(offset), AXES_DIM, THETA))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)


def test_attention_does_see_differences_of_positions():
    q, k, v = heads(0), heads(1), heads(2)
    grid = Attention()(q, k, v, rotary_table(grid_ids(4, 3), AXES_DIM, THETA))
    transposed = Attention()(q, k, v, rotary_table(grid_ids(3, 4), AXES_DIM, THETA))
    assert (grid - transposed).abs().max() > 1e-2


def test_rotation_at_the_origin_changes_nothing():
    x = heads(0)
    assert torch.equal(rotate(x, rotary_table(torch.zeros(1, 12, 3), AXES_DIM, THETA)), x)


def test_rotation_keeps_the_length_of_every_head():
    x = heads(0)
    turned = rotate(x, rotary_table(grid_ids(4, 3) * 17, AXES_DIM, THETA))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotation_is_computed_in_float32_whatever_the_dtype():
    rotation = rotary_table(grid_ids(4, 3).bfloat16() + 256, AXES_DIM, THETA)
    assert rotation.dtype == torch.complex64
    assert rotate(heads(0).bfloat16(), rotation).dtype == torch.bfloat16


def test_rms_norm_normalises_in_float32_before_it_scales_in_bf16():
    norm = RMSNorm(16).bfloat16()
    norm.scale.data.fill_(1.5)
    x = heads(3).bfloat16() * 300
    x32 = x.float()
    unit = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), unit.bfloat16() * torch.tensor(1.5, dtype=torch.bfloat16))


def test_the_kernel_that_runs_is_told():
    assert attention_backend(4, 32, "cpu", torch.float32) == "flash_attention"
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_backend(4, 32, "cpu", torch.bfloat16) == "math"
    assert attention_backend(4, 32, "cpu", torch.float32, "math") == "math"
    assert attention_backend(4, 32, "cpu", torch.float32, "flash") == "flash_attention"


KERNELS = [
    ("flash", SDPBackend.FLASH_ATTENTION),
    ("math", SDPBackend.MATH),
    pytest.param(("efficient", SDPBackend.EFFICIENT_ATTENTION), marks=pytest.mark.gpu),
    pytest.param(("cudnn", SDPBackend.CUDNN_ATTENTION), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_named_has_the_bits_and_gradients_of_pytorchs_switch(kernel, dtype):
    (word, backend), device = kernel, "cuda" if kernel[0] in ("efficient", "cudnn") else "cpu"
    if word == "cudnn" and dtype == torch.float32:
        pytest.skip("cuDNN attends in half precision alone")
    ours = [heads(seed, tokens=70).to(device, dtype).requires_grad_() for seed in range(3)]
    theirs = [value.detach().clone().requires_grad_() for value in ours]
    out = attend(*ours, word)
    with sdpa_kernel(backend):
        expected = torch.nn.functional.scaled_dot_product_attention(*theirs)
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    for value, other in zip(ours, theirs, strict=True):
        assert torch.equal(value.grad, other.grad)


def test_a_cpu_has_two_kernels_and_auto_is_one_of_them():
    for dtype in (torch.float32, torch.bfloat16):
        assert attention_kernels(4, 16, "cpu", dtype) == ["flash", "math"]
        q, k, v = (heads(seed).to(dtype) for seed in range(3))
        assert torch.equal(attend(q, k, v, "auto"), attend(q, k, v, "flash"))


def test_threads_keep_their_own_kernels(tiny_flux, tiny_inputs):
    inputs, outputs = tiny_inputs(), dict[str, list[torch.Tensor]]()
    networks = {word: use_kernel(tiny_flux(), word) for word in ("flash", "math")}
    alone = {word: network(*inputs) for word, network in networks.items()}
    assert not torch.equal(alone["flash"], alone["math"])
    torch.testing.assert_close(alone["flash"], alone["math"], rtol=1e-4, atol=1e-5)

    def run(word):
        outputs[word] = [networks[word](*inputs) for _ in range(10)]

    threads = [threading.Thread(target=run, args=[word]) for word in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for word, values in outputs.items():
        assert all(torch.equal(value, alone[word]) for value in values)


def test_twins_and_other_forms_of_a_network_attend_alike(tiny_flux, tiny_inputs):
    flux = use_kernel(tiny_flux(), "math")
    state = flux.state_dict()
    streamed = use_kernel(
        StreamedFlux(flux.params, lambda target, name: target.copy_(state[name]), "cpu", flux.dtype), "math"
    )
    halves = split(flux, ["cpu", "cpu"])
    expected = flux(*tiny_inputs())
    for network in (flux.twin(), streamed, streamed.twin(), halves, halves.twin()):
        assert kernel_of(network) == "math"
        assert torch.equal(network(*tiny_inputs()), expected)


def test_the_rotation_that_compilers_take_has_the_same_bits(monkeypatch):
    rotation = rotary_table(grid_ids(4, 3) * 17, AXES_DIM, THETA)
    x = torch.randn(1, 2, 12, sum(AXES_DIM))
    plain = [rotate(x, rotation), rotate(x.bfloat16(), rotation)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(rotate(x, rotation), plain[0])
    assert torch.equal(rotate(x.bfloat16(), rotation), plain[1])
