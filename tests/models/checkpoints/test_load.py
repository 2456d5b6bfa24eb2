"""Loading: strictly, in any layout, to the dtype asked for, and without a second copy of the weights."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.inspect import blank_network, inspect
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.checkpoints.load import load_autoencoder, load_flux
from flux_ir.models.checkpoints.locate import locate_autoencoder, locate_transformer
from flux_ir.models.registry import MODELS, packaged_spec


def same_weights(loaded, original):
    state = original.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    return all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("sharded", [False, True])
def test_transformer_is_loaded_bitwise_from_every_layout(
    tmp_path, tiny_spec, tiny_flux, save, save_sharded, guidance, layout, sharded
):
    flux = tiny_flux(guidance=guidance)
    state = flux.state_dict() if layout == "bfl" else to_diffusers(flux.state_dict(), flux.params)
    path = save_sharded(state, tmp_path, "any") if sharded else save(state, tmp_path / "any.safetensors")
    spec = tiny_spec(guidance=guidance)
    loaded = load_flux(spec, locate_transformer(spec, path), "cpu", torch.float32)
    assert same_weights(loaded, flux)


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_autoencoder_is_loaded_bitwise_in_float32(tmp_path, tiny_spec, tiny_autoencoder, save, layout):
    ae = tiny_autoencoder(dtype=torch.bfloat16)
    state = ae.state_dict() if layout == "bfl" else to_diffusers(ae.state_dict(), ae.params)
    source = locate_autoencoder(tiny_spec(), save(state, tmp_path / "ae.safetensors"))
    loaded = load_autoencoder(tiny_spec(), source, "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert same_weights(loaded, ae.float())


def test_loaded_network_is_ready_to_run_and_not_to_train(tmp_path, tiny_spec, tiny_flux, tiny_inputs, save):
    source = locate_transformer(tiny_spec(), save(tiny_flux(), tmp_path / "flux.safetensors"))
    flux = load_flux(tiny_spec(), source, "cpu", torch.bfloat16)
    assert not flux.training
    assert not any(parameter.requires_grad for parameter in flux.parameters())
    assert {parameter.dtype for parameter in flux.parameters()} == {torch.bfloat16}
    assert flux(*tiny_inputs(dtype=torch.bfloat16)).isfinite().all()


def test_names_with_a_prefix_are_loaded_too(tmp_path, tiny_spec, tiny_flux, save):
    path = save(tiny_flux(), tmp_path / "flux.safetensors", prefix="model.diffusion_model.")
    loaded = load_flux(tiny_spec(), locate_transformer(tiny_spec(), path), "cpu", torch.float32)
    assert same_weights(loaded, tiny_flux())


def test_weights_outlive_their_file(tmp_path, tiny_spec, tiny_flux, save):
    path = save(tiny_flux(), tmp_path / "flux.safetensors")
    loaded = load_flux(tiny_spec(), locate_transformer(tiny_spec(), path), "cpu", torch.float32)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same_weights(loaded, tiny_flux())


def test_progress_adds_up_to_the_bytes_of_the_source(tmp_path, tiny_spec, tiny_flux, save):
    source = locate_transformer(tiny_spec(), save(tiny_flux(), tmp_path / "flux.safetensors"))
    read = []
    load_flux(tiny_spec(), source, "cpu", torch.bfloat16, advance=read.append)
    assert sum(read) == source.nbytes
    assert len(read) == len(tiny_flux().state_dict())


def test_source_of_the_other_network_is_refused(tmp_path, tiny_spec, tiny_autoencoder, save):
    source = locate_autoencoder(tiny_spec(), save(tiny_autoencoder(), tmp_path / "ae.safetensors"))
    with pytest.raises(FluxIRError, match="a source of the transformer is needed: got the autoencoder in"):
        load_flux(tiny_spec(), source, "cpu", torch.float32)


def test_packaged_model_loads(packaged_folder, tiny_flux):
    spec = packaged_spec("flux-tiny", packaged_folder)
    loaded = load_flux(spec, locate_transformer(spec), "cpu", torch.bfloat16)
    assert same_weights(loaded, tiny_flux(dtype=torch.bfloat16))


# Loads the file named on the command line and prints by how many bytes memory had grown at its highest.
LOADER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from flux_ir.models.registry import MODELS
from flux_ir.models.checkpoints.locate import locate_transformer
from flux_ir.models.flux1.transformer import FluxParams
from flux_ir.models.checkpoints.load import load_flux

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

spec = replace(MODELS["flux-schnell"], flux=FluxParams(**eval(sys.argv[2])))
source = locate_transformer(spec, sys.argv[1])
torch.zeros(8).to(torch.bfloat16)
Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
before = status("VmRSS")
network = load_flux(spec, source, "cpu", torch.bfloat16)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured through Linux's /proc")
def test_loading_needs_one_tensor_more_memory_than_the_weights(tmp_path, tiny_flux_params, save):
    params = replace(
        tiny_flux_params, hidden_size=512, num_heads=8, axes_dim=(16, 24, 24), depth=1, depth_single_blocks=3
    )
    blank = blank_network(replace(MODELS["flux-schnell"], flux=params), "transformer").state_dict()
    path = save({name: torch.zeros(tensor.shape) for name, tensor in blank.items()}, tmp_path / "flux.safetensors")
    largest_bytes = max(4 * tensor.numel() for tensor in blank.values())
    weights_bytes = sum(2 * tensor.numel() for tensor in blank.values())
    assert path.stat().st_size > 80e6
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(path), repr(asdict(params))], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < weights_bytes + largest_bytes + 12e6  # the file alone is twice the weights


def test_file_that_broke_after_it_was_found_is_one_line(tmp_path, tiny_spec, tiny_flux, save):
    path = save(tiny_flux(), tmp_path / "flux.safetensors")
    source = inspect(tiny_spec(), "transformer", path, "--checkpoint")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FluxIRError, match=r"flux\.safetensors cannot be read"):
        load_flux(tiny_spec(), source, "cpu", torch.float32)
