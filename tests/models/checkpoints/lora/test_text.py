"""LoRAs of the text encoders: one delta gives the same T5 and CLIP in every layout, wherever weights are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.encoder_configs import PUBLISHED, config_of, linear_layers
from flux_ir.models.checkpoints.locate import ModelSource, locate_model
from flux_ir.models.checkpoints.lora.read import read_lora, read_loras
from flux_ir.models.checkpoints.pretrained import read_params
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import load_clip, load_t5, open_encoder
from flux_ir.models.text.clip import ClipText, ClipTextParams
from flux_ir.models.text.t5 import T5Encoder, T5Params
from tests.models.checkpoints.lora.layouts import RANK, SCALE, Factors, write

SPEC = get_spec("flux-tiny")
PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


@pytest.fixture(scope="module")
def factors():
    """Matrices for every linear layer of both encoders, by encoder and name."""
    draw = torch.Generator().manual_seed(5)
    return {
        encoder: {
            name.removesuffix(".weight"): Factors(
                0.05 * torch.randn(rows, RANK, generator=draw), torch.randn(RANK, columns, generator=draw)
            )
            for name, (rows, columns) in linear_layers(encoder, config_of(SPEC, encoder)).items()
        }
        for encoder in ("t5", "clip")
    }


@pytest.fixture(scope="module")
def source():
    return locate_model(SPEC, autoencoder=False)


@pytest.fixture(scope="module")
def plain(source):
    return states(source)


@pytest.fixture(scope="module")
def reference(source, factors, tmp_path_factory):
    return states(source, read_loras(SPEC, kohya(factors, tmp_path_factory.mktemp("lora") / "reference.safetensors")))


def both(factors, path, t5, clip, *, dots=True, ends=PEFT, alpha=None, rename=lambda name: name):
    """A file with the layers of both encoders, each behind its prefix."""
    tensors = {}
    for encoder, prefix in (("t5", t5), ("clip", clip)):
        own = (
            factors[encoder] if alpha else {n: Factors(SCALE * up, down) for n, (up, down) in factors[encoder].items()}
        )
        own = {rename(name): one for name, one in own.items()}
        tensors |= load_file(write(own, path, prefix=prefix, dots=dots, ends=ends, alpha=alpha))
    save_file(tensors, path)
    return path


def kohya(factors, path, t5="lora_te3_"):
    return both(factors, path, t5, "lora_te1_", dots=False, ends=KOHYA, alpha=SCALE * RANK)


def onetrainer(factors, path):
    return kohya(factors, path, t5="lora_te2_")


def onetrainer_newer(factors, path):
    return both(factors, path, "t5.", "clip_l.", ends=KOHYA, alpha=SCALE * RANK)


def diffusers(factors, path):
    return both(factors, path, "text_encoder_2.", "text_encoder.")


def diffusers_older(factors, path):
    ends = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
    return both(factors, path, "text_encoder_2.", "text_encoder.", ends=ends)


def diffusers_of_transformers_5(factors, path):
    return both(factors, path, "text_encoder_2.", "text_encoder.", rename=lambda name: name.removeprefix("text_model."))


def diffusers_with_settings(factors, path):
    tensors = {}
    for encoder, prefix in (("t5", "text_encoder_2."), ("clip", "text_encoder.")):
        tensors |= load_file(write(factors[encoder], path, prefix=prefix))
    settings = {f"{one}.lora_alpha": SCALE * RANK for one in ("text_encoder", "text_encoder_2")}
    settings |= {"text_encoder.r": RANK, "text_encoder_2.r": RANK, "transformer.r": 99, "transformer.lora_alpha": 7}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    return path


def comfyui(factors, path):
    return both(factors, path, "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer.")


def no_prefix(factors, path):
    return both(factors, path, "base_model.model.", "")


LAYOUTS = {
    f.__name__: f
    for f in (
        *(kohya, onetrainer, onetrainer_newer, diffusers, diffusers_older, diffusers_of_transformers_5),
        *(diffusers_with_settings, comfyui, no_prefix),
    )
}


def states(source, loras=(), dtype=torch.float32):
    """The weights of both encoders, as they are read when one is loaded."""
    found = {}
    for encoder in ("t5", "clip"):
        opened = replace(open_encoder(encoder, getattr(source.text, encoder)), loras=loras)
        found[encoder] = {name: torch.empty(one.shape, dtype=dtype) for name, one in opened.state.items()}
        for name, target in found[encoder].items():
            opened.read_into(target, name)
    return found


def same_bits(first, second):
    return all(torch.equal(first[part][name], second[part][name]) for part in first for name in first[part])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_delta_gives_the_same_bits_in_every_layout(source, factors, reference, layout, tmp_path):
    path = LAYOUTS[layout](factors, tmp_path / "lora.safetensors")
    assert same_bits(states(source, read_loras(SPEC, path)), reference)


def test_the_delta_is_added_to_the_linear_layers_and_to_nothing_else(plain, factors, reference):
    for encoder, layers in factors.items():
        for name, (up, down) in layers.items():
            expected = plain[encoder][f"{name}.weight"].double() + SCALE * (up.double() @ down.double())
            torch.testing.assert_close(reference[encoder][f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)
        others = plain[encoder].keys() - {f"{name}.weight" for name in layers}
        assert others
        assert all(torch.equal(reference[encoder][name], plain[encoder][name]) for name in others)


def test_strengths_and_dtypes_are_those_of_the_transformer(source, plain, factors, tmp_path):
    path = kohya(factors, tmp_path / "lora.safetensors")
    assert same_bits(states(source, read_loras(SPEC, path, 0)), plain)
    exact = states(source, read_loras(SPEC, path, -0.5))
    rounded = states(source, read_loras(SPEC, path, -0.5), torch.bfloat16)
    assert same_bits(rounded, {part: {n: t.to(torch.bfloat16) for n, t in one.items()} for part, one in exact.items()})
    name = "text_model.encoder.layers.1.mlp.fc1"
    up, down = factors["clip"][name]
    expected = plain["clip"][f"{name}.weight"].double() - 0.5 * SCALE * (up.double() @ down.double())
    torch.testing.assert_close(exact["clip"][f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_a_loaded_encoder_has_the_merged_weights(source, factors, reference, tmp_path):
    loras = read_loras(SPEC, kohya(factors, tmp_path / "lora.safetensors"))
    t5, clip = source.text
    t5 = load_t5(t5.path, t5.tokenizer_dir, 20, "cpu", torch.float32, loras=loras)
    clip = load_clip(clip.path, clip.tokenizer_dir, "cpu", torch.float32, loras=loras)
    assert same_bits({"t5": t5.model.state_dict(), "clip": clip.model.state_dict()}, reference)


def test_an_offloaded_and_a_streamed_model_embed_a_prompt_with_the_same_bits(source, factors, tmp_path):
    loras = read_loras(SPEC, kohya(factors, tmp_path / "lora.safetensors"))
    embedded = []
    for offload, merged in ((False, loras), (True, loras), ("parts", loras), ("blocks", loras), (False, ())):
        suite = Suite(SPEC, ModelSource(*source[:3], merged), plan(0, offload=offload), torch.float32)
        with suite.text_encoders() as encoders, torch.no_grad():
            embedded.append((encoders.t5(["a red circle"]), encoders.clip(["a red circle"])))
    first, plain = embedded[0], embedded[-1]
    for other in embedded[1:-1]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(first, plain, strict=True))


def test_a_lora_says_what_it_changes(factors, tmp_path):
    lora = read_lora(kohya(factors, tmp_path / "lora.safetensors"), SPEC, strength=0.5)
    assert lora.parts == {"t5": 21, "clip": 18}
    assert str(lora) == f"LoRA of rank {RANK}, 21 layers of T5 and 18 layers of CLIP (kohya, names of transformers), " \
        "strength 0.5"  # fmt: skip
    assert lora.notes() == []


def test_settings_of_one_network_are_not_those_of_another(factors, tmp_path):
    lora = read_lora(diffusers_with_settings(factors, tmp_path / "lora.safetensors"), SPEC)
    assert lora.scales == [SCALE]


@pytest.mark.parametrize("encoder", ["t5", "clip"])
@pytest.mark.parametrize("config", ["published", "flux-tiny", "ungated"])
def test_the_linear_layers_are_those_of_the_network(encoder, config):
    said = PUBLISHED[encoder] if config == "published" else config_of(SPEC, encoder)
    if config == "ungated" and encoder == "t5":
        said = {**said, "feed_forward_proj": "relu", "dense_act_fn": None}
    params = read_params(T5Params if encoder == "t5" else ClipTextParams, Path("config.json"), what="it", config=said)
    with torch.device("meta"):
        network = (T5Encoder if encoder == "t5" else ClipText)(params)
    linear = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linear_layers(encoder, said) == linear
    assert list(linear_layers(encoder, said)) == list(linear)


# ---- What does not fit


def refused(path, *parts):
    with pytest.raises(FluxIRError) as caught:
        read_loras(SPEC, path)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def one_layer(path, name, rows=128, columns=128, more=()):
    tensors = {f"{name}.lora_up.weight": torch.zeros(rows, 2), f"{name}.lora_down.weight": torch.zeros(2, columns)}
    save_file(tensors | dict(more), path)
    return path


def test_a_layer_that_an_encoder_has_not_is_unmatched(tmp_path):
    path = one_layer(tmp_path / "lora.safetensors", "lora_te1_text_model_encoder_layers_7_mlp_fc1")
    refused(path, "none of the 2 tensors", "without one are 2, lora_te1_text_model_encoder_layers_7_mlp_fc1")
    path = one_layer(tmp_path / "lora.safetensors", "lora_te2_encoder_block_0_layer_0_SelfAttention_x")
    refused(path, "none of the 2 tensors", "lora_te2_encoder_block_0_layer_0_SelfAttention_x")
    embedding = one_layer(tmp_path / "lora.safetensors", "text_encoder.text_model.embeddings.token_embedding")
    refused(embedding, "none of the 2 tensors", "token_embedding")


def test_a_lora_of_the_large_encoders_is_said_to_fit_their_models(tmp_path):
    path = one_layer(tmp_path / "lora.safetensors", "lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    refused(path, "its change is [3072, 768]", "[256, 128]", "it fits flux-schnell or flux-dev")


def test_what_flux_does_not_use_is_told_and_alone_it_is_an_error(factors, tmp_path):
    path = one_layer(tmp_path / "lora.safetensors", "lora_te1_text_projection", more={"bundle_emb.x": torch.zeros(2)})
    refused(path, "changes nothing that FLUX.1 uses of its text encoders", "bundle_emb.x")
    tensors = load_file(path) | load_file(kohya(factors, tmp_path / "whole.safetensors"))
    save_file(tensors, path)
    said = []
    read_loras(SPEC, path, announce=said.append)
    assert "that FLUX.1 does not use (3 tensors, " in said[1]


def test_another_encoder_than_that_of_the_model_is_refused(source, factors, text_folders, tmp_path):
    loras = read_loras(SPEC, kohya(factors, tmp_path / "lora.safetensors"))
    with pytest.raises(FluxIRError, match=r"does not fit the text encoder in .*: it changes encoder\.block.* that is"):
        load_t5(text_folders.t5, text_folders.t5, 7, "cpu", torch.float32, loras=loras)
    with pytest.raises(FluxIRError, match=r"does not fit the text encoder in .*: it changes text_model\."):
        load_clip(text_folders.clip, text_folders.clip, "cpu", torch.float32, loras=loras)


def test_an_encoder_is_opened_without_being_read(source, plain):
    opened = open_encoder("clip", source.text.clip)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert opened.network.get_parameter(name).is_meta
    target = torch.empty(256, 128)
    opened.read_into(target, name)
    assert torch.equal(target, plain["clip"][name])
