"""Whole prompts through random networks with unequal text and image token counts."""

import itertools

import numpy as np
import pytest
import torch

from flux_ir.demo.drawing import draw
from flux_ir.demo.scenes import scene_at
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.load import load_autoencoder
from flux_ir.models.checkpoints.locate import locate_autoencoder
from flux_ir.models.registry import get_spec
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.denoise import clean_estimate, euler_step
from flux_ir.sampling.generate import check_size, decode, noise_for, prepare, round_trip_error, sample, to_pixels
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import pack
from flux_ir.sampling.schedule import get_schedule

HEIGHT, WIDTH, TXT_TOKENS = 48, 80, 7


def embedding(flux, prompts: int, seed: int = 0) -> TextEmbedding:
    generator = torch.Generator().manual_seed(seed)
    params = flux.params
    txt = torch.randn(prompts, TXT_TOKENS, params.context_in_dim, generator=generator)
    return TextEmbedding(
        txt.to(flux.dtype), torch.randn(prompts, params.vec_in_dim, generator=generator).to(flux.dtype)
    )


def walk(flux, seeds: list[int], text: TextEmbedding, num_steps: int = 3, guidance: float = 2.5):
    noise = noise_for(seeds, HEIGHT, WIDTH, "cpu", flux.dtype)
    return list(sample(flux, prepare(noise, text, HEIGHT, WIDTH), get_schedule(num_steps, 15), guidance))


def test_the_trajectory_equals_the_golden_one(golden, tiny_flux) -> None:
    for name in ("schnell_like", "dev_like"):
        reference = golden(name)
        flux = tiny_flux(guidance=reference.params["guidance_embed"])
        flux.load_state_dict(reference.weights)
        height, width = int(reference.metadata["height"]), int(reference.metadata["width"])
        text = TextEmbedding(reference.tensors["txt"], reference.tensors["vec"])
        inputs = prepare(reference.tensors["noise"], text, height, width)
        timesteps = reference.tensors["timesteps"].tolist()
        for step in sample(flux, inputs, timesteps, float(reference.metadata["guidance"])):
            assert (step.before - reference.tensors[f"x.{step.number}"]).abs().max() <= 1e-5
            assert (step.velocity - reference.tensors[f"pred.{step.number}"]).abs().max() <= 1e-5
        assert (step.after - reference.tensors["x.final"]).abs().max() <= 1e-5


def test_steps_are_chained_and_counted(tiny_flux) -> None:
    flux = tiny_flux()
    steps = walk(flux, [5], embedding(flux, 1), num_steps=4)
    assert [step.number for step in steps] == [0, 1, 2, 3]
    for step, following in itertools.pairwise(steps):
        assert following.before is step.after
        assert following.t_curr == step.t_prev
        assert torch.equal(step.after, euler_step(step.before, step.velocity, step.t_curr, step.t_prev))
    last = steps[-1]
    assert torch.equal(last.after, clean_estimate(last.before, last.velocity, last.t_curr))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_flux) -> None:
    flux = tiny_flux(dtype=torch.bfloat16)
    first, again, other = (walk(flux, [seed], embedding(flux, 1))[-1].after for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_picture_does_not_depend_on_its_batch(tiny_flux) -> None:
    flux = tiny_flux()
    text = embedding(flux, 3)
    together = walk(flux, [1, 2, 3], text)[-1].after
    for i, seed in enumerate([1, 2, 3]):
        alone = walk(flux, [seed], TextEmbedding(text.txt[i : i + 1], text.y[i : i + 1]))[-1].after
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


def test_guidance_matters_only_to_networks_that_embed_it(tiny_flux) -> None:
    for guided in (False, True):
        flux = tiny_flux(guidance=guided)
        weak, strong = (walk(flux, [1], embedding(flux, 1), guidance=g)[-1].after for g in (1.0, 4.0))
        assert torch.equal(weak, strong) is not guided


def test_prompts_and_noise_must_be_as_many(tiny_flux) -> None:
    flux = tiny_flux()
    with pytest.raises(FluxIRError, match="got 2 prompts and noise for 3"):
        prepare(noise_for([1, 2, 3], HEIGHT, WIDTH, "cpu", flux.dtype), embedding(flux, 2), HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("width", "height", "hint"),
    [(100, 64, "--width 96 --height 64"), (64, 0, "--width 64 --height 16"), (-16, 64, "--width 16")],
)
def test_sizes_that_are_no_whole_tokens_are_refused_with_the_nearest(width: int, height: int, hint: str) -> None:
    with pytest.raises(FluxIRError, match=f"got {width} x {height}") as error:
        check_size(height, width)
    assert hint in (error.value.hint or "")


def test_pixels_are_clamped_and_rounded_down_like_the_reference() -> None:
    picture = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).expand(1, 3, 1, 6)
    assert to_pixels(picture)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_a_packed_latent_decodes_to_a_picture_of_the_asked_size(tiny_autoencoder) -> None:
    packed = torch.randn(2, 15, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    assert decode(tiny_autoencoder(), packed, HEIGHT, WIDTH).shape == (2, HEIGHT, WIDTH, 3)


def test_a_saved_picture_says_what_made_it(tmp_path) -> None:
    from PIL import Image

    path = tmp_path / "picture.jpg"
    pixels = torch.zeros(1, 16, 32, 3, dtype=torch.uint8)
    prompt = "a red circle, 50 % \N{GREEK SMALL LETTER ALPHA}"
    path.write_bytes(jpeg_bytes(pixels, model="flux-tiny", prompt=prompt))
    with Image.open(path) as picture:
        exif = picture.getexif()
        assert picture.size == (32, 16)
    assert exif[0x0131] == "AI generated;txt2img;flux"
    assert exif[0x010F] == "Black Forest Labs"
    assert exif[0x0110] == "flux-tiny"
    assert prompt.encode() in path.read_bytes()
    path.write_bytes(jpeg_bytes(pixels))
    with Image.open(path) as picture:
        assert not picture.getexif()


# ---- Autoencoders of another family


def test_an_autoencoder_of_another_family_shows_in_the_latents_it_gives_back() -> None:
    """flux-tiny's own, and one that draws the same pictures from latents 4.2 times as small, as SD3's are."""
    spec = get_spec("flux-tiny")
    own, other = (load_autoencoder(spec, locate_autoencoder(spec), "cpu") for _ in range(2))
    times = 1.5305 / 0.3611
    other.decoder.conv_in.weight *= times
    moments = other.encoder.conv_out
    for half in (moments.weight[: len(moments.weight) // 2], moments.bias[: len(moments.bias) // 2]):
        half /= times
    picture = torch.from_numpy(np.array(draw(scene_at(0, 0))))
    latent = pack(own.encode(picture.permute(2, 0, 1)[None].float() / 127.5 - 1))
    assert round_trip_error(own, latent, 128, 128) < 0.35
    assert round_trip_error(other, latent, 128, 128) > 0.65
