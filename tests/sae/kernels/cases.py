"""One training step by a path and by the reference, compared: shared by the CPU's tests and those of the GPU."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.sae.kernels import reference
from flux_ir.sae.kernels.reference import AdamStep


class Case(NamedTuple):
    """Sizes of a step: `tokens` of width `d`, `features`, `k` of them per token, `k_aux` of `dead` dead ones."""

    tokens: int
    d: int
    features: int
    k: int
    k_aux: int = 0
    dead: int = 0
    shift: float = 0.0  # of the encoder's bias: far below 0, few pre-activations are positive


CASES = [
    Case(tokens=13, d=24, features=3000, k=3),  # sparse products
    Case(tokens=13, d=24, features=60, k=7),  # dense ones
    Case(tokens=5, d=8, features=12, k=12),  # k = F
    Case(tokens=9, d=8, features=700, k=1),
    Case(tokens=1, d=8, features=700, k=2),
    Case(tokens=13, d=24, features=800, k=4, shift=-2.5),  # rows with fewer than k positive values
    Case(tokens=13, d=24, features=800, k=4, k_aux=8, dead=300),
    Case(tokens=13, d=24, features=800, k=4, k_aux=8, dead=5),  # fewer dead features than k_aux
    Case(tokens=13, d=24, features=800, k=4, k_aux=8, dead=0),
]


class Step(NamedTuple):
    x_hat: Tensor
    z: Tensor
    gradients: dict[str, Tensor]


def parameters(case: Case, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights, unit decoder rows, tokens and a mask of dead features whose pre-activations are all negative."""
    draw = torch.Generator().manual_seed(case.features + case.k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    decoder = torch.nn.functional.normalize(normal(case.features, case.d), dim=1)
    found = {"x": normal(case.tokens, case.d) + 1, "encoder": decoder + 0.1 * normal(case.features, case.d)}
    found |= {"b_enc": 0.1 * normal(case.features) + case.shift, "decoder": decoder, "b_dec": 0.5 * normal(case.d)}
    found["dead"] = torch.zeros(case.features, dtype=torch.bool)
    found["dead"][torch.randperm(case.features, generator=draw)[: case.dead]] = True
    found["b_enc"][found["dead"]] -= 50
    return found


def step(path: ModuleType, case: Case, given: dict[str, Tensor], *, with_x: bool = False) -> Step:
    """Loss and gradients of TopK with an auxiliary loss, made by `path`."""
    names = ["encoder", "b_enc", "decoder", "b_dec", *(["x"] if with_x else [])]
    own = {name: value.detach().clone() for name, value in given.items()}
    for name in names:
        own[name].requires_grad_()
    code = path.encode_top_k(
        own["x"],
        own["encoder"],
        own["b_enc"],
        case.k,
        b_dec=own["b_dec"],
        dead=own["dead"] if case.k_aux else None,
        k_aux=case.k_aux,
    )
    x_hat = path.sparse_decode(code.values, code.indices, own["decoder"], own["b_dec"])
    residual = (own["x"] - x_hat).detach()
    loss = (x_hat - own["x"].detach()).square().sum()
    if code.aux_values is not None:
        explained = path.sparse_decode(code.aux_values, code.aux_indices, own["decoder"], None)
        loss = loss + 0.3 * (explained - residual).square().sum()
    loss.backward()
    z = torch.zeros(case.tokens, case.features, dtype=x_hat.dtype).to(x_hat.device)
    z.scatter_add_(1, code.indices, code.values.detach())
    return Step(x_hat.detach(), z, {name: own[name].grad for name in names})


def assert_same_step(path: ModuleType, case: Case, *, with_x: bool = False, tolerance: float = 2e-5) -> None:
    """Codes, reconstructions and every gradient of `path` are the reference's."""
    given = parameters(case)
    got, expected = step(path, case, given, with_x=with_x), step(reference, case, given, with_x=with_x)
    torch.testing.assert_close(got.z, expected.z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.x_hat, expected.x_hat, rtol=tolerance, atol=tolerance)
    for name, gradient in expected.gradients.items():
        size = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(got.gradients[name] / size, gradient / size, rtol=tolerance, atol=tolerance)


def adam_matrices(rows: int, d: int) -> tuple[Tensor, list[Tensor]]:
    """A matrix of unit rows and three gradients for it."""
    draw = torch.Generator().manual_seed(rows)
    weight = torch.nn.functional.normalize(torch.randn(rows, d, generator=draw), dim=1)
    return weight, [torch.randn(rows, d, generator=draw) for _ in range(3)]


def assert_adam_is_pytorchs(path: ModuleType, *, unit_rows: bool, scale: float | None, rows: int = 37) -> None:
    """Three steps of `adam_rows_`: torch.optim.Adam between a projection and a division by the rows' length."""
    weight, gradients = adam_matrices(rows, 20)
    theirs = weight.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.99), eps=1e-7)
    ours, first, second = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    bf16_copy = torch.empty_like(weight, dtype=torch.bfloat16)
    for number, gradient in enumerate(gradients, start=1):
        own = gradient * (1 if scale is None else scale)
        parallel = (own * theirs.detach()).sum(1, keepdim=True) * theirs.detach()
        theirs.grad = own - parallel if unit_rows else own
        adam.step()
        if unit_rows:
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)
        path.adam_rows_(
            ours,
            gradient.clone(),
            first,
            second,
            AdamStep(number, 0.01, (0.8, 0.99), 1e-7, unit_rows, None if scale is None else torch.tensor(scale)),
            bf16_copy=bf16_copy,
        )
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, adam.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bf16_copy.float(), ours, rtol=2**-7, atol=0)  # Triton's interpreter rounds towards 0
