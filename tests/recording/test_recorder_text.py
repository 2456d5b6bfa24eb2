"""Layers of the text encoders: heard once per prompt, written once into the capture, read without a step."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPTextModel, T5EncoderModel

from flux_ir.activations.source import open_source
from flux_ir.errors import FluxIRError
from flux_ir.lens.readout import readable_sites
from flux_ir.models.suite import TextEncoders
from flux_ir.models.text import encode, load_clip, load_t5
from flux_ir.recording.intervention import TextIntervention
from flux_ir.recording.plan import capture_bytes
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import MemorySink, Recorder, TextRecorder
from flux_ir.recording.writer import CaptureWriter, file_bytes
from flux_ir.sites import Site

PROMPTS = ["a red circle", ""]
T5, CLIP = (9, 40), (7, 24)  # tokens and width


@pytest.fixture(scope="module")
def encoders(text_folders):
    return TextEncoders(
        load_t5(text_folders.t5, text_folders.t5, T5[0], "cpu", torch.float32),
        load_clip(text_folders.clip, text_folders.clip, "cpu", torch.float32),
    )


def hooks_of(encoders):
    return sum(len(module._forward_hooks) for encoder in encoders for module in encoder.modules())


@torch.no_grad()
def test_layers_are_the_hidden_states_of_transformers_padding_and_all(encoders, text_folders):
    with TextRecorder(encoders, "t5.*, clip.*") as recorder:
        encode(*encoders, PROMPTS)
    t5, clip = T5EncoderModel.from_pretrained(text_folders.t5), CLIPTextModel.from_pretrained(text_folders.clip)
    states = {
        "t5": t5(input_ids=encoders.t5.token_ids(PROMPTS), output_hidden_states=True).hidden_states,
        "clip": clip(input_ids=encoders.clip.token_ids(PROMPTS), output_hidden_states=True).hidden_states,
    }
    for name in ("t5.0", "clip.0", "clip.1"):
        kind, layer = name.split(".")
        assert torch.equal(recorder.sink.read(name), states[kind][int(layer) + 1]), name
    last = recorder.sink.read("t5.1")  # transformers has the norm behind it in its last state
    assert torch.equal(encoders.t5.model.encoder.final_layer_norm(last), states["t5"][2])
    assert list(map(str, recorder.sites)) == ["t5.0", "t5.1", "clip.0", "clip.1"]
    assert repr(recorder.sink) == "<MemorySink: 0 sites, 0 steps, 4 layers of text encoders>"


def test_recording_changes_no_bit_and_leaves_no_hook(encoders):
    expected = encode(*encoders, PROMPTS)
    with TextRecorder(encoders, ["t5.1", Site("clip", 0)]):
        heard = encode(*encoders, PROMPTS)
    assert torch.equal(heard.txt, expected.txt)
    assert torch.equal(heard.y, expected.y)
    with pytest.raises(ZeroDivisionError), TextRecorder(encoders, "t5.0"):
        raise ZeroDivisionError
    assert hooks_of(encoders) == 0


def test_a_layer_that_never_ran_and_one_that_is_not_there_are_named(encoders):
    with pytest.raises(FluxIRError, match=r"no prompt was encoded .* to be recorded: t5\.0, clip\.1"):  # noqa: SIM117
        with TextRecorder(encoders, "t5.0, clip.1"):
            pass
    with pytest.raises(FluxIRError, match=r"no site of this model matches 't5\.2'"):
        TextRecorder(encoders, "t5.2")
    assert hooks_of(encoders) == 0


def test_a_sink_in_memory_says_what_it_has_and_how_it_is_read(encoders):
    with TextRecorder(encoders, "t5.*") as recorder:
        encode(*encoders, PROMPTS)
    with pytest.raises(FluxIRError, match=r"clip\.1 was not recorded .*t5\.1"):
        recorder.sink.read("clip.1")
    with pytest.raises(FluxIRError, match=r"t5\.1 is recorded once per prompt and has no step: got 2"):
        recorder.sink.read("t5.1", 2)
    with pytest.raises(FluxIRError, match=r"single\.0 is recorded at every step: got none"):
        MemorySink().read("single.0")


# ---- In the capture file


@pytest.fixture
def layers(plan):
    """A plan with two layers beside it."""
    return lambda sites=None, **changes: plan(
        sites, text_sites={Site.parse("clip.1"): CLIP, Site.parse("t5.0"): T5}, **changes
    )


def write(path, plan, encoders, model, inputs, prompts=PROMPTS[:1]):
    with (
        CaptureWriter(path, plan) as writer,
        TextRecorder(encoders, list(plan.text_sites), writer),
        Recorder(model, plan.sites, writer),
    ):
        encode(*encoders, prompts)
        for _ in range(len(plan.timesteps) - 1):
            model(*inputs)


def test_layers_come_back_from_the_file_once_and_beside_the_sites(tmp_path, layers, encoders, tiny_flux, tiny_inputs):
    plan, path = layers(["single.0", "double.0.img"]), tmp_path / "c.pt"
    write(path, plan, encoders, tiny_flux(), tiny_inputs())
    with TextRecorder(encoders, list(plan.text_sites)) as recorder:
        encode(*encoders, PROMPTS[:1])
    capture = load_capture(path)
    assert list(map(str, capture.text_sites)) == ["t5.0", "clip.1"]
    assert list(map(str, capture.sites)) == ["double.0.img", "single.0"]
    assert capture.metadata["sites"] == ["t5.0", "clip.1", "double.0.img", "single.0"]
    for site in capture.text_sites:
        assert torch.equal(capture.read(site), recorder.sink.read(site))
        assert capture.shape(site) == plan.shape(site) == tuple(capture.read(site).shape)
    file = torch.load(path, weights_only=True, mmap=True)
    assert list(file["text_sites"]) == ["t5.0", "clip.1"]
    assert torch.equal(file["text_sites"]["clip.1"], capture.read("clip.1"))
    assert path.stat().st_size == file_bytes(plan)
    without = replace(plan, text_sites={})
    assert capture_bytes(plan) - capture_bytes(without) == (T5[0] * T5[1] + CLIP[0] * CLIP[1]) * 4
    assert list(open_source(path).sites) == capture.sites  # what has steps


def test_a_capture_may_hold_layers_alone(tmp_path, layers, encoders, tiny_flux, tiny_inputs):
    path = tmp_path / "c.pt"
    write(path, replace(layers(), sites=()), encoders, tiny_flux(), tiny_inputs())
    capture = load_capture(path)
    assert (capture.sites, capture.dtype) == ([], torch.float32)
    assert capture.read("t5.0").shape == (1, *T5)
    with pytest.raises(FluxIRError, match=r"holds no site of the transformer, only t5\.0, clip\.1"):
        open_source(path)
    with pytest.raises(FluxIRError, match=r"a lens reads image outputs .* it has t5\.0 and such"):
        readable_sites(capture)


def test_float8_layers_have_a_scale_per_token(tmp_path, layers, encoders, tiny_flux, tiny_inputs):
    path = tmp_path / "c.pt"
    plan = layers(dtype=torch.float8_e4m3fn, rounds=True, context_dtype=torch.float32)
    write(path, plan, encoders, tiny_flux(), tiny_inputs())
    with TextRecorder(encoders, "t5.0") as recorder:
        encode(*encoders, PROMPTS[:1])
    capture = load_capture(path)
    values, scale = capture.read_stored("t5.0")
    assert (values.dtype, scale.shape) == (torch.float8_e4m3fn, (1, T5[0]))
    torch.testing.assert_close(capture.read("t5.0").float(), recorder.sink.read("t5.0"), atol=0.02, rtol=0.1)


def test_layers_that_are_not_as_planned_or_never_come_leave_no_file(tmp_path, layers, encoders, tiny_flux, tiny_inputs):
    path, plan = tmp_path / "c.pt", layers(["single.0"])
    with pytest.raises(
        FluxIRError, match=r"t5\.0 must be torch\.float32 \[1, 9, 40\], as planned: got .* \[2, 9, 40\]"
    ):
        write(path, plan, encoders, tiny_flux(), tiny_inputs(), prompts=PROMPTS)
    with pytest.raises(FluxIRError, match=r"tensors never came, first t5\.0 \("), CaptureWriter(path, plan):
        pass
    with pytest.raises(FluxIRError, match=r"t5\.1 is not in the plan of this capture"):  # noqa: SIM117
        with CaptureWriter(path, plan) as writer, TextRecorder(encoders, "t5.1", writer):
            encode(*encoders, PROMPTS[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_layer_is_read_without_a_step_and_a_site_with_one(tmp_path, layers, encoders, tiny_flux, tiny_inputs):
    write(tmp_path / "c.pt", layers(["single.0"]), encoders, tiny_flux(), tiny_inputs())
    capture = load_capture(tmp_path / "c.pt")
    with pytest.raises(FluxIRError, match=r"t5\.0 is recorded once per prompt and has no step: got 0"):
        capture.read("t5.0", 0)
    with pytest.raises(FluxIRError, match=r"single\.0 is recorded at every step: got none"):
        capture.read("single.0")
    with pytest.raises(FluxIRError, match=r"t5\.1 was not captured .* holds 3 sites .*t5\.0"):
        capture.read("t5.1")


@torch.no_grad()
def test_layers_can_be_written_are_heard_as_written_and_keep_no_hook(encoders):
    plain = encode(*encoders, PROMPTS)
    for site, number in (("t5.0", 0), ("clip.1", 1)):
        with TextIntervention(encoders, {site: lambda value: value}):
            assert all(map(torch.equal, encode(*encoders, PROMPTS), plain))
        with TextRecorder(encoders, site) as before:
            encode(*encoders, PROMPTS)
        with TextRecorder(encoders, site) as recorder, TextIntervention(encoders, {site: lambda value: 2 * value}):
            changed = encode(*encoders, PROMPTS)
        torch.testing.assert_close(recorder.sink.read(site), 2 * before.sink.read(site))
        assert [torch.equal(*pair) for pair in zip(changed, plain, strict=True)] == [number == 1, number == 0]
    with pytest.raises(FluxIRError, match="must have the shape"):
        encode_with(encoders, {"t5.*": lambda value: value[:1, :1]})
    with pytest.raises(FluxIRError, match=r"while these were to be changed: t5\.0, t5\.1"):
        TextIntervention(encoders, {"t5.*": lambda value: value}).__enter__().__exit__(None, None, None)
    with pytest.raises(FluxIRError, match=r"no site t5\.7|no site of this model matches"):
        TextIntervention(encoders, {"t5.7": lambda value: value})
    assert hooks_of(encoders) == 0
    assert all(map(torch.equal, encode(*encoders, PROMPTS), plain))


def encode_with(encoders, edits):
    with TextIntervention(encoders, edits):
        encode(*encoders, PROMPTS)
