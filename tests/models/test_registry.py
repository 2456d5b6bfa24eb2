"""The facts of every model, held against what the published checkpoints are known to be."""

import json

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.inspect import blank_network
from flux_ir.models.flux2.autoencoder import Flux2AutoEncoder
from flux_ir.models.flux2.transformer import Flux2Params
from flux_ir.models.registry import (
    MODELS,
    PACKAGED_MODELS,
    get_spec,
    model_names,
    packaged_spec,
)


def parameters(spec, part):
    return sum(parameter.numel() for parameter in blank_network(spec, part).parameters())


@pytest.mark.parametrize(
    ("name", "count", "tensors"),
    [
        ("flux-schnell", 11_891_178_560, 776),
        ("flux-dev", 11_901_408_320, 780),
        ("flux-dev-krea", 11_901_408_320, 780),
        ("flux-dev-kontext", 11_901_408_320, 780),
    ],
)
def test_transformers_have_the_size_of_the_published_ones(name, count, tensors):
    spec = get_spec(name)
    assert parameters(spec, "transformer") == count
    assert len(blank_network(spec, "transformer").state_dict()) == tensors


def test_autoencoder_has_the_size_of_the_published_one():
    spec = get_spec("flux-dev")
    assert isinstance(blank_network(spec, "autoencoder"), AutoEncoder)
    assert round(parameters(spec, "autoencoder") / 1e6, 1) == 83.8
    assert len(blank_network(spec, "autoencoder").state_dict()) == 244


@pytest.mark.parametrize(
    ("name", "count", "tensors"),
    [
        ("flux2-klein-4b", 3_875_544_576, 149),
        ("flux2-klein-4b-base", 3_875_544_576, 149),
        ("flux2-klein-9b", 9_078_581_248, 201),
        ("flux2-klein-9b-base", 9_078_581_248, 201),
        ("flux2-dev", 32_223_281_152, 299),
    ],
)
def test_networks_of_flux2_have_the_size_of_the_published_ones(name, count, tensors):
    spec = get_spec(name)
    assert parameters(spec, "transformer") == count
    assert len(blank_network(spec, "transformer").state_dict()) == tensors
    assert isinstance(blank_network(spec, "autoencoder"), Flux2AutoEncoder)
    assert len(blank_network(spec, "autoencoder").state_dict()) == 251


def test_default_model_comes_first_and_flux_tiny_is_among_the_names():
    assert model_names()[0] == "flux-schnell"
    assert "flux-tiny" in model_names()


@pytest.mark.parametrize(
    ("name", "steps", "shift", "text_tokens"),
    [
        ("flux-schnell", 4, "none", 256),
        ("flux-dev", 50, "linear", 512),
        ("flux-dev-kontext", 30, "linear", 512),
        ("flux2-klein-4b", 4, "empirical", 512),
        ("flux2-klein-4b-base", 50, "empirical", 512),
        ("flux2-dev", 50, "empirical", 512),
    ],
)
def test_sampling_facts_are_those_of_the_reference(name, steps, shift, text_tokens):
    spec = get_spec(name)
    assert (spec.default_steps, spec.schedule_shift, spec.text_tokens) == (steps, shift, text_tokens)


def test_variables_of_one_model_come_before_the_general_ones():
    for spec in MODELS.values():
        assert spec.transformer_env.index("FLUX_MODEL") == len(spec.transformer_env) - 1
        flux2 = isinstance(spec.flux, Flux2Params)
        assert spec.autoencoder_env == (("AE_MODEL_PATH",) if flux2 else ("FLUX_AE", "AE"))


def test_only_models_that_take_a_reference_have_sites_of_its_tokens(packaged_folder):
    taking = {name for name in model_names() if get_spec(name).takes_reference}
    assert taking == {"flux-dev-kontext"}
    for name in model_names():
        assert any(site.stream == "cond" for site in get_spec(name).sites) == (name in taking)
    facts = json.loads((packaged_folder / "params.json").read_text())
    (packaged_folder / "params.json").write_text(json.dumps(facts | {"reference_sizes": [[64, 32], [32, 64]]}))
    assert packaged_spec("flux-tiny", packaged_folder).reference_sizes == ((64, 32), (32, 64))


def test_unknown_model_is_an_error_with_the_nearest_name():
    with pytest.raises(FluxIRError, match="got 'flux-shnell'") as error:
        get_spec("flux-shnell")
    assert error.value.hint == "did you mean flux-schnell?"


def test_packaged_spec_is_read_from_its_folder(packaged_folder, tiny_flux_params, tiny_autoencoder):
    spec = packaged_spec("flux-tiny", packaged_folder)
    assert spec.flux == tiny_flux_params
    assert spec.autoencoder == tiny_autoencoder().params
    assert (spec.text_tokens, spec.default_steps, spec.default_side_px) == (20, 8, 64)
    assert spec.repo_id is None
    assert spec.transformer_env == ("FLUX_TINY", "FLUX_MODEL")
    assert set(spec.sha256) >= {"transformer.safetensors", "ae.safetensors", "t5/config.json", "clip/config.json"}


def test_packaged_model_without_its_weights_says_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGED_MODELS, "flux-tiny", tmp_path / "nothing")
    with pytest.raises(FluxIRError, match="its weights are not there") as error:
        get_spec("flux-tiny")
    assert "python -m recipes.flux_tiny.train" in error.value.hint


def test_damaged_facts_of_a_packaged_model_are_an_error_naming_the_file(packaged_folder):
    facts = json.loads((packaged_folder / "params.json").read_text())
    del facts["text_tokens"]
    (packaged_folder / "params.json").write_text(json.dumps(facts))
    with pytest.raises(FluxIRError, match=r"params\.json must have the keys .* it lacks text_tokens"):
        packaged_spec("flux-tiny", packaged_folder)
    (packaged_folder / "params.json").write_text("{")
    with pytest.raises(FluxIRError, match=r"params\.json must be JSON"):
        packaged_spec("flux-tiny", packaged_folder)


def test_specs_can_be_told_apart_and_kept_in_sets():
    assert len(set(MODELS.values())) == len(MODELS)
