"""Text encoders as transformers saved them: fixed length, padding attended to, and notes on what a prompt lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from flux_ir.errors import FluxIRError
from flux_ir.models.text import TextEncoder, encode, load_clip, load_t5
from flux_ir.models.text.tokenizer import PromptTokenizer, load_tokenizer

MAX_TOKENS = 7
PROMPTS = ["a red circle", "a large blue square on a white circle", ""]


@pytest.fixture
def folders(text_folders, tmp_path):
    """A copy that may be broken."""
    for name in ("t5", "clip"):
        shutil.copytree(getattr(text_folders, name), tmp_path / name)
    return text_folders._replace(t5=tmp_path / "t5", clip=tmp_path / "clip")


def t5_of(folders, dtype=torch.float32, max_tokens=MAX_TOKENS) -> TextEncoder:
    return load_t5(folders.t5, folders.t5, max_tokens, "cpu", dtype)


def clip_of(folders, dtype=torch.float32) -> TextEncoder:
    return load_clip(folders.clip, folders.clip, "cpu", dtype)


@torch.no_grad()
def test_the_encoders_give_what_transformers_gives_for_the_padded_prompt(text_folders):
    t5, clip = t5_of(text_folders), clip_of(text_folders)
    ids = torch.tensor([[3, 8, 5, 1, 0, 0, 0]])  # a red circle </s>, then padding
    assert torch.equal(t5.token_ids(["a red circle"]), ids)
    text = encode(t5, clip, ["a red circle"])
    expected = T5EncoderModel.from_pretrained(text_folders.t5)(input_ids=ids).last_hidden_state
    assert torch.equal(text.txt, expected)
    assert torch.equal(text.y, CLIPTextModel.from_pretrained(text_folders.clip)(input_ids=ids).pooler_output)


@torch.no_grad()
def test_padding_is_attended_to(text_folders):
    t5 = t5_of(text_folders)
    ids = t5.token_ids(["a red circle"])
    masked = T5EncoderModel.from_pretrained(text_folders.t5)(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert not torch.allclose(t5(["a red circle"])[:, :4], masked[:, :4], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_prompt_has_the_fixed_length_and_the_dtype_asked_for(text_folders, dtype):
    text = encode(t5_of(text_folders, dtype, max_tokens=12), clip_of(text_folders, dtype), PROMPTS)
    assert text.txt.shape == (3, 12, 40)
    assert text.y.shape == (3, 24)
    assert text.txt.dtype == text.y.dtype == dtype
    assert not text.txt.requires_grad


def test_an_embedding_does_not_depend_on_the_other_prompts(text_folders):
    t5, clip = t5_of(text_folders), clip_of(text_folders)
    together = encode(t5, clip, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encode(t5, clip, [prompt])
        torch.testing.assert_close(alone.txt[0], together.txt[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.y[0], together.y[i], atol=1e-5, rtol=0)
    assert not torch.allclose(together.y[0], together.y[1], atol=1e-3)


def test_encoders_are_finished(text_folders):
    for encoder in (t5_of(text_folders), clip_of(text_folders)):
        assert not encoder.training  # dropout would make two readings differ
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert torch.equal(encoder(PROMPTS), encoder(PROMPTS))


def test_clip_reads_no_further_than_it_has_positions(text_folders):
    assert clip_of(text_folders).token_ids(["a red circle " * 50]).shape == (1, MAX_TOKENS)


# ---- Notes


def test_a_prompt_that_is_understood_needs_no_note(text_folders):
    for encoder in (t5_of(text_folders), clip_of(text_folders)):
        assert encoder.notes("A large RED circle") == []
        assert encoder.notes("") == []


def test_a_prompt_that_is_cut_is_told_by_each_encoder(text_folders, capfd):
    prompt = "a red circle " * 1000
    assert t5_of(text_folders).notes(prompt) == ["the prompt has 3001 tokens and is cut after 7 for T5"]
    assert clip_of(text_folders).notes(prompt) == ["the prompt has 3001 tokens and is cut after 7 for CLIP"]
    assert t5_of(text_folders, max_tokens=3001).notes(prompt) == []
    assert capfd.readouterr().err == ""


def test_unknown_words_are_told_once_with_the_words_that_are_known(text_folders):
    (note,) = t5_of(text_folders, max_tokens=20).notes("a green circle, a green [red]cat[/red]\n\N{CAT}")
    known = ", ".join(sorted(text_folders.vocabulary))
    unknown = "'green', ',', '[', ']', 'cat', '[/', '\N{CAT}'"
    assert note == f"words never seen in training: {unknown}. It knows these words: {known}"


def test_a_flood_of_unknown_words_makes_a_short_note(text_folders):
    t5 = t5_of(text_folders, max_tokens=10**6)
    words = [f"w{number}" for number in range(5000)]
    (note,) = t5.notes(" ".join(words))
    assert "'w19' and 4980 more. It knows" in note
    (note,) = t5.notes("x" * 50_000)
    assert f"'{'x' * 40}'. It knows" in note
    assert len(note) < 300


def test_a_large_vocabulary_is_not_spelt_out(folders):
    tokenizer = json.loads((folders.t5 / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{number}": 12 + number for number in range(100)}
    t5 = t5_of(folders)
    (folders.t5 / "tokenizer.json").write_text(json.dumps(tokenizer))
    t5.tokenizer = load_tokenizer(folders.t5, what="the tokenizer")
    assert t5.notes("a cat") == ["words never seen in training: 'cat'"]


@pytest.mark.parametrize("unknown", [None, "</s>"])
def test_a_tokenizer_that_can_spell_anything_knows_every_word(text_folders, unknown):
    """As CLIP's, whose unknown token is its end of text."""
    vocabulary = {"</s>": 0, "a": 1}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer = PromptTokenizer(backend, end="</s>", padding="</s>", unknown=unknown)
    assert TextEncoder(clip_of(text_folders).model, tokenizer, 7).unknown_words("a cat") == []


