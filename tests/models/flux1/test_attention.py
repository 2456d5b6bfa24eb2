"""Rotary positions and norms: what must hold for any positions and any dtype."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_ir.models.flux1.attention import Attention, RMSNorm, attention_backend, rotary_table, rotate

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


def test_the_rotation_that_compilers_take_has_the_same_bits(monkeypatch):
    rotation = rotary_table(grid_ids(4, 3) * 17, AXES_DIM, THETA)
    x = torch.randn(1, 2, 12, sum(AXES_DIM))
    plain = [rotate(x, rotation), rotate(x.bfloat16(), rotation)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(rotate(x, rotation), plain[0])
    assert torch.equal(rotate(x.bfloat16(), rotation), plain[1])
