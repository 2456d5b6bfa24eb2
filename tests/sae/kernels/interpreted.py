"""Runs the GPU's path on a CPU, with Triton interpreting the kernels: a process of its own, started by `test_gpu`.

Triton decides how its functions run when it is first imported, and the tests' process may have imported it before.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from flux_ir.sae.kernels import gpu, reference
from tests.sae.kernels.cases import CASES, Case, assert_adam_is_pytorchs, assert_same_step, parameters, step

WITH_X = 6  # the case in which tokens, too, require gradients


def main() -> None:
    """Every path of `gpu` against the reference: the first failure ends the process with its traceback."""
    gpu.DENSE_BELOW = 1 << 30  # dense products everywhere
    for number, case in enumerate(CASES):
        assert_same_step(gpu, case, with_x=number == WITH_X)
    gpu.DENSE_BELOW = 0  # gathers: one interpreted program per feature, so few features
    for number, case in enumerate(CASES):
        small = case._replace(features=min(case.features, 40), tokens=7, dead=min(case.dead, 20))
        assert_same_step(gpu, small, with_x=number == WITH_X)
    assert_same_step(gpu, Case(tokens=3, d=700, features=9, k=3))  # more columns than one program has
    assert_same_step(gpu, Case(tokens=60, d=4, features=5, k=2))  # more entries than a program takes at once
    gpu.DENSE_BELOW, gpu.CHUNK_ENTRIES = 184, 1
    assert_same_step(gpu, Case(tokens=1100, d=4, features=16, k=1))  # two chunks
    gpu.DENSE_BELOW = 0
    assert_same_bits()
    assert_bf16_copies_are_used()
    for unit_rows in (False, True):
        for scale in (None, 0.3):
            assert_adam_is_pytorchs(gpu, unit_rows=unit_rows, scale=scale, rows=5)
    print("as the reference")


def assert_same_bits() -> None:
    """A step made twice has the same gradients, the index of its entries being made once."""
    case = Case(tokens=20, d=6, features=50, k=3)
    one, two = (step(gpu, case, parameters(case)).gradients for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_bf16_copies_are_used() -> None:
    """With a bfloat16 copy the results are near the reference's, and float32."""
    case = Case(tokens=20, d=24, features=50, k=3)
    given = parameters(case)
    code = reference.encode_top_k(given["x"], given["encoder"], given["b_enc"], case.k)
    values, decoder = code.values.requires_grad_(), given["decoder"].requires_grad_()
    x_hat = gpu.sparse_decode(values, code.indices, decoder, None, bf16_copy=decoder.detach().bfloat16())
    x_hat.square().sum().backward()
    got = x_hat.detach(), values.grad, decoder.grad
    values.grad = decoder.grad = None
    exact = reference.sparse_decode(values, code.indices, decoder, None)
    exact.square().sum().backward()
    for one, other in zip(got, (exact.detach(), values.grad, decoder.grad), strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.02 * other.norm()


if __name__ == "__main__":
    main()
