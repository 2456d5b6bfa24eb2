"""What is measured before an edit can be made: the code of a steering prompt, and where a direction is present."""

import pytest
import torch

from flux_ir import MemorySink, Recorder, TextRecorder, encode_prompt, load_model, sample
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sampling.schedule import schedule_of
from flux_ir.steering.apply import Steering
from flux_ir.steering.edits import Edit
from flux_ir.steering.regions import Grid
from flux_ir.steering.settle import settled, stand_in

STEPS = 2
GRID = Grid(128, 128)


@pytest.fixture(scope="module")
def model():
    return load_model("flux-tiny", dtype="float32")


def sae_of(site, d_in):
    return make_sae(SAEConfig("topk", d_in=d_in, d_sae=64, k=8, site=site, model="flux-tiny")).requires_grad_(False)


def measured(model, edit):
    empty = Steering((), model.spec, grid=GRID, num_steps=STEPS)
    text = encode_prompt(model, "a small blue star at the top on a black background")
    times = schedule_of(model.spec, STEPS, GRID.tokens)
    alone = empty.of([stand_in(edit, empty)])
    return settled(edit, alone, model, text, seed=3, timesteps=times, guidance=1.0), text


def test_a_steering_prompt_is_its_mean_code_at_every_step(model):
    sae = sae_of("double.2.img", 192)
    found, _ = measured(model, Edit(sae=sae, prompt="a red circle", strength=2.0))
    with Recorder(model, "double.2.img") as recorder:
        list(sample(model, "a red circle", seed=3, num_steps=STEPS))
    code = torch.stack([sae.encode(recorder.sink.read("double.2.img", step)[0]).mean(dim=0) for step in range(STEPS)])
    torch.testing.assert_close(found.vector, code @ sae.W_dec)
    assert (found.sae, found.prompt, found.unit, found.sites) == (None, None, "raw", ("double.2.img",))
    assert found.strengths == (2.0,)


@pytest.mark.parametrize(("site", "width"), [("t5.1", 128), ("clip.1", 128)])
def test_a_steering_prompt_in_a_text_encoder_is_the_code_of_its_own_tokens(model, site, width):
    sae = sae_of(site, width)
    found, _ = measured(model, Edit(sae=sae, prompt="a red circle"))
    with model.text_encoders() as encoders, TextRecorder(encoders, site, MemorySink()) as recorder:
        encoder = encoders.t5 if site.startswith("t5") else encoders.clip
        encoder(["a red circle"])
    tokens = recorder.sink.read(site)[0, : encoder.length("a red circle")]
    torch.testing.assert_close(found.vector, sae.encode(tokens).mean(dim=0) @ sae.W_dec)


def test_presence_is_the_share_of_the_mean_cosine(model):
    sites = ("double.1.img", "double.2.img")
    sae = sae_of("double.2.img", 192)
    found, text = measured(model, Edit(sae=sae, feature=5, sites=sites, unit="norm", weights="presence"))
    with Recorder(model, sites) as recorder:
        list(sample(model, text, seed=3, num_steps=STEPS))
    cosines = [
        sum(
            torch.cosine_similarity(recorder.sink.read(site, step)[0], sae.W_dec[5][None]).clamp_min(0).mean()
            for step in range(STEPS)
        )
        for site in sites
    ]
    assert found.weights == pytest.approx([float(c / sum(cosines)) for c in cosines], rel=1e-4)
    assert sum(found.weights) == pytest.approx(1)


def test_what_is_still_to_be_measured_is_no_edit_yet(model):
    empty = Steering((), model.spec, grid=GRID, num_steps=STEPS)
    sae = sae_of("double.2.img", 192)
    for edit, message in (
        (Edit(sae=sae, prompt="a red circle"), "a steering prompt is to be encoded first"),
        (Edit(sae=sae, feature=5, unit="norm", weights="presence"), "is to be measured first"),
    ):
        with pytest.raises(FluxIRError, match=message):
            empty.of([edit])
