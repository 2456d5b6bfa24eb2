"""A small collection of flux-tiny with pictures, an untrained autoencoder for it, and its features: all of it real."""

import json

import torch
from transformers import CLIPConfig, CLIPModel

import flux_ir
from tests.features.conftest import save_small_sae

PROMPTS = [
    "a red circle",
    "a blue circle",
    "a small red square",
    "a small blue square",
    "a green star",
    "a red star",
]
REPEATS, STEPS, SITE = 2, (1, 2), "single.6"
WIDTH, HEIGHT = 64, 48
IMAGES = len(PROMPTS) * REPEATS


def make_features(folder, *, site=SITE, pictures=True, latents=False, prompts=PROMPTS, examples=True):
    """The folder of features, in `folder`, which also gets the collection and two autoencoders."""
    flux_ir.collect(
        prompts,
        site.split(".txt")[0],
        folder / "captures",
        model="flux-tiny",
        repeats=REPEATS,
        width=WIDTH,
        height=HEIGHT,
        num_steps=3,
        steps=STEPS,
        save_images=pictures,
        save_latents=latents,
        dtype="float32",
    )
    for seed, name in enumerate(("sae", "other")):
        save_small_sae(folder / "saes" / name, site, d=192, steps=STEPS, model="flux-tiny", seed=seed)
    features = flux_ir.score_features(folder / "saes" / "sae", folder / "captures", output_dir=folder / "features")
    return flux_ir.find_examples(features) if examples else features


def files_of(folder):
    """Every file below a folder, with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def save_small_clip(folder, tokenizer=None):
    """A random CLIP as the hub's repositories have it, which reads with the tokenizer of a folder, or not at all."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 12, "max_position_embeddings": 7, "pad_token_id": 0, "eos_token_id": 1}
    vision = sizes | {"image_size": 24, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    for file in [] if tokenizer is None else tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    said = {"crop_size": 24, "size": 24, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder
