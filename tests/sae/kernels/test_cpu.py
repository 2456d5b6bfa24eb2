"""The CPU's path against the reference and against finite differences; Adam against PyTorch's."""

import pytest
import torch

from flux_ir.sae.kernels import cpu, reference
from flux_ir.sae.kernels.reference import AdamStep
from tests.sae.kernels.cases import CASES, Case, assert_adam_is_pytorchs, assert_same_step, parameters, step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_that_of_the_reference(case):
    assert_same_step(cpu, case)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_tokens_get_gradients_where_they_require_them(case):
    assert_same_step(cpu, case, with_x=True)


def test_many_chunks_of_tokens_and_of_features_are_one_step(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_ENTRIES", 1)
    monkeypatch.setattr(cpu, "FEATURES_AT_ONCE", 100)
    assert_same_step(cpu, Case(tokens=300, d=6, features=2050, k=2, k_aux=3, dead=40))


def test_a_bf16_copy_changes_numbers_by_no_more_than_its_rounding():
    given = parameters(Case(tokens=50, d=24, features=2000, k=5))
    code = reference.encode_top_k(given["x"], given["encoder"], given["b_enc"], 5, b_dec=given["b_dec"])
    rounded = given["encoder"].bfloat16()
    close = cpu.encode_top_k(given["x"], given["encoder"], given["b_enc"], 5, b_dec=given["b_dec"], bf16_copy=rounded)
    assert close.values.dtype == torch.float32
    torch.testing.assert_close(close.values.sort(1).values, code.values.sort(1).values, rtol=0.02, atol=0.02)
    x_hat = cpu.sparse_decode(code.values, code.indices, given["decoder"], None, bf16_copy=given["decoder"].bfloat16())
    exact = reference.sparse_decode(code.values, code.indices, given["decoder"], None)
    assert x_hat.dtype == torch.float32
    assert (x_hat - exact).norm() < 0.01 * exact.norm()


def test_gradients_with_bf16_copies_are_float32_and_close():
    given = parameters(Case(tokens=64, d=24, features=2000, k=5))
    encoder, b_enc = given["encoder"].requires_grad_(), given["b_enc"].requires_grad_()
    code = cpu.encode_top_k(given["x"], encoder, b_enc, 5, bf16_copy=encoder.detach().bfloat16())
    into = torch.randn_like(code.values)
    (code.values * into).sum().backward()
    z = torch.zeros(64, 2000).scatter(1, code.indices, into * (code.values > 0))
    _assert_near(encoder.grad, z.T @ given["x"])
    _assert_near(b_enc.grad, z.sum(0))

    outcomes = []
    for path, bf16_copy in ((cpu, given["decoder"].bfloat16()), (reference, None)):
        values, decoder = (one.detach().clone().requires_grad_() for one in (code.values, given["decoder"]))
        x_hat = path.sparse_decode(values, code.indices, decoder, None, bf16_copy=bf16_copy)
        (x_hat * given["x"]).sum().backward()
        outcomes.append((values.grad, decoder.grad))
    for got, expected in zip(*outcomes, strict=True):
        _assert_near(got, expected)


def _assert_near(got, expected):
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("features", [20, 400])
def test_gradients_are_those_of_finite_differences(features):
    case = Case(tokens=4, d=5, features=features, k=3, k_aux=2, dead=6)
    given = parameters(case, dtype=torch.float64)

    def encode(x, encoder, b_enc, b_dec):
        code = cpu.encode_top_k(x, encoder, b_enc, case.k, b_dec=b_dec, dead=given["dead"], k_aux=2)
        return code.values, code.aux_values

    inputs = [given[name].clone().requires_grad_() for name in ("x", "encoder", "b_enc", "b_dec")]
    assert torch.autograd.gradcheck(encode, inputs)
    indices = torch.stack([torch.randperm(features)[:3] for _ in range(4)])
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    decoder, b_dec = given["decoder"].clone().requires_grad_(), given["b_dec"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w, b: cpu.sparse_decode(v, indices, w, b), (values, decoder, b_dec))


@pytest.mark.parametrize("features", [9, 500])
def test_a_feature_named_twice_in_a_token_counts_twice(features):
    indices = torch.tensor([[3, 3, 5], [5, 3, 3]])
    values, decoder = torch.randn(2, 3), torch.randn(features, 7)
    outcomes = []
    for path in (cpu, reference):
        v, w = values.clone().requires_grad_(), decoder.clone().requires_grad_()
        x_hat = path.sparse_decode(v, indices, w, None)
        (x_hat * torch.arange(14.0).view(2, 7)).sum().backward()
        outcomes.append((x_hat, v.grad, w.grad))
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected)


def test_dead_features_learn_from_negative_pre_activations():
    case = Case(tokens=13, d=24, features=800, k=4, k_aux=8, dead=30)
    given = parameters(case)
    code = cpu.encode_top_k(given["x"], given["encoder"], given["b_enc"], 4, dead=given["dead"], k_aux=8)
    assert code.aux_values.max() < 0
    assert given["dead"][code.aux_indices].all()
    assert step(cpu, case, given).gradients["encoder"][given["dead"]].norm(dim=1).count_nonzero() > 8


def test_without_dead_features_there_is_no_auxiliary_code():
    given = parameters(Case(tokens=3, d=4, features=50, k=2))
    code = cpu.encode_top_k(given["x"], given["encoder"], given["b_enc"], 2, dead=given["dead"], k_aux=8)
    assert code.aux_values is None
    assert code.aux_indices is None


def test_features_without_a_positive_value_get_no_gradient():
    case = Case(tokens=13, d=24, features=800, k=4, shift=-100)
    outcome = step(cpu, case, parameters(case))
    assert outcome.z.abs().max() == 0
    assert outcome.gradients["encoder"].abs().max() == 0
    assert outcome.gradients["b_enc"].abs().max() == 0


def test_a_gradient_still_in_use_is_not_written_over():
    case = Case(tokens=13, d=24, features=3000, k=3)
    given = parameters(case)
    kept = step(cpu, case, given).gradients
    copies = {name: gradient.clone() for name, gradient in kept.items()}
    view = kept["encoder"][5:9]
    for number in range(3):
        step(cpu, case, given | {"x": given["x"] + number})
    assert all(torch.equal(kept[name], copies[name]) for name in kept)
    del kept
    for number in range(3):
        step(cpu, case, given | {"x": given["x"] + number})
    assert torch.equal(view, copies["encoder"][5:9])


def test_the_same_step_gives_the_same_bits():
    case = Case(tokens=64, d=24, features=3000, k=3)
    one, two = (step(cpu, case, parameters(case)).gradients for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("path", [cpu, reference])
def test_adam_is_pytorchs_between_projection_and_renormalisation(path, unit_rows, scale, monkeypatch):
    monkeypatch.setattr(cpu, "ADAM_ENTRIES", 100)  # many blocks
    assert_adam_is_pytorchs(path, unit_rows=unit_rows, scale=scale)


def test_adam_takes_vectors_too():
    weight, gradient = torch.randn(9), torch.randn(9)
    theirs = weight.clone().requires_grad_()
    theirs.grad = gradient.clone()
    torch.optim.Adam([theirs], lr=0.1).step()
    cpu.adam_rows_(weight, gradient, torch.zeros(9), torch.zeros(9), AdamStep(1, lr=0.1))
    torch.testing.assert_close(weight, theirs.detach())
