"""The stages that make flux-tiny: each learns, resumes bit for bit, and exports what the package can load."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from flux_ir.demo.judge import TallyRow
from flux_ir.demo.scenes import scenes
from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.placement import plan
from flux_ir.models.registry import packaged_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode, load_clip, load_t5
from recipes.flux_tiny.autoencoder import AE_PARAMS, AutoencoderConfig, crops, measure_latents, train_autoencoder
from recipes.flux_tiny.checkpoints import Checkpoint, step_generator
from recipes.flux_tiny.evaluate import BARS, bar_for, main, write_quality
from recipes.flux_tiny.export import export
from recipes.flux_tiny.flow import (
    FLUX_PARAMS,
    Bank,
    FlowConfig,
    draw_times,
    learning_rate_factor,
    start_model,
    train_flow,
)
from recipes.flux_tiny.text import (
    TEXT_TOKENS,
    Describer,
    TextConfig,
    build_clip,
    build_t5,
    build_tokenizer,
    place_targets,
    token_targets,
    train_text,
)

SMALL_AE = AutoencoderConfig(steps=4, batch=2, crop_px=32)
SMALL_TEXT = TextConfig(steps=6, batch=8)
SMALL_FLOW = FlowConfig(steps=4, batch=2, bank_scenes=6, warmup_steps=2, decay_steps=2, compile=False)
# Muon multiplies in bfloat16, which is slow on many CPUs: of each kind of block there is one.
SMALL_FLUX = replace(FLUX_PARAMS, depth=1, depth_single_blocks=1)


def describer() -> Describer:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return Describer(build_t5(tokenizer), build_clip(tokenizer))


def run_flow(path: Path, stop_after: int | None = None) -> Checkpoint:
    captions = [scene.caption for scene in islice(scenes(0, "train"), 6)]
    latents = torch.randn(6, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    checkpoint = Checkpoint(path, every_seconds=0)
    model = start_model(describer(), SMALL_FLOW, SMALL_FLUX)
    list(islice(train_flow(model, Bank(latents, captions), 128, SMALL_FLOW, checkpoint, "cpu"), stop_after))
    return checkpoint


def run_stage(stage: str, path: Path, stop_after: int | None = None) -> Checkpoint:
    checkpoint = Checkpoint(path, every_seconds=0)
    match stage:
        case "autoencoder":
            list(islice(train_autoencoder(SMALL_AE, checkpoint, "cpu"), stop_after))
        case "text":
            list(islice(train_text(SMALL_TEXT, checkpoint), stop_after))
        case "flow":
            return run_flow(path, stop_after)
    return checkpoint


@pytest.mark.parametrize("stage", ["autoencoder", "text", "flow"])
def test_an_interrupted_stage_ends_with_the_same_bits(stage: str, tmp_path: Path) -> None:
    whole = run_stage(stage, tmp_path / "whole.pt")
    run_stage(stage, tmp_path / "cut.pt", stop_after=3)  # the third step is left before it is saved
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["done"] == 2
    resumed = run_stage(stage, tmp_path / "cut.pt")
    for part in ["model"] + (["ema"] if stage == "flow" else []):
        one, other = whole.weights(part), resumed.weights(part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_stage_does_no_more_steps(tmp_path: Path) -> None:
    run_stage("text", tmp_path / "text.pt")
    assert list(train_text(SMALL_TEXT, Checkpoint(tmp_path / "text.pt"))) == []


def test_a_one_cycle_schedule_of_another_length_is_refused(tmp_path: Path) -> None:
    run_stage("text", tmp_path / "text.pt", stop_after=2)
    with pytest.raises(FluxIRError, match="belongs to a schedule of 6 steps, this one has 9"):
        list(train_text(replace(SMALL_TEXT, steps=9), Checkpoint(tmp_path / "text.pt")))


def test_the_stages_before_must_have_run(tmp_path: Path) -> None:
    with pytest.raises(FluxIRError, match="no checkpoint"):
        Checkpoint(tmp_path / "text.pt").weights("model")


def test_the_text_encoders_learn_to_describe_scenes(tmp_path: Path) -> None:
    config = TextConfig(steps=120, batch=32, learning_rate=2e-3)
    numbers = list(train_text(config, Checkpoint(tmp_path / "text.pt")))
    assert numbers[-1]["right"] > numbers[0]["right"] + 0.2
    assert numbers[-1]["loss"] < 0.7 * numbers[0]["loss"]


def test_the_questions_match_the_captions() -> None:
    batch = list(islice(scenes(3, "train"), 40))
    words = [scene.caption.split() for scene in batch]
    for question in ("colour", "shape", "size"):
        targets = token_targets(batch, question)
        assert targets.shape == (40, TEXT_TOKENS)
        for row, caption, scene in zip(targets.tolist(), words, batch, strict=True):
            asked = [caption[i] for i, target in enumerate(row) if target >= 0]
            assert asked == [word for thing in scene.things for word in (thing.size, thing.colour, thing.shape)]
        here = (place_targets(batch, question) < place_targets(batch, question).max()).sum(1)
        assert here.tolist() == [len(scene.things) for scene in batch]
    background = token_targets(batch, "background")
    assert [(row >= 0).sum().item() for row in background] == [len(caption) for caption in words]


def test_crops_of_a_step_are_always_the_same_and_of_another_step_different() -> None:
    assert torch.equal(crops(SMALL_AE, 3), crops(SMALL_AE, 3))
    assert not torch.equal(crops(SMALL_AE, 3), crops(SMALL_AE, 4))


def test_flow_times_lie_inside_and_half_of_them_dwell_in_the_middle() -> None:
    times = draw_times(4000, step_generator(0, 0))
    assert 0 < times.min() < times.max() < 1
    assert times[1::2].std() < times[0::2].std()


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    config = FlowConfig(steps=1000, warmup_steps=10, decay_steps=100)
    factors = [learning_rate_factor(config, step) for step in (0, 9, 500, 900, 950, 999)]
    assert factors == [0.1, 1.0, 1.0, 1.0, 0.5, 0.01]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained flux-tiny, exported as a trained one would be."""
    run_dir = tmp_path_factory.mktemp("run")
    for stage in ("autoencoder", "text"):
        run_stage(stage, run_dir / f"{stage}.pt", stop_after=2)
    run_flow(run_dir / "flow.pt", stop_after=2)
    autoencoder = AutoEncoder(AE_PARAMS).eval().requires_grad_(False)
    autoencoder.params = measure_latents(autoencoder, seed=0, count=4)
    folder = tmp_path_factory.mktemp("assets") / "flux-tiny"
    (folder / "t5").mkdir(parents=True)  # a checkout has a model there, whose place the new one takes
    export(autoencoder, start_model(describer(), SMALL_FLOW, SMALL_FLUX), run_dir, folder, psnr_scenes=4)
    return folder


