"""Pictures that a run begins with or refers to: read, fitted, encoded, and sampled from as others sample from them."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxKontextPipeline
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.registry import get_spec
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.generate import check_steps, decode, encode, noise_for, prepare, sample
from flux_ir.sampling.latents import reference_ids, unpack
from flux_ir.sampling.pictures import RunPictures, nearest_size, read_given, settle_pictures
from flux_ir.sampling.schedule import first_step, get_schedule
from tests.models.test_diffusers_oracle import their_autoencoder, their_transformer

HEIGHT, WIDTH, TXT_TOKENS = 48, 80, 7
REFERENCE = (64, 32)  # width, height: 8 tokens beside 15 of the image and 7 of the text


def text_of(flux, prompts=1):
    draw, params = torch.Generator().manual_seed(0), flux.params
    txt = torch.randn(prompts, TXT_TOKENS, params.context_in_dim, generator=draw)
    return TextEmbedding(txt.to(flux.dtype), torch.randn(prompts, params.vec_in_dim, generator=draw).to(flux.dtype))


def start(flux, prompts=1):
    noise = noise_for(list(range(prompts)), HEIGHT, WIDTH, "cpu", flux.dtype)
    return prepare(noise, text_of(flux, prompts), HEIGHT, WIDTH)


def pixels(width, height, seed=0):
    return torch.randint(0, 256, (1, height, width, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def settled(spec="flux-tiny", **given):
    return settle_pictures(get_spec(spec), **given)


# ---- Which steps are run


@pytest.mark.parametrize(
    ("num_steps", "strength", "first"),
    [(4, 1, 0), (4, 0.6, 1), (4, 0.5, 2), (4, 0.1, 3), (10, 0.9, 1), (10, 0.7, 3), (50, 0.95, 2), (28, 0.001, 27)],
)
def test_strength_drops_the_first_steps_and_keeps_one_at_least(num_steps, strength, first):
    assert first_step(num_steps, strength) == first


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(FluxIRError, match=f"--strength must be above 0 and at most 1: got {strength:g}"):
        first_step(4, strength)


def test_steps_before_the_first_one_are_not_to_be_had():
    assert check_steps(None, 5, 2) == [2, 3, 4]
    with pytest.raises(FluxIRError, match=r"has the steps from 2 to 4: got 0, 1 in --steps"):
        check_steps([0, 1, 3], 5, 2)


def test_steps_keep_their_numbers_and_times(tiny_flux):
    flux, times = tiny_flux(), get_schedule(5, 15)
    steps = list(sample(flux, start(flux), times, 2.5, first_step=2))
    assert [step.number for step in steps] == [2, 3, 4]
    assert [step.t_curr for step in steps] == times[2:5]
    for step, following in itertools.pairwise(steps):
        assert following.before is step.after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_strength_1_nothing_of_the_picture_is_left(tiny_flux, tiny_autoencoder, dtype):
    flux, times = tiny_flux(dtype=dtype), get_schedule(3, 15)
    pictures = settled(init_image=pixels(WIDTH, HEIGHT), strength=1.0)
    inputs = pictures.encoded(tiny_autoencoder(), times).put_into(start(flux))
    *_, plain = sample(flux, start(flux), times, 2.5)
    *_, begun = sample(flux, inputs, times, 2.5, first_step=pictures.first_step(3))
    assert torch.equal(plain.after, begun.after)


def test_the_less_strength_the_nearer_the_picture_that_is_begun_with(tiny_flux, tiny_autoencoder):
    flux, autoencoder, times = tiny_flux(), tiny_autoencoder(), get_schedule(8, 15)
    latent = encode(autoencoder, pixels(WIDTH, HEIGHT))
    away = []
    for strength in (0.2, 0.5, 1.0):
        pictures = settled(init_image=pixels(WIDTH, HEIGHT), strength=strength)
        inputs = pictures.encoded(autoencoder, times).put_into(start(flux))
        away.append(float((inputs.img - latent).norm()))
    assert away == sorted(away)


# ---- Against diffusers, on equal weights


def pipeline(kind, flux, autoencoder):
    transformer, vae = their_transformer(flux.params), their_autoencoder(autoencoder.params)
    transformer.load_state_dict(to_diffusers(flux.state_dict(), flux.params), strict=True)
    vae.load_state_dict(to_diffusers(autoencoder.state_dict(), autoencoder.params), strict=True)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = kind(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("num_steps", "strength"), [(4, 0.6), (5, 0.35), (3, 1.0)])
@torch.no_grad()
def test_image_to_image_is_that_of_diffusers(tiny_flux, tiny_autoencoder, num_steps, strength):
    flux, autoencoder = tiny_flux(guidance=True), tiny_autoencoder()
    text, times = text_of(flux), get_schedule(num_steps, 15)
    packed = encode(autoencoder, pixels(WIDTH, HEIGHT))
    theirs = pipeline(FluxImg2ImgPipeline, flux, autoencoder)(
        prompt_embeds=text.txt,
        pooled_prompt_embeds=text.y,
        image=unpack(packed, HEIGHT, WIDTH),  # the latent: from pixels their pipeline draws one at random
        height=HEIGHT,
        width=WIDTH,
        strength=strength,
        num_inference_steps=num_steps,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    noise = torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
    first = first_step(num_steps, strength)
    inputs = prepare(noise, text, HEIGHT, WIDTH).begun_with(packed, times[first])
    steps = list(sample(flux, inputs, times, 2.5, first_step=first))
    assert len(steps) == num_steps - first
    torch.testing.assert_close(steps[-1].after, theirs, rtol=0, atol=2e-4)


@torch.no_grad()
def test_a_reference_picture_is_that_of_diffusers(tiny_flux, tiny_autoencoder):
    """Text 7, image 15, reference 8 tokens. Their pipeline encodes the reference by its mean, as ours does."""
    flux, autoencoder = tiny_flux(guidance=True), tiny_autoencoder()
    text, times = text_of(flux), get_schedule(3, 15)
    packed = encode(autoencoder, pixels(*REFERENCE))
    inputs = start(flux)
    theirs = pipeline(FluxKontextPipeline, flux, autoencoder)(
        prompt_embeds=text.txt,
        pooled_prompt_embeds=text.y,
        image=pixels(*REFERENCE).permute(0, 3, 1, 2).float() / 255,
        height=HEIGHT,
        width=WIDTH,
        max_area=HEIGHT * WIDTH,
        latents=inputs.img,
        num_inference_steps=3,
        guidance_scale=2.5,
        output_type="latent",
        _auto_resize=False,
    ).images
    *_, last = sample(flux, inputs.with_reference(packed, REFERENCE[1], REFERENCE[0]), times, 2.5)
    torch.testing.assert_close(last.after, theirs, rtol=0, atol=2e-4)
    *_, without = sample(flux, inputs, times, 2.5)
    assert (without.after - theirs).abs().max() > 1e-2


def test_positions_of_a_reference_have_1_before_row_and_column():
    ids = reference_ids(2, 32, 64)
    assert ids.shape == (2, 8, 3)
    assert set(ids[..., 0].flatten().tolist()) == {1.0}
    assert ids[1, 5].tolist() == [1, 1, 1]


def test_several_prompts_refer_to_the_same_picture(tiny_flux, tiny_autoencoder):
    flux, times = tiny_flux(), get_schedule(2, 15)
    cond = encode(tiny_autoencoder(), pixels(*REFERENCE))
    together = start(flux, 2).with_reference(cond, 32, 64)
    *_, both = sample(flux, together, times, 1.0)
    text, noise = text_of(flux, 2), noise_for([1], HEIGHT, WIDTH, "cpu", flux.dtype)
    second = prepare(noise, TextEmbedding(text.txt[1:], text.y[1:]), HEIGHT, WIDTH).with_reference(cond, 32, 64)
    *_, alone = sample(flux, second, times, 1.0)
    torch.testing.assert_close(both.after[1:], alone.after, atol=1e-5, rtol=0)


# ---- Encoding


def test_encoding_is_the_mean_latent_packed_and_the_same_in_any_batch(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    batch = torch.cat([pixels(WIDTH, HEIGHT, seed) for seed in range(3)])
    packed = encode(autoencoder, batch)
    assert packed.shape == (3, 15, 64)
    assert not packed.requires_grad
    with torch.no_grad():
        expected = autoencoder.encode(batch.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(unpack(packed, HEIGHT, WIDTH), expected, atol=1e-5, rtol=0)
    assert torch.equal(packed[1:2], encode(autoencoder, batch[1:2]))
    assert decode(autoencoder, packed, HEIGHT, WIDTH).shape == batch.shape


# ---- What is given


def test_a_file_pillow_and_pixels_are_the_same_picture(tmp_path):
    given = pixels(32, 16)
    picture = Image.fromarray(given[0].numpy())
    picture.save(tmp_path / "picture.png")
    read = [read_given(one, "init_image") for one in (tmp_path / "picture.png", picture, given)]
    assert len({one.digest() for one in read}) == 1
    assert (read[0].width, read[0].height) == (32, 16)
    assert read[0].path == str(tmp_path / "picture.png")
    assert read[1].path is read[2].path is None
    assert read_given(pixels(16, 32), "init_image").digest() != read[0].digest()


def test_a_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels(32, 16)[0].numpy()).save(tmp_path / "turned.jpg", exif=exif)
    read = read_given(tmp_path / "turned.jpg", "init_image")
    assert (read.width, read.height) == (16, 32)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_opaque_pictures_of_8_bits_are_taken_in_any_mode(mode):
    picture = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    assert read_given(picture, "init_image").pixels.min() >= 254


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (Image.new("RGBA", (16, 16), (0, 0, 0, 254)), "takes opaque pictures: the picture has transparent pixels"),
        (Image.fromarray(np.zeros((16, 16), np.uint16)), "8 bits per channel: the picture has the mode I;16"),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), r"one picture, uint8 .*: got torch.uint8 \[2, 16, 16, 3\]"),
        (torch.zeros(1, 16, 16, 3), r"one picture, uint8 .*: got torch.float32 \[1, 16, 16, 3\]"),
    ],
)
def test_what_would_be_changed_silently_is_refused(picture, told):
    with pytest.raises(FluxIRError, match=told):
        read_given(picture, "init_image")


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_file_that_is_no_picture_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "it.png").write_bytes(content)
    with pytest.raises(FluxIRError, match=r"cannot read the picture of --reference_image in .*it\.png"):
        read_given(tmp_path / "it.png", "reference_image")


# ---- What fits together


def test_the_run_has_the_size_of_the_picture_it_begins_with():
    spec, pictures = get_spec("flux-tiny"), settled(init_image=pixels(64, 32))
    assert pictures.side_px(None, None, spec) == (64, 32)
    assert pictures.side_px(64, None, spec) == (64, 32)
    assert settled().side_px(None, 32, spec) == (128, 32)
    with pytest.raises(FluxIRError, match="must have the size of the run, 32 x 32 px: got 64 x 32 px") as error:
        pictures.side_px(32, None, spec)
    assert error.value.hint.endswith("--width 64 --height 32")


def test_a_picture_of_no_whole_tokens_is_never_cut_unasked():
    with pytest.raises(FluxIRError, match="multiples of 16 px: got 70 x 32 px") as error:
        settled(init_image=pixels(70, 32)).side_px(None, None, get_spec("flux-tiny"))
    assert error.value.hint.startswith("cut it to 64 x 32 px")


def test_strength_without_a_picture_is_refused():
    with pytest.raises(FluxIRError, match=r"got 0\.5, and no --init_image"):
        settled(strength=0.5)


def test_a_model_that_takes_no_reference_says_which_does():
    with pytest.raises(FluxIRError, match="flux-tiny takes no reference picture") as error:
        settled(reference_image=pixels(64, 32))
    assert "flux-dev-kontext" in error.value.hint
    with pytest.raises(FluxIRError, match="--keep_reference_size is of a --reference_image: got none"):
        settled(keep_reference_size=True)


@pytest.mark.parametrize(
    ("size", "fitted"), [((1024, 1024), (1024, 1024)), ((640, 480), (1184, 880)), ((300, 900), (672, 1568))]
)
def test_a_reference_is_fitted_to_the_trained_size_of_the_nearest_proportions(size, fitted):
    pictures = settled("flux-dev-kontext", reference_image=pixels(*size))
    assert (pictures.reference.width, pictures.reference.height) == fitted
    assert pictures.cond_tokens == fitted[0] * fitted[1] // 256
    assert pictures.side_px(None, None, get_spec("flux-dev-kontext")) == fitted
    assert pictures.side_px(512, 256, get_spec("flux-dev-kontext")) == (512, 256)
    notes = pictures.notes([1.0, 0.5, 0.0])
    assert len(notes) == (size != fitted)
    assert all(f"of {size[0]} x {size[1]} px is fitted to {fitted[0]} x {fitted[1]} px" in note for note in notes)


def test_a_reference_can_keep_its_size_if_it_has_whole_tokens():
    kept = settled("flux-dev-kontext", reference_image=pixels(64, 32), keep_reference_size=True)
    assert kept.cond_tokens == 8
    assert kept.notes([1.0, 0.0]) == []
    with pytest.raises(FluxIRError, match="multiples of 16 px: got 70 x 32 px") as error:
        settled("flux-dev-kontext", reference_image=pixels(70, 32), keep_reference_size=True)
    assert "it is fitted" in error.value.hint


def test_sizes_of_kontext_are_about_a_megapixel_in_whole_tokens():
    sizes = get_spec("flux-dev-kontext").reference_sizes
    assert len(set(sizes)) == 17
    assert set(sizes) == {(height, width) for width, height in sizes}
    assert all(width % 16 == height % 16 == 0 and abs(width * height / 2**20 - 1) < 0.02 for width, height in sizes)
    assert [nearest_size(width, height, sizes) for width, height in sizes] == list(sizes)


def test_what_is_known_of_the_pictures_is_described():
    assert RunPictures().described([1.0, 0.0]) == {}
    said = settled(init_image=pixels(32, 16), strength=0.5).described([1.0, 0.8, 0.5, 0.2, 0.0])
    assert said["init_image"] | {"digest": ""} == {
        "digest": "",
        "path": None,
        "width": 32,
        "height": 16,
        "strength": 0.5,
        "first_step": 2,
        "t": 0.5,
    }


def test_notes_say_which_steps_are_run():
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    (note,) = settled(init_image=pixels(32, 16), strength=0.5).notes(times)
    assert note == "begun with a picture of 32 x 16 px at strength 0.5: steps 2 to 3 of 4, from t 0.5"
    assert "step 3 alone of 4, from t 0.25" in settled(init_image=pixels(32, 16), strength=0.1).notes(times)[0]
    assert "nothing of --init_image is left" in settled(init_image=pixels(32, 16), strength=1.0).notes(times)[1]
