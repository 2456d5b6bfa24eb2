"""FLUX.2's files: both layouts are recognised and loaded bit for bit, and none is taken for one of FLUX.1."""

from dataclasses import replace

import pytest
import torch

from flux_ir.api.models import load_model
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.describe import describe_file
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.checkpoints.load import load_autoencoder, load_flux, stream_flux
from flux_ir.models.checkpoints.locate import locate_autoencoder, locate_transformer
from flux_ir.models.registry import MODELS


@pytest.fixture
def spec2(tiny_flux2_params, tiny_flux2_autoencoder):
    """The spec of a small FLUX.2."""
    params = tiny_flux2_autoencoder().params
    return replace(MODELS["flux2-klein-4b"], flux=tiny_flux2_params, autoencoder=params)


def same_weights(ours, network):
    state = network.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_folder_of_either_layout_is_loaded_bit_for_bit(
    tmp_path, spec2, tiny_flux2, tiny_flux2_autoencoder, save, layout
):
    flux, autoencoder = tiny_flux2(), tiny_flux2_autoencoder()
    autoencoder.bn.num_batches_tracked.fill_(16_777_217)  # float32 cannot hold it
    files = (spec2.transformer_file, "ae.safetensors")
    states = flux.state_dict(), autoencoder.state_dict()
    if layout == "diffusers":
        files = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))
        states = (to_diffusers(state, net.params) for state, net in zip(states, (flux, autoencoder), strict=True))
    paths = [save(dict(state), tmp_path / file) for state, file in zip(states, files, strict=True)]
    source = locate_transformer(spec2, tmp_path)
    assert (source.layout, source.path) == (layout, paths[0])
    same_weights(load_flux(spec2, source, "cpu", torch.float32), flux)
    source = locate_autoencoder(spec2, paths[1] if layout == "bfl" else None, checkpoint=tmp_path)
    assert (source.layout, source.path) == (layout, paths[1])
    same_weights(load_autoencoder(spec2, source, "cpu"), autoencoder)


@pytest.mark.parametrize("diffusers", [False, True])
def test_the_two_architectures_are_not_mixed_up(tmp_path, spec2, tiny_spec, tiny_flux, tiny_flux2, save, diffusers):
    networks = {1: tiny_flux(), 2: tiny_flux2()}
    states = {
        number: to_diffusers(net.state_dict(), net.params) if diffusers else net.state_dict()
        for number, net in networks.items()
    }
    paths = {number: save(dict(state), tmp_path / f"{number}.safetensors") for number, state in states.items()}
    with pytest.raises(FluxIRError, match=r"transformer of flux2-klein-4b: it holds that of FLUX\.1"):
        inspect(spec2, "transformer", paths[1], "--checkpoint")
    with pytest.raises(FluxIRError, match=r"transformer of flux-schnell: it holds that of FLUX\.2"):
        inspect(tiny_spec(), "transformer", paths[2], "--checkpoint")


def test_autoencoders_are_told_by_their_latents(
    tmp_path, spec2, tiny_spec, tiny_autoencoder, tiny_flux2_autoencoder, save
):
    first = save(tiny_autoencoder(), tmp_path / "1.safetensors")
    second = save(tiny_flux2_autoencoder(), tmp_path / "2.safetensors")
    with pytest.raises(FluxIRError, match="its latents have 16 channels, not 32"):
        inspect(spec2, "autoencoder", first, "--ae_checkpoint")
    with pytest.raises(FluxIRError, match=r"its latents have 32 channels, not 16 \(as those of FLUX\.2 have\)|32 chan"):
        inspect(tiny_spec(), "autoencoder", second, "--ae_checkpoint")


def test_guidance_tells_dev_from_klein(tmp_path, spec2, tiny_flux2, save):
    path = save(tiny_flux2(guidance=True), tmp_path / "dev.safetensors")
    with pytest.raises(FluxIRError, match="is not flux2-klein-4b: it has guidance_in"):
        inspect(spec2, "transformer", path, "--checkpoint")


def test_a_file_of_full_size_is_called_by_its_models(tmp_path, save, monkeypatch, spec2, tiny_flux2):
    monkeypatch.setitem(MODELS, "flux2-klein-4b", spec2)
    (network,) = describe_file(save(tiny_flux2(), tmp_path / "flux.safetensors"))
    assert network.kind == "the transformer of flux2-klein-4b"
    assert network.facts["latent channels"] == 128
    assert network.facts["blocks"] == "2 double, 3 single, 64 wide"


def test_what_is_not_there_yet_is_said(tmp_path, spec2, tiny_flux2, save):
    with pytest.raises(FluxIRError, match="flux2-klein-4b cannot be run yet: its text encoder, Qwen3-4B, is not read"):
        load_model("flux2-klein-4b")
    source = inspect(spec2, "transformer", save(tiny_flux2(), tmp_path / "flux.safetensors"), "--checkpoint")
    with pytest.raises(FluxIRError, match=r"--offload blocks is for the blocks of FLUX\.1, not for flux2-klein-4b"):
        stream_flux(spec2, source, "cpu", torch.float32)
