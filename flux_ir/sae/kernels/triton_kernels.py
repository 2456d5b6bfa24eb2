# ruff: noqa: ANN001, ANN201 (Triton reads the annotations of kernels as its own)
"""The kernels that `gpu` launches, in Triton: sums are float32 whatever the operands are. Matrices are contiguous."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def weighted_rows_kernel(values, indices, weight, bias, out, d, k, has_bias: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[token] = sum over entries of value * weight[index] (+ bias), `width` columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    inside = columns < d
    total = tl.zeros([width], dtype=tl.float32)
    if has_bias:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for entry in range(k):
        value = tl.load(values + token * k + entry).to(tl.float32)
        row = tl.load(indices + token * k + entry)
        total += value * tl.load(weight + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * d + columns, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def row_products_kernel(vectors, indices, weight, out, d, k, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[token, entry] = <vectors[token], weight[index]>; the token's vector stays in registers (width >= d)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, width)
    inside = columns < d
    vector = tl.load(vectors + token * d + columns, mask=inside, other=0.0).to(tl.float32)
    for entry in range(k):
        row = tl.load(indices + token * k + entry)
        other = tl.load(weight + row * d + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * k + entry, tl.sum(vector * other, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def rows_gradient_kernel(  # type: ignore[no-untyped-def]
    values,
    order,
    starts,
    vectors,
    out,
    sums,
    d,
    k,
    width: tl.constexpr,
    at_once: tl.constexpr,
):
    """out[feature] = sum over the feature's entries of value * vectors[token]; sums[feature] = sum of the values."""
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    inside = columns < d
    start = tl.load(starts + feature)
    end = tl.load(starts + feature + 1)
    total = tl.zeros([width], dtype=tl.float32)
    total_value = tl.zeros([at_once], dtype=tl.float32)
    for first in range(start, end, at_once):
        places = first + tl.arange(0, at_once)
        present = places < end
        entry = tl.load(order + places, mask=present, other=0)
        value = tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
        where = (entry // k)[:, None] * d + columns[None, :]
        block = tl.load(vectors + where, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * block, axis=0)
        total_value += value
    tl.store(out + feature * d + columns, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sums + feature, tl.sum(total_value, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def adam_kernel(  # type: ignore[no-untyped-def]
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    shadow,
    scale,
    d,
    step_size,
    beta1,
    beta2,
    root_correction,
    eps,
    has_scale: tl.constexpr,
    unit_rows: tl.constexpr,
    has_shadow: tl.constexpr,
    width: tl.constexpr,
):
    """One row: project, Adam, back to length 1, round into the shadow. Everything is read and written once."""
    columns = tl.arange(0, width)
    inside = columns < d
    place = tl.program_id(0).to(tl.int64) * d + columns
    w = tl.load(weight + place, mask=inside, other=0.0)
    g = tl.load(gradient + place, mask=inside, other=0.0)
    if has_scale:
        g *= tl.load(scale)
    if unit_rows:
        g -= tl.sum(g * w, axis=0) * w
    m = tl.load(exp_avg + place, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w -= step_size * m / (tl.sqrt(v) / root_correction + eps)
    if unit_rows:
        w /= tl.sqrt(tl.sum(w * w, axis=0))
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    tl.store(weight + place, w, mask=inside)
    if has_shadow:
        tl.store(shadow + place, w, mask=inside)
