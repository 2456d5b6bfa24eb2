"""Reading blocks through a real capture file: the invariants of the lens, and its agreement with the reference."""

from dataclasses import dataclass

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.lens.readout import image_outputs, read_step, readable_sites, velocity_at
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.reader import Capture, load_capture
from flux_ir.recording.recorder import Recorder
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sampling.denoise import Step
from flux_ir.sampling.generate import noise_for, prepare, sample
from flux_ir.sampling.schedule import get_schedule
from flux_ir.sites import Site, all_sites, block_outputs, match_sites

HEIGHT, WIDTH, TXT_TOKENS, GUIDANCE = 64, 48, 7, 3.5
LAST = Site("single", 2)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
BOTH_KINDS = pytest.mark.parametrize("guidance", [False, True])


@dataclass(frozen=True)
class Recording:
    """A walk of the sampler and what was captured of it."""

    model: Flux
    steps: list[Step]
    capture: Capture


def start(model, batch=1, num_steps=4, *, reference=False):
    """Random inputs for the sampler, and its times."""
    draw, params = torch.Generator().manual_seed(3), model.params
    txt = torch.randn(batch, TXT_TOKENS, params.context_in_dim, generator=draw)
    y = torch.randn(batch, params.vec_in_dim, generator=draw)
    noise = noise_for(list(range(batch)), HEIGHT, WIDTH, "cpu", model.dtype)
    inputs = prepare(noise, TextEmbedding(txt.to(model.dtype), y.to(model.dtype)), HEIGHT, WIDTH)
    if reference:  # of 2 x 4 tokens, beside 12 of the image and 7 of the text
        inputs = inputs.with_reference(torch.randn(1, 8, params.in_channels, generator=draw), 32, 64)
    return inputs, get_schedule(num_steps, inputs.img.shape[1])


@pytest.fixture
def record(tmp_path):
    """Walks from noise to image with a capture file listening."""

    def walk(model, sites=None, *, kept=None, batch=1, reference=False, first_step=0):
        inputs, times = start(model, batch, reference=reference)
        blocks = model.params.depth, model.params.depth_single_blocks
        chosen = block_outputs(*blocks) if sites is None else match_sites(sites, all_sites(*blocks))
        planned = CapturePlan(
            model.params,
            chosen,
            times,
            txt_tokens=TXT_TOKENS,
            img_tokens=inputs.img.shape[1],
            guidance=GUIDANCE,
            metadata={},
            steps=kept,
            dtype=model.dtype,
            batch=batch,
            cond_tokens=8 if reference else 0,
        )
        path = tmp_path / f"capture_{len(list(tmp_path.iterdir()))}.pt"
        recorder = {"steps": planned.kept_steps, "first_step": first_step}
        with CaptureWriter(path, planned) as sink, Recorder(model, chosen, sink, **recorder):
            steps = list(sample(model, inputs, times, GUIDANCE, first_step=first_step))
        return Recording(model, steps, load_capture(path))

    return walk


def read(recording, step):
    return {reading.site: reading for reading in read_step(recording.model, recording.capture, step)}


@BOTH_DTYPES
@BOTH_KINDS
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("reference", [False, True])
def test_last_block_readout_equals_the_sampler_step(record, tiny_flux, dtype, guidance, batch, reference):
    """Also where the tokens of a reference picture stand behind those of the image: a lens reads none of them."""
    recording = record(tiny_flux(guidance=guidance, dtype=dtype), batch=batch, reference=reference)
    for step in recording.steps:
        readings = read(recording, step.number)
        assert torch.equal(readings[LAST].velocity, step.velocity)
        assert torch.equal(readings[LAST].euler, step.after)
        others = [reading for site, reading in readings.items() if site != LAST]
        assert len(others) == 4
        assert not any(torch.equal(reading.euler, step.after) for reading in others)


@BOTH_DTYPES
def test_a_run_from_a_later_step_on_is_read_by_the_numbers_of_the_whole_schedule(record, tiny_flux, dtype):
    recording = record(tiny_flux(dtype=dtype), kept=[2, 3], first_step=2)
    assert recording.capture.steps == [step.number for step in recording.steps] == [2, 3]
    for step in recording.steps:
        assert recording.capture.context(step.number).t_curr == step.t_curr
        assert torch.equal(read(recording, step.number)[LAST].euler, step.after)


@BOTH_DTYPES
@BOTH_KINDS
def test_both_lenses_coincide_at_the_last_step_and_only_there(record, tiny_flux, dtype, guidance):
    recording = record(tiny_flux(guidance=guidance, dtype=dtype))
    for step in recording.steps:
        last = step is recording.steps[-1]
        for reading in read(recording, step.number).values():
            size = reading.euler.abs().max().item()
            off = (reading.euler - reading.x0).abs().max().item()
            assert (off <= torch.finfo(dtype).eps * size) is last


