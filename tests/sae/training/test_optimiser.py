import pytest
import torch
from torch import nn

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.training.optimiser import RowAdam, RowRange, own_rows


@pytest.fixture
def parameters():
    """A matrix with unit rows, one without, and two vectors."""
    draw = torch.Generator().manual_seed(0)
    decoder = torch.randn(7, 5, generator=draw)
    return {
        "W_dec": nn.Parameter(decoder / decoder.norm(dim=1, keepdim=True)),
        "encoder": nn.Parameter(torch.randn(7, 5, generator=draw)),
        "b_enc": nn.Parameter(torch.randn(7, generator=draw)),
        "b_dec": nn.Parameter(torch.randn(5, generator=draw)),
    }


def with_gradients(parameters, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    return {name: p.grad.clone() for name, p in parameters.items()}


def test_without_unit_rows_it_is_the_adam_of_torch(parameters):
    twins = [nn.Parameter(p.detach().clone()) for p in parameters.values()]
    adam, theirs = RowAdam(parameters, eps=1e-8), torch.optim.Adam(twins, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    for seed in range(5):
        for twin, gradient in zip(twins, with_gradients(parameters, seed).values(), strict=True):
            twin.grad = gradient
        adam.step(0.01)
        theirs.step()
    for name, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameters[name], twin, msg=name)


def test_decoder_rows_have_length_one_after_every_step(parameters):
    adam = RowAdam(parameters, unit_rows=["W_dec"])
    for seed in range(3):
        with_gradients(parameters, seed)
        adam.step(0.3)
        torch.testing.assert_close(parameters["W_dec"].norm(dim=1), torch.ones(7))
    assert not torch.allclose(parameters["encoder"].norm(dim=1), torch.ones(7))


def test_a_gradient_along_a_decoder_row_does_not_move_it(parameters):
    before = parameters["W_dec"].detach().clone()
    with_gradients(parameters)
    parameters["W_dec"].grad = 3 * before
    adam = RowAdam(parameters, unit_rows=["W_dec"], eps=1e-3)  # or rounding errors would be steps
    adam.step(0.1)
    torch.testing.assert_close(parameters["W_dec"].detach(), before, atol=1e-4, rtol=0)


def test_the_bf16_copy_is_the_rounded_weight(parameters):
    bf16_copy = parameters["encoder"].detach().bfloat16()
    with_gradients(parameters)
    RowAdam(parameters, bf16_copies={"encoder": bf16_copy}).step(0.1)
    assert torch.equal(bf16_copy, parameters["encoder"].detach().bfloat16())


def test_clipping_scales_all_gradients_by_their_common_norm(parameters):
    whole = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    gradients = with_gradients(parameters)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, parameter in whole.items():
        parameter.grad = gradients[name] * (0.5 / norm)
    # A large eps, because Adam's first step forgets the size of a gradient.
    told = RowAdam(parameters, eps=1.0).step(0.1, clip=0.5)
    RowAdam(whole, eps=1.0).step(0.1)
    torch.testing.assert_close(told, norm)
    for name in parameters:
        torch.testing.assert_close(parameters[name], whole[name], msg=name)


def test_small_gradients_are_not_scaled_up(parameters):
    gradients = with_gradients(parameters)
    adam = RowAdam(parameters)
    adam.step(0.1, clip=1e6)
    torch.testing.assert_close(adam.first["b_enc"], 0.1 * gradients["b_enc"])


def test_no_gradient_is_left_after_a_step(parameters):
    with_gradients(parameters)
    RowAdam(parameters).step(0.1)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_parameter_without_gradient_is_named(parameters):
    with_gradients(parameters)
    parameters["b_enc"].grad = None
    with pytest.raises(FluxIRError, match="b_enc has no gradient"):
        RowAdam(parameters).step(0.1)


def test_an_unknown_name_is_refused(parameters):
    with pytest.raises(FluxIRError, match="no parameter is called W_enc"):
        RowAdam(parameters, unit_rows=["W_enc"])


def test_stored_moments_go_on_bit_for_bit(parameters):
    adam = RowAdam(parameters, unit_rows=["W_dec"])
    with_gradients(parameters)
    adam.step(0.1)
    stored = {name: tensor.clone() for name, tensor in adam.state_dict().items()}
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    again = RowAdam(twins, unit_rows=["W_dec"])
    again.load(1, lambda name, rows: stored[name][rows.slice])
    for state in (parameters, twins):
        with_gradients(state, seed=5)
    adam.step(0.1)
    again.step(0.1)
    for name in parameters:
        assert torch.equal(parameters[name], twins[name]), name


def test_the_moments_of_resampled_features_are_forgotten(parameters):
    adam = RowAdam(parameters)
    with_gradients(parameters)
    adam.step(0.1)
    adam.forget("encoder", torch.tensor([1, 4]))
    assert adam.first["encoder"].abs().sum(dim=1).eq(0).tolist() == [False, True, False, False, True, False, False]
    assert adam.second["encoder"].abs().sum(dim=1).eq(0).tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize(("count", "world_size"), [(8, 2), (7, 3), (2, 4)])
def test_the_processes_own_every_row_once(count, world_size):
    rows = [own_rows(count, rank, world_size) for rank in range(world_size)]
    assert [row for start, stop in rows for row in range(start, stop)] == list(range(count))
    assert max(r.stop - r.start for r in rows) - min(r.stop - r.start for r in rows) <= 1


def test_a_sharded_process_keeps_the_moments_of_its_rows_alone(parameters):
    adam = RowAdam(parameters, ranks=Ranks(1, 2, 1), shard=True)
    assert adam.rows("encoder") == RowRange(3, 7)
    assert adam.first["encoder"].shape == (4, 5)
    assert adam.first["b_enc"].shape == (7,)
    adam.first["encoder"] += 1
    adam.forget("encoder", torch.tensor([0, 3, 5]))
    assert adam.first["encoder"][:, 0].tolist() == [0, 1, 0, 1]
