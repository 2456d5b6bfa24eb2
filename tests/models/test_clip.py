"""CLIP from a folder that transformers wrote: the picture half's hidden_states[-2], and its own preprocessing."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from flux_ir.errors import FluxIRError
from flux_ir.models.clip import (
    choose_tokens,
    load_picture_tower,
    load_vision,
    locate_clip,
    read_pixels,
    read_preprocessing,
    tokens_of,
)
from flux_ir.models.text import load_phrase_tower

SIDE_PX, PATCH_PX, WIDTH, PATCHES = 24, 8, 20, 9
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def shared_clip(tmp_path_factory, text_folders):
    """A small CLIP with both halves, as the hub's repositories have it."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 7, "pad_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": WIDTH, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": SIDE_PX, "patch_size": PATCH_PX}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    for file in text_folders.clip.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    said = {"crop_size": SIDE_PX, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": SIDE_PX}
    said |= {"image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def clip(shared_clip, tmp_path):
    """A copy that may be broken."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in shared_clip.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def picture(path, width=40, height=30, seed=0, **kwargs):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_tokens_are_the_hidden_states_before_the_last_layer(shared_clip, dtype):
    pixels = torch.randn(3, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1))
    whole = CLIPVisionModel.from_pretrained(shared_clip, dtype=dtype)
    expected = whole(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states[-2]
    vision = load_vision(shared_clip, "cpu", dtype)
    tokens = vision(pixels)
    assert torch.equal(tokens, expected)
    assert tokens.shape == (3, 1 + PATCHES, WIDTH) == (3, tokens_of(vision.params, "all"), vision.params.hidden_size)
    assert not tokens.requires_grad


def test_the_last_layer_is_not_kept(shared_clip):
    layers = {
        name.split("layers.")[1][0]
        for name in load_vision(shared_clip, "cpu", torch.float32).state_dict()
        if "layers." in name
    }
    assert layers == {"0", "1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_pictures_in_the_shared_space_are_those_of_transformers(shared_clip, dtype):
    pixels = torch.randn(3, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = CLIPVisionModelWithProjection.from_pretrained(shared_clip, dtype=dtype, projection_dim=8)
    ours = load_picture_tower(shared_clip, "cpu", dtype)(pixels)
    assert torch.equal(ours, theirs(pixel_values=pixels).image_embeds)
    assert ours.shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_texts_in_the_shared_space_are_those_of_transformers(shared_clip, dtype):
    theirs = CLIPTextModelWithProjection.from_pretrained(shared_clip, dtype=dtype, projection_dim=8)
    tower = load_phrase_tower(shared_clip, "cpu", dtype)
    prompts = ["a red circle", "blue"]
    ours = tower(prompts)
    assert torch.equal(ours, theirs(input_ids=tower.token_ids(prompts)).text_embeds)
    assert ours.shape == (2, 8)


def test_a_tower_without_its_projection_has_no_place_in_the_shared_space(clip):
    weights = load_file(clip / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "visual" not in name}, clip / "model.safetensors")
    with pytest.raises(FluxIRError, match=r"1 weights are missing \(visual_projection.weight\)"):
        load_picture_tower(clip, "cpu", torch.float32)
    weights = load_file(clip / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "text_proj" not in name}, clip / "model.safetensors")
    with pytest.raises(FluxIRError, match=r"1 weights are missing \(text_projection.weight\)"):
        load_phrase_tower(clip, "cpu", torch.float32)


def test_the_class_token_comes_first_and_the_patches_after(shared_clip):
    tokens = torch.arange(2 * 10 * 4.0).view(2, 10, 4)
    assert torch.equal(choose_tokens(tokens, "cls"), tokens[:, :1])
    assert torch.equal(choose_tokens(tokens, "patches"), tokens[:, 1:])
    assert torch.equal(choose_tokens(tokens, "all"), tokens)
    params = load_vision(shared_clip, "cpu", torch.float32).params
    assert [tokens_of(params, choice) for choice in ("cls", "patches", "all")] == [1, PATCHES, 1 + PATCHES]


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (24, 24), (9, 70), (25, 24)])
def test_pixels_are_those_of_transformers(shared_clip, tmp_path, width, height):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    path = picture(tmp_path / "p.png", width, height)
    expected = processor.from_pretrained(shared_clip)(Image.open(path), return_tensors="pt")["pixel_values"][0]
    pixels = read_pixels(path, read_preprocessing(shared_clip))
    assert pixels.shape == (3, SIDE_PX, SIDE_PX)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_both_spellings_of_the_preprocessing_are_read(clip):
    before = read_preprocessing(clip)
    said = json.loads((clip / "preprocessor_config.json").read_text())
    said |= {"size": {"shortest_edge": SIDE_PX}, "crop_size": {"height": SIDE_PX, "width": SIDE_PX}}
    (clip / "preprocessor_config.json").unlink()
    (clip / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    assert read_preprocessing(clip) == before
    assert locate_clip(str(clip)) == clip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "leaves out do_center_crop"),
        ({"size": None}, "no usable"),
        ({"image_mean": 3}, "no usable"),
    ],
)
def test_other_preprocessing_is_refused(clip, change, message):
    said = json.loads((clip / "preprocessor_config.json").read_text()) | change
    (clip / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(FluxIRError, match=message):
        read_preprocessing(clip)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_every_mode_become_three_channels(shared_clip, tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (30, 30), (200, 10, 10)).convert(mode).save(tmp_path / f"p.{suffix}")
    assert read_pixels(tmp_path / f"p.{suffix}", read_preprocessing(shared_clip)).shape == (3, SIDE_PX, SIDE_PX)


def test_pictures_are_turned_upright(shared_clip, tmp_path):
    preprocessing = read_preprocessing(shared_clip)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright, turned = tmp_path / "a.png", tmp_path / "b.png"
    picture(upright, 24, 24)
    Image.open(upright).rotate(180).save(turned, exif=exif)
    assert torch.equal(read_pixels(turned, preprocessing), read_pixels(upright, preprocessing))


def test_a_picture_cut_short_and_a_file_that_is_none_are_named(shared_clip, tmp_path):
    preprocessing = read_preprocessing(shared_clip)
    for path in (picture(tmp_path / "cut.png"), picture(tmp_path / "cut.jpg")):
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(FluxIRError, match=rf"{path.name} must be a picture that can be read"):
            read_pixels(path, preprocessing)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(FluxIRError, match=r"text\.jpg must be a picture"):
        read_pixels(tmp_path / "text.jpg", preprocessing)


def test_a_checkpoint_that_lacks_weights_is_refused(clip):
    weights = load_file(clip / "model.safetensors")
    name = next(name for name in weights if name.startswith("vision_model") and "layers.1" in name)
    save_file({key: value for key, value in weights.items() if key != name}, clip / "model.safetensors")
    with pytest.raises(FluxIRError, match=r"the CLIP model in .* ClipVision: 1 weights are missing"):
        load_vision(clip, "cpu", torch.float32)


def test_pictures_of_another_size_are_refused(shared_clip):
    vision = load_vision(shared_clip, "cpu", torch.float32)
    with pytest.raises(FluxIRError, match="pictures must be 24 x 24 px: got 24 x 16"):
        vision(torch.zeros(1, 3, 16, 24))


def test_a_broken_checkpoint_is_one_error(clip):
    path = clip / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FluxIRError, match=r"clip/model\.safetensors is cut short"):
        load_vision(clip, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("preprocessor_config.json", "no preprocessor_config.json"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_says_what_it_lacks(clip, missing, message):
    (clip / missing).unlink()
    with pytest.raises(FluxIRError, match=f"is incomplete: {message}"):
        locate_clip(str(clip))


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "https://example.com/clip"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name):
    with pytest.raises(FluxIRError, match="--clip must be a folder or a repository of the hub"):
        locate_clip(name)


def test_a_repository_is_taken_from_the_cache(hub_cache, shared_clip):
    snapshot = hub_cache("somebody/clip", shared_clip)
    assert locate_clip("somebody/clip") == snapshot


def test_without_cache_and_network_the_error_names_the_flag(hub_cache, clip):
    (clip / "preprocessor_config.json").unlink()
    hub_cache("somebody/half", clip)
    with pytest.raises(FluxIRError, match="HF_HUB_OFFLINE forbids") as raised:
        locate_clip("somebody/half")
    assert raised.value.hint == "or name a local copy of the whole folder with --clip"