def test_x0_is_where_the_straight_line_ends(record, tiny_flux):
    recording = record(tiny_flux())
    for step in recording.steps:
        for reading in read(recording, step.number).values():
            torch.testing.assert_close(reading.x0, step.before - step.t_curr * reading.velocity)
            way = (reading.x0 - step.before) * (step.t_curr - step.t_prev) / step.t_curr
            torch.testing.assert_close(reading.euler, step.before + way, atol=1e-5, rtol=1e-5)
            assert torch.equal(reading.latent("x0"), reading.x0)
            assert torch.equal(reading.latent("euler"), reading.euler)


@BOTH_DTYPES
def test_capturing_changes_no_bit_of_what_is_sampled(record, tiny_flux, dtype):
    model = tiny_flux(guidance=True, dtype=dtype)
    plain = list(sample(model, *start(model), GUIDANCE))
    captured = record(model, ["*"]).steps
    for one, other in zip(captured, plain, strict=True):
        assert torch.equal(one.velocity, other.velocity)
        assert torch.equal(one.after, other.after)


@pytest.mark.parametrize("name", ["schnell_like", "dev_like"])
def test_every_reading_equals_the_golden_one(golden, tiny_flux, tmp_path, name):
    reference = golden(name)
    tensors, metadata = reference.tensors, reference.metadata
    model = tiny_flux(guidance=reference.params["guidance_embed"])
    model.load_state_dict(reference.weights)
    height, width = int(metadata["height"]), int(metadata["width"])
    inputs = prepare(tensors["noise"], TextEmbedding(tensors["txt"], tensors["vec"]), height, width)
    times, guidance, sites = tensors["timesteps"].tolist(), float(metadata["guidance"]), block_outputs(2, 3)
    planned = CapturePlan(
        model.params,
        sites,
        times,
        txt_tokens=inputs.txt.shape[1],
        img_tokens=inputs.img.shape[1],
        guidance=guidance,
        metadata={},
        dtype=torch.float32,
    )
    with CaptureWriter(tmp_path / "c.pt", planned) as sink, Recorder(model, sites, sink):
        for _ in sample(model, inputs, times, guidance):
            pass
    capture = load_capture(tmp_path / "c.pt")
    compared = 0
    for step in capture.steps:
        for reading in read_step(model, capture, step):
            expected = tensors[f"lens.{reading.site.kind}.{reading.site.block}.{step}"]
            assert (reading.euler - expected).abs().max() <= 1e-5
            compared += 1
    assert compared == sum(key.startswith("lens.") for key in tensors) > 0


@BOTH_DTYPES
def test_lone_halves_read_like_the_blocks_they_are_of(record, tiny_flux, dtype):
    model = tiny_flux(dtype=dtype)
    whole = record(model)
    halves = record(model, ["double.1.img", "single.2.img", "single.0.img"])
    assert halves.capture.sites == readable_sites(halves.capture)
    for step in range(4):
        expected = read(whole, step)
        for site, reading in read(halves, step).items():
            close = expected[site.whole].euler
            torch.testing.assert_close(reading.euler, close, atol=4 * torch.finfo(dtype).eps, rtol=1e-2)


def test_steps_are_read_with_their_own_times_where_only_some_were_kept(record, tiny_flux):
    recording = record(tiny_flux(), kept=[1, 3])
    assert recording.capture.steps == [1, 3]
    for number in (1, 3):
        reading = read(recording, number)[LAST]
        assert reading.step == number
        assert torch.equal(reading.euler, recording.steps[number].after)
    with pytest.raises(FluxIRError, match="step 2 was not captured"):
        read(recording, 2)


def test_readings_come_in_depth_order(record, tiny_flux):
    sites = list(read(record(tiny_flux()), 0))
    assert list(map(str, sites)) == ["double.0.img", "double.1.img", "single.0", "single.1", "single.2"]


@pytest.mark.parametrize(
    ("captured", "readable"),
    [
        (["*"], ["double.0.img", "double.1.img", "single.0", "single.1", "single.2"]),
        (["single.1.img", "single.1", "single.0.img"], ["single.0.img", "single.1"]),
        (["double.*.txt", "single.1.txt", "double.1.img.mlp", "single.0.update", "single.2.out"], []),
    ],
)
def test_one_image_output_of_each_block_can_be_read(captured, readable):
    assert [str(site) for site in image_outputs(match_sites(captured, all_sites(2, 3)))] == readable


def test_a_capture_without_image_outputs_is_refused(record, tiny_flux):
    recording = record(tiny_flux(), ["double.0.txt", "single.*.update"])
    with pytest.raises(FluxIRError) as caught:
        read(recording, 0)
    assert "holds none: it has double.0.txt and such" in caught.value.message
    assert str(recording.capture.path) in caught.value.message
    assert "double.*.img" in (caught.value.hint or "")


def test_a_block_without_image_tokens_is_refused(tiny_flux, tiny_inputs):
    model, inputs = tiny_flux(), tiny_inputs()
    vec = model.conditioning(inputs.timesteps, inputs.y)
    block_output = torch.zeros(1, 19, 64)
    assert velocity_at(model, block_output, vec, txt_tokens=7).shape == (1, 12, 64)
    with pytest.raises(FluxIRError, match="the block output has 19 tokens and txt_tokens is 19"):
        velocity_at(model, block_output, vec, txt_tokens=19)
