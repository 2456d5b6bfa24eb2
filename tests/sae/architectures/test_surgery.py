import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_the_identity_bit_for_bit(architecture, dtype, random_sae, tokens):
    sae, x = random_sae(architecture), tokens(dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = -0.0, float("inf"), float("nan")
    for changed in (sae.surgery(x, 3, 0.0), sae.surgery(x, [1, 2], [0.0, -0.0]), sae.surgery(x, [], 5.0)):
        assert changed.dtype == dtype
        assert torch.equal(changed.view(torch.uint8), x.view(torch.uint8))


@every_architecture
def test_surgery_is_the_changed_code_decoded_plus_the_error_once(architecture, random_sae, tokens):
    sae, x = random_sae(architecture), tokens()
    z = sae.encode(x)
    error = x - sae.decode(z)
    z[:, 4] += 2.5
    torch.testing.assert_close(sae.surgery(x, 4, 2.5), sae.decode(z) + error, rtol=1e-4, atol=1e-4)


@every_architecture
def test_surgery_does_not_depend_on_where_the_normalisation_is(architecture, random_sae, tokens):
    sae, x = random_sae(architecture), tokens()
    torch.testing.assert_close(sae.surgery(x, 4, 2.5), sae.folded().surgery(x, 4, 2.5))


def test_strength_is_the_length_of_what_is_added(random_sae, tokens):
    sae, x = random_sae("topk"), tokens(4, dtype=torch.float64).float()
    for strength in (-3.0, 0.5, 10.0):
        change = sae.surgery(x, 0, strength) - x
        torch.testing.assert_close(change.norm(dim=1), torch.full((4,), abs(strength)), rtol=1e-4, atol=1e-4)


def test_there_is_no_jump_at_strength_zero(random_sae, tokens):
    sae, x = random_sae("topk"), tokens()
    assert (sae.surgery(x, 0, 1e-3) - x).abs().max() <= 1.1e-3


def test_several_features_take_one_strength_or_one_each(random_sae, tokens):
    sae, x = random_sae("gated"), tokens().reshape(2, 15, 12)
    one_by_one = sae.surgery(sae.surgery(x, 1, 2.0), 5, -1.0)
    torch.testing.assert_close(sae.surgery(x, [1, 5], [2.0, -1.0]), one_by_one)
    torch.testing.assert_close(sae.surgery(x, (1, 5), 2), sae.surgery(sae.surgery(x, 1, 2), 5, 2))


def test_a_feature_named_twice_counts_twice(random_sae, tokens):
    sae, x = random_sae("l1"), tokens()
    torch.testing.assert_close(sae.surgery(x, [3, 3], 1.0), sae.surgery(x, 3, 2.0))


@pytest.mark.parametrize(
    ("feature", "strength", "says"),
    [
        (40, 1.0, "features are numbered 0 to 39: got 40"),
        (-1, 0.0, "features are numbered 0 to 39: got -1"),
        ([1, 99], 1.0, "got 99"),
        ([1, 2, 3], [1.0, 2.0], "one strength, or one each: got 3 and 2"),
    ],
)
def test_what_cannot_be_changed_is_refused(feature, strength, says, random_sae, tokens):
    with pytest.raises(FluxIRError, match=says):
        random_sae("topk").surgery(tokens(), feature, strength)


@pytest.mark.parametrize("arguments", [{"k": 3, "strength": 1.0}, {"feature": 3}, {"strength": 1.0}])
def test_the_feature_is_called_so_and_k_is_told_what_it_is(arguments, random_sae, tokens):
    with pytest.raises(FluxIRError, match="surgery takes a feature and a strength") as caught:
        random_sae("topk").surgery(tokens(), **arguments)
    assert f"feature={arguments.get('k', 0)}" in caught.value.hint


def test_surgery_refuses_another_width_even_at_strength_zero(random_sae):
    with pytest.raises(FluxIRError, match="12 wide"):
        random_sae("topk").surgery(torch.zeros(3, 5), 0, 0.0)
