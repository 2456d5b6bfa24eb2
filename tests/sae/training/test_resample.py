import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES
from flux_ir.sae.training.step import resample_dead_

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def dead_of(*numbers):
    dead = torch.zeros(40, dtype=torch.bool)
    dead[list(numbers)] = True
    return dead


def generator():
    return torch.Generator().manual_seed(0)


@every_architecture
def test_the_dead_start_again_and_the_living_are_left_alone(architecture, random_sae, tokens):
    sae, dead = random_sae(architecture), dead_of(3, 17, 30)
    xn = sae.normalise(tokens(200))
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    numbers = resample_dead_(sae, dead, xn, generator=generator())
    assert numbers.tolist() == [3, 17, 30]
    for name, parameter in sae.named_parameters():
        if name == "b_dec":
            assert torch.equal(parameter, before[name])
            continue
        assert torch.equal(parameter[~dead], before[name][~dead])
        assert (parameter[dead] != before[name][dead]).any()
    torch.testing.assert_close(sae.W_dec[dead].norm(dim=1), torch.ones(3))
    assert not sae.b_enc[dead].any()


def test_new_directions_point_to_tokens_none_twice(random_sae, tokens):
    sae, dead = random_sae("l1"), dead_of(*range(20))
    xn = sae.normalise(tokens(25))
    resample_dead_(sae, dead, xn, generator=generator())
    directions = torch.nn.functional.normalize(xn - sae.b_dec, dim=1)
    likeness = sae.W_dec[:20] @ directions.T
    torch.testing.assert_close(likeness.max(dim=1).values, torch.ones(20))
    assert len(set(likeness.argmax(dim=1).tolist())) == 20
    living = sae.encoder[20:].norm(dim=1).mean()
    torch.testing.assert_close(sae.encoder[:20], 0.2 * living * sae.W_dec[:20])


def test_tokens_with_a_large_error_are_drawn_most(random_sae, tokens):
    """Nine tenths of the tokens are reconstructed all but perfectly: the drawn ones are of the last tenth."""
    sae = random_sae("l1")
    xn = sae.normalise(tokens(100))
    with torch.no_grad():
        xn[:90] = sae.reconstruct(torch.zeros(1, 40)) + 1e-3 * xn[:90]
        sae.b_enc.fill_(-5)
    resample_dead_(sae, dead_of(0, 1, 2), xn, generator=generator())
    directions = torch.nn.functional.normalize(xn - sae.b_dec, dim=1)
    assert ((sae.W_dec[:3] @ directions.T).argmax(dim=1) >= 90).all()


def test_tied_weights_stay_tied(random_sae, tokens):
    sae = random_sae("l1", tied=True)
    resample_dead_(sae, dead_of(4), sae.normalise(tokens()), generator=generator())
    assert sae.encoder is sae.W_dec
    torch.testing.assert_close(sae.W_dec[4].norm().item(), 1.0)


def test_the_same_generator_gives_the_same_weights(random_sae, tokens):
    saes = [random_sae("gated"), random_sae("gated")]
    for sae in saes:
        resample_dead_(sae, dead_of(1, 2), sae.normalise(tokens()), generator=generator())
    for one, other in zip(*(sae.parameters() for sae in saes), strict=True):
        assert torch.equal(one, other)


def test_no_more_are_resampled_than_there_are_tokens_with_an_error(random_sae, tokens):
    sae = random_sae("l1")
    numbers = resample_dead_(sae, dead_of(*range(10)), sae.normalise(tokens(4)), generator=generator())
    assert numbers.tolist() == [0, 1, 2, 3]


def test_without_dead_features_nothing_happens(random_sae, tokens):
    sae = random_sae("l1")
    before = sae.W_dec.detach().clone()
    assert resample_dead_(sae, dead_of(), sae.normalise(tokens()), generator=generator()).tolist() == []
    assert torch.equal(sae.W_dec, before)


def test_what_cannot_be_resampled_is_refused(random_sae, tokens):
    sae = random_sae("l1")
    xn = sae.normalise(tokens())
    with pytest.raises(FluxIRError, match="all are dead"):
        resample_dead_(sae, torch.ones(40, dtype=torch.bool), xn, generator=generator())