# ---- Loading


def test_loading_is_silent_also_where_a_folder_holds_more_than_the_encoder(folders, capfd):
    """T5's decoder, CLIP's picture half."""
    t5_config = T5EncoderModel.from_pretrained(folders.t5).config
    t5_config.decoder_start_token_id = 0
    t5_config.is_encoder_decoder = True
    T5ForConditionalGeneration(t5_config).save_pretrained(folders.t5)
    text_config = CLIPTextModel.from_pretrained(folders.clip).config.to_dict()
    vision_config = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision_config |= {"image_size": 16, "patch_size": 8}
    whole = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=8))
    whole.save_pretrained(folders.clip)
    capfd.readouterr()
    clip, _ = clip_of(folders), t5_of(folders)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    own = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("text_model.")}
    read = clip.model.state_dict()
    assert read.keys() == own.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, own[name])


def test_both_names_of_the_embedding_are_known_and_may_not_differ(folders):
    """Older files have T5's embedding twice, or under the name that it has inside the encoder alone."""
    expected = t5_of(folders)(PROMPTS)
    weights = load_file(folders.t5 / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    save_file(weights, folders.t5 / "model.safetensors")
    assert torch.equal(t5_of(folders)(PROMPTS), expected)
    shared = weights.pop("shared.weight")
    save_file(weights, folders.t5 / "model.safetensors")
    assert torch.equal(t5_of(folders)(PROMPTS), expected)
    save_file({**weights, "shared.weight": shared + 1}, folders.t5 / "model.safetensors")
    with pytest.raises(FluxIRError, match=r"two different tensors for shared\.weight"):
        t5_of(folders)


@pytest.mark.parametrize(
    ("encoder", "change", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-silu"}, r"feed_forward_proj must be gated-gelu .* or relu: got gated-silu"),
        ("t5", {"dense_act_fn": "gelu"}, "must be gated-gelu .with gelu_new. or relu: got relu with gelu"),
        ("t5", {"is_decoder": True}, "is_decoder must be false"),
        ("t5", {"model_type": "umt5"}, "config.json: model_type must be t5 or mt5: got 'umt5'"),
        ("clip", {"model_type": "siglip_text_model"}, "model_type must be clip_text_model or clip: got 'siglip_text"),
        ("t5", {"d_model": "wide"}, "d_model must be a number or word of type .*int.*: got 'wide'"),
        ("clip", {"hidden_act": "relu"}, "hidden_act must be quick_gelu or gelu: got relu"),
        ("clip", {"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads: got 24 and 5"),
    ],
)
def test_a_network_that_is_not_known_is_one_line_that_names_the_option(folders, encoder, change, message):
    path = getattr(folders, encoder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FluxIRError, match=message) as caught:
        {"t5": t5_of, "clip": clip_of}[encoder](folders)
    assert str(path.parent) in caught.value.message


def test_t5_is_never_in_float16(text_folders):
    with pytest.raises(FluxIRError, match="T5 must be in bfloat16 or float32"):
        t5_of(text_folders, torch.float16)


def test_names_without_their_first_level_are_known(folders):
    """As transformers 5 saves a text encoder alone: published files have `text_model.` before every name."""
    expected = clip_of(folders)(PROMPTS)
    path = folders.clip / "model.safetensors"
    published = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    assert published.keys() == clip_of(folders).model.state_dict().keys()
    for state in (published, {name.removeprefix("text_model."): value for name, value in published.items()}):
        save_file(state, path)
        assert torch.equal(clip_of(folders)(PROMPTS), expected)


def test_weights_that_are_missing_are_never_drawn_at_random(folders):
    weights = load_file(folders.t5 / "model.safetensors")
    gone = "encoder.block.1.layer.0.SelfAttention.q.weight"
    del weights[gone]
    save_file(weights, folders.t5 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FluxIRError, match=f"T5Encoder: 1 weights are missing .{gone}") as caught:
        t5_of(folders)
    assert str(folders.t5) in caught.value.message
    assert caught.value.hint == "fetch the whole folder again"


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _other_shape(path):
    weights = load_file(path)
    name = next(iter(weights))
    save_file({**weights, name: torch.zeros(3, 3)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", _cut),
        ("model.safetensors", _other_shape),
        ("model.safetensors", lambda path: path.unlink()),
        ("config.json", lambda path: path.write_text("{")),
        ("tokenizer.json", lambda path: path.unlink()),
    ],
)
def test_a_broken_folder_is_one_clear_error(folders, file, change):
    change(folders.clip / file)
    with pytest.raises(FluxIRError, match=r"cannot be read|is cut short|must be JSON") as caught:
        clip_of(folders)
    assert str(folders.clip) in caught.value.message


def _rewritten(path, change):
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})