@torch.no_grad()
def test_exported_text_encoders_are_what_transformers_reads(exported: Path) -> None:
    caption = "a small red ring above a large blue star"
    t5 = load_t5(exported / "t5", exported / "t5", 20, "cpu", torch.float32)
    clip = load_clip(exported / "clip", exported / "clip", "cpu", torch.float32)
    for encoder in ("t5", "clip"):
        tokenizer = AutoTokenizer.from_pretrained(exported / encoder)
        ids = tokenizer([caption], padding="max_length", max_length=20, truncation=True, return_tensors="pt")
        assert torch.equal(t5.token_ids([caption]), ids["input_ids"])
    ids = t5.token_ids([caption])
    theirs = T5EncoderModel.from_pretrained(exported / "t5", dtype=torch.float32)(input_ids=ids)
    assert torch.equal(t5([caption]), theirs.last_hidden_state)
    theirs = CLIPTextModel.from_pretrained(exported / "clip", dtype=torch.float32)(input_ids=ids)
    assert torch.equal(clip([caption]), theirs.pooler_output)


def test_measured_latents_have_mean_zero_and_variance_one() -> None:
    torch.manual_seed(0)
    autoencoder = AutoEncoder(AE_PARAMS).eval()
    autoencoder.params = measure_latents(autoencoder, seed=0, count=4)
    from recipes.flux_tiny.autoencoder import picture_batches

    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(batch) for batch in picture_batches(0, 4)])
    assert latents.mean().abs() < 1e-4
    assert latents.std() == pytest.approx(1, abs=1e-4)


def test_an_exported_model_loads_and_embeds(exported: Path) -> None:
    spec = packaged_spec("flux-tiny", exported)
    suite = Suite(spec, locate_model(spec), plan(0), torch.bfloat16)
    assert list(suite.load()) == ["text", "transformer", "autoencoder"]
    with suite.text_encoders() as text:
        embedding = encode(text.t5, text.clip, ["a small red ring above a large blue star on a gray background"])
    assert embedding.txt.shape == (1, spec.text_tokens, spec.flux.context_in_dim)
    assert embedding.y.shape == (1, spec.flux.vec_in_dim)
    provenance = json.loads((exported / "provenance.json").read_text())
    assert set(provenance["files"]) == {
        str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()
    } - {"provenance.json"}
    assert provenance["steps"] == {"autoencoder": 1, "text": 1, "flow": 1}


def test_an_exported_file_that_was_changed_is_noticed(exported: Path, tmp_path: Path) -> None:
    import shutil

    changed = tmp_path / "flux-tiny"
    shutil.copytree(exported, changed)
    weights = changed / "ae.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    spec = packaged_spec("flux-tiny", changed)
    with pytest.raises(FluxIRError, match=r"ae\.safetensors"):
        list(Suite(spec, locate_model(spec), plan(0), torch.bfloat16).load())


def test_evaluation_of_an_untrained_model_misses_the_bars_and_says_so(exported: Path, capsys) -> None:
    assert main(["--folder", str(exported), "--captions", "6", "--num_steps", "1", "--write"]) == 1
    assert "MISSED" in capsys.readouterr().out
    quality = json.loads((exported / "provenance.json").read_text())["quality"]
    assert quality["held_out_captions"] == 6
    assert quality["num_steps"] == 1


def test_every_bar_is_held_against_a_row_of_the_table() -> None:
    assert all(bar_for(TallyRow(bar.captions, bar.aspect, 1.0, 1)) == bar.least for bar in BARS)
    assert bar_for(TallyRow(2, "everything", 1.0, 1)) is None


def test_quality_is_written_beside_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('{"seed": 0}')
    write_quality(tmp_path, [TallyRow(1, "background", 0.98765, 200)], 8)
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["seed"] == 0
    assert provenance["quality"]["rows"] == [{"captions": 1, "aspect": "background", "share": 0.9877, "n": 200}]
