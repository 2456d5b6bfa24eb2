"""The autoencoder against the reference's tensors, and what training and the lens lean on."""

import dataclasses

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder, AutoEncoderParams, kl_to_standard_normal


@pytest.fixture(scope="module")
def reference(golden):
    return golden("autoencoder")


@pytest.fixture(scope="module")
def autoencoder(reference):
    """The network of the golden file, loaded strictly."""
    model = AutoEncoder(AutoEncoderParams(**reference.params))
    model.load_state_dict(reference.weights, strict=True)
    return model.eval().requires_grad_(False)


def test_encode_agrees_with_the_reference(autoencoder, reference):
    z = autoencoder.encode(reference.tensors["x"])
    torch.testing.assert_close(z, reference.tensors["z"], rtol=0, atol=1e-5)


def test_decode_agrees_with_the_reference(autoencoder, reference):
    y = autoencoder.decode(reference.tensors["z"])
    torch.testing.assert_close(y, reference.tensors["y"], rtol=0, atol=1e-5)


def test_latents_are_smaller_by_the_downscale_along_each_side(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    picture = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    z = autoencoder.encode(picture)
    assert z.shape == (2, 16, 8, 6)
    assert autoencoder.decode(z).shape == picture.shape


def test_pictures_of_a_batch_decode_as_they_do_alone(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    z = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([autoencoder.decode(one[None]) for one in z])
    torch.testing.assert_close(autoencoder.decode(z), alone, rtol=0, atol=1e-5)


def test_encode_is_the_shifted_and_scaled_mean(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    picture = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    mean, log_variance = autoencoder.moments(picture)
    assert log_variance.shape == mean.shape
    assert torch.equal(autoencoder.encode(picture), 0.3611 * (mean - 0.1159))


def test_number_of_norm_groups_changes_the_picture_though_the_weights_fit(tiny_autoencoder):
    """Why `norm_groups` is a field of the params: a state dict cannot tell, and strict loading does not notice."""
    autoencoder = tiny_autoencoder()
    regrouped = AutoEncoder(dataclasses.replace(autoencoder.params, norm_groups=32)).eval()
    regrouped.load_state_dict(autoencoder.state_dict(), strict=True)
    z = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    assert (regrouped.decode(z) - autoencoder.decode(z)).abs().max() > 1e-2


def test_params_refuse_channels_that_do_not_fill_the_norm_groups(tiny_autoencoder):
    with pytest.raises(FluxIRError, match=r"multiple of norm_groups: got 32 and 12"):
        dataclasses.replace(tiny_autoencoder().params, norm_groups=12)


def test_params_from_json_are_equal_to_those_that_were_saved(tiny_autoencoder):
    params = tiny_autoencoder().params
    assert AutoEncoderParams(**(dataclasses.asdict(params) | {"ch_mult": [1, 2, 2, 2]})) == params


def test_divergence_is_zero_for_the_standard_normal_alone():
    mean, log_variance = torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 2)
    assert kl_to_standard_normal(mean, log_variance) == 0
    assert kl_to_standard_normal(mean + 1, log_variance) == pytest.approx(0.5)
    assert kl_to_standard_normal(mean, log_variance - 1) == pytest.approx(0.5 * torch.e**-1)