def _one_layer_less(config):
    return config | {"num_layers": config["num_layers"] - 1}


def test_layers_that_the_configuration_does_not_have_are_an_error(folders):
    path = folders.t5 / "config.json"
    path.write_text(json.dumps(_one_layer_less(json.loads(path.read_text()))))
    with pytest.raises(FluxIRError, match=r"weights are not of this model \(encoder\.block\.1\.layer"):
        t5_of(folders)


def test_keys_that_no_text_encoder_has_are_an_error(folders):
    _rewritten(folders.clip / "model.safetensors", lambda weights: weights | {"adapter.down": torch.zeros(2)})
    with pytest.raises(FluxIRError, match=r"ClipText: 1 weights are not of this model \(adapter\.down\)"):
        clip_of(folders)


def _scaled(weights, *, apply=True):
    """Matrices as float8 with a scale each, as ComfyUI's t5xxl_fp8_e4m3fn_scaled has them."""
    state = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if not apply else {}
    for name, tensor in weights.items():
        if tensor.ndim == 2 and "layer" in name and "relative" not in name:
            scale = tensor.abs().max() / 448
            values = (tensor / scale).to(torch.float8_e4m3fn)
            state |= {name: values.float() * scale} if apply else {name: values, name[:-6] + "scale_weight": scale}
        else:
            state[name] = tensor
    return state


def test_scales_beside_float8_weights_are_applied(folders):
    original = t5_of(folders)(PROMPTS)
    weights = load_file(folders.t5 / "model.safetensors")
    _rewritten(folders.t5 / "model.safetensors", _scaled)
    expected = t5_of(folders)(PROMPTS)
    save_file(weights, folders.t5 / "model.safetensors")
    _rewritten(folders.t5 / "model.safetensors", lambda state: _scaled(state, apply=False))
    assert torch.equal(t5_of(folders)(PROMPTS), expected)
    assert 0 < (expected - original).norm() / original.norm() < 0.1


def test_codes_are_not_taken_for_weights(folders):
    def coded(weights):
        name = "encoder.block.0.layer.0.SelfAttention.q.weight"
        return weights | {name: torch.zeros(8, dtype=torch.uint8)}

    _rewritten(folders.t5 / "model.safetensors", coded)
    with pytest.raises(FluxIRError, match=r"the text encoder in .* holds quantised weights"):
        t5_of(folders)


def test_the_tokenizer_of_another_model_is_refused(folders):
    tokenizer = json.loads((folders.t5 / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{number}": 12 + number for number in range(100)}
    (folders.t5 / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        FluxIRError, match=r"is not that of the text encoder: it has 112 tokens .* the encoder knows 12"
    ):
        t5_of(folders)


def test_older_pickled_weights_are_read_without_running_code(folders):
    expected = t5_of(folders)(PROMPTS)
    weights = load_file(folders.t5 / "model.safetensors")
    (folders.t5 / "model.safetensors").unlink()
    torch.save(weights, folders.t5 / "pytorch_model.bin")
    assert torch.equal(t5_of(folders)(PROMPTS), expected)
    torch.save({"a": PROMPTS, "b": Tokenizer}, folders.t5 / "pytorch_model.bin")
    with pytest.raises(FluxIRError, match="cannot be read"):
        t5_of(folders)


def test_half_precision_variants_are_taken(folders):
    expected = t5_of(folders)(PROMPTS)
    (folders.t5 / "model.safetensors").rename(folders.t5 / "model.fp16.safetensors")
    assert torch.equal(t5_of(folders)(PROMPTS), expected)
