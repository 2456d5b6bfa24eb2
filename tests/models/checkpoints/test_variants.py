"""FLUX.1's variants with other inputs are called by their names, with what does something like it here."""

import json
from dataclasses import replace

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.checkpoints.locate import locate_transformer
from flux_ir.models.registry import MODELS


@pytest.fixture
def kontext_spec(tiny_spec):
    """Kontext's, with a small network."""
    return replace(MODELS["flux-dev-kontext"], flux=tiny_spec(guidance=True).flux)


@pytest.fixture
def folder(tmp_path, tiny_flux, save):
    """Makes a folder of diffusers, of some pipeline."""

    def make(pipeline):
        flux = tiny_flux(guidance=True)
        state = to_diffusers(flux.state_dict(), flux.params)
        save(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        return tmp_path

    return make


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(
    ("channels", "name", "instead"),
    [
        (128, r"FLUX\.1 Canny or Depth", "flux-dev-kontext with --reference_image"),
        (384, r"FLUX\.1 Fill", "--init_image"),
    ],
)
def test_wider_inputs_tell_fill_and_the_control_models(
    tmp_path, tiny_spec, tiny_flux, save, guidance, channels, name, instead
):
    state = tiny_flux(guidance=True).state_dict() | {"img_in.weight": torch.zeros(64, channels)}
    path = save(state, tmp_path / "variant.safetensors")
    with pytest.raises(FluxIRError, match=f"it is {name}, .*{channels} latent channels, not 64") as error:
        inspect(tiny_spec(guidance=guidance), "transformer", path, "--checkpoint")
    assert instead in error.value.hint


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("redux_up.weight", "redux_down.weight"), r"FLUX\.1 Redux, .* no transformer \(use flux-dev-kontext"),
        (("vision_model.embeddings.patch_embedding.weight",), r"an image encoder, such as the SigLIP"),
    ],
)
def test_redux_in_place_of_the_transformer_is_called_so(tmp_path, tiny_spec, save, names, told):
    path = save({name: torch.zeros(2, 2) for name in names}, tmp_path / "redux.safetensors")
    with pytest.raises(FluxIRError, match=f"must hold the transformer of flux-schnell: it holds {told}"):
        inspect(tiny_spec(), "transformer", path, "--checkpoint")


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [("FluxFillPipeline", "Fill"), ("FluxControlPipeline", "Canny or Depth"), ("FluxPriorReduxPipeline", "Redux")],
)
@pytest.mark.parametrize("named", ["", "transformer"])
def test_folders_of_diffusers_say_which_variant_they_are(folder, tiny_spec, pipeline, name, named):
    with pytest.raises(FluxIRError, match=rf"is not flux-dev: it is FLUX\.1 {name}, .*\({pipeline}\)") as error:
        locate_transformer(tiny_spec(guidance=True), folder(pipeline) / named)
    assert error.value.hint.startswith("use ")


def test_a_folder_of_kontext_is_no_flux_dev_and_the_other_way_round(folder, tiny_spec, kontext_spec):
    assert locate_transformer(kontext_spec, folder("FluxKontextPipeline"))
    with pytest.raises(FluxIRError, match="is of diffusers' FluxKontextPipeline, and flux-dev takes no reference"):
        locate_transformer(tiny_spec(guidance=True), folder("FluxKontextPipeline"))
    assert locate_transformer(tiny_spec(guidance=True), folder("FluxPipeline"))
    with pytest.raises(FluxIRError, match="is of diffusers' FluxPipeline, and flux-dev-kontext takes a reference"):
        locate_transformer(kontext_spec, folder("FluxPipeline"))


def test_the_hint_names_the_model_that_the_folder_is_of(folder):
    with pytest.raises(FluxIRError) as error:
        locate_transformer(MODELS["flux-dev"], folder("FluxKontextPipeline"))
    assert error.value.hint == "--model flux-dev-kontext"


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"_class_name": 3}', '{"_class_name": "AnotherPipeline"}'])
def test_an_index_that_says_nothing_leaves_it_to_the_files(folder, tiny_spec, index):
    made = folder("FluxPipeline")
    (made / "model_index.json").write_text(index)
    assert locate_transformer(tiny_spec(guidance=True), made)
