"""A LoRA from the flag to the picture, and back: what is made with one says so, and is read with it again."""

import json
from dataclasses import replace

import pytest
import torch

import flux_ir
from flux_ir.activations.blocks import loras_of
from flux_ir.activations.source import open_source
from flux_ir.api.evaluate_sae import load_for
from flux_ir.api.model_settings import note_trained_on_others
from flux_ir.api.recorded_run import as_recorded, check_run, recorded_run
from flux_ir.api.steer import SteerSettings
from flux_ir.api.training_data import open_data
from flux_ir.api.training_settings import TrainSAESettings
from flux_ir.collecting.collection import weights_digest
from flux_ir.commands.main import main
from flux_ir.distributed import joined
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.lora.contents import blank_transformer
from flux_ir.models.registry import get_spec
from tests.models.checkpoints.lora.layouts import Factors, draw_factors, kohya


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA that changes every block of flux-tiny a little."""
    network = blank_transformer(get_spec("flux-tiny"))
    factors = {name: Factors(0.05 * f.up, f.down) for name, f in draw_factors(network).items() if "blocks" in name}
    return kohya(factors, network, tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture(scope="module")
def run(lora, tmp_path_factory):
    """A run of the command with the LoRA at half its strength."""
    return flux_ir.capture(
        "a red circle", model="flux-tiny", num_steps=2, seed=5, sites=["double.1.img", "single.7"], dtype="float32",
        should_decode_intermediates=False, lora=lora, lora_strength=0.5, output_dir=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip


def weights(**choices):
    model = flux_ir.load_model("flux-tiny", parts=["transformer"], dtype="float32", **choices)
    return model, model.flux.state_dict()


def test_a_loaded_model_has_the_lora_in_its_weights_and_in_their_digest(lora):
    plain, before = weights()
    off, same = weights(lora=lora, lora_strength=0)
    on, changed = weights(lora=[lora], lora_strength=[0.5])
    assert all(torch.equal(same[name], before[name]) for name in before)
    assert {name for name in before if not torch.equal(changed[name], before[name])} == {
        name for name in before if "blocks" in name and name.endswith(".weight")
    }
    digests = [weights_digest(model.source, autoencoder=True) for model in (plain, off, on)]
    assert digests[0] == digests[1] != digests[2]


def test_a_run_says_which_lora_it_was_made_with(lora, run):
    (said,) = json.loads(run.metadata.read_text())["loras"]
    assert said["path"] == str(lora)
    assert said["strength"] == 0.5
    assert flux_ir.read_capture(run).metadata["loras"] == [said]
    assert json.loads(run.metadata.read_text())["options"]["lora"] == str(lora)


def test_the_picture_is_another_one(run, tmp_path):
    plain = flux_ir.capture(
        "a red circle", model="flux-tiny", num_steps=2, seed=5, sites=["single.7"], dtype="float32",
        should_decode_intermediates=False, output_dir=tmp_path,
    )  # fmt: skip
    with_lora, without = (flux_ir.read_capture(one).read("single.7", 0) for one in (run, plain))
    assert not torch.allclose(with_lora, without, atol=0.01)
    assert "loras" not in json.loads(plain.metadata.read_text())


def test_the_lens_reads_a_run_with_the_lora_it_was_made_with(run):
    notes = []
    done = flux_ir.read_lens(run, lens="euler", progress=notes.append)
    said = [event.text for event in notes if isinstance(event, flux_ir.Note)]
    assert any(text.startswith("LoRA: ") and "strength 0.5" in text for text in said)
    assert not any("not the weights" in text for text in said)
    assert done.numbers.is_file()


def test_a_lora_that_has_changed_or_gone_is_one_line(lora, run, capsys):
    content = lora.read_bytes()
    words = ["lens", "--generation_id", run.generation_id, "--output_dir", str(run.folder.parent)]
    try:
        lora.write_bytes(content[:-4] + b"\0\0\0\0")
        assert main(words) == 2
        assert "is another file than the LoRA that the run was made with" in capsys.readouterr().err
        lora.unlink()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"the run was made with the LoRA {lora}, which is not there" in said
        assert len(said.splitlines()) == 2
    finally:
        lora.write_bytes(content)


def test_a_run_is_gone_through_again_with_its_lora(lora, run):
    recorded = recorded_run(run, None)
    settings = as_recorded(SteerSettings(model="flux-tiny"), recorded)
    suite = settings.suite(settings.settle_machine(), lambda event: None)
    assert [(one.path, one.strength) for one in suite.source.loras] == [(lora, 0.5)]
    check_run(recorded, suite, recorded.sampling.timesteps)
    with pytest.raises(FluxIRError, match="the run was made with 1 LoRA, and others, or other strengths, are loaded"):
        check_run(recorded, flux_ir.load_model("flux-tiny", parts=[]), recorded.sampling.timesteps)


def test_a_collection_says_its_loras_and_goes_on_wherever_their_files_are(lora, tmp_path):
    def collected(prompts, **choices):
        return flux_ir.collect(
            prompts, ["single.7.img"], tmp_path / "collection", model="flux-tiny", num_steps=1, batch_size=2, **choices
        )

    assert collected(["a red circle", "a blue square"], lora=lora, lora_strength=0.5).made == 2
    (said,) = loras_of(open_source(tmp_path / "collection"))
    assert (said["path"], said["strength"]) == (str(lora), 0.5)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    assert collected(["a red circle", "a blue square"], lora=moved, lora_strength=0.5).made == 0
    with pytest.raises(FluxIRError, match=r"collected with other settings: .*loras .*at 0\.5 there, .*at 0\.25 now"):
        collected(["a red circle", "a blue square"], lora=lora, lora_strength=0.25)
    with pytest.raises(FluxIRError, match=r"loras .* there, None now"):
        collected(["a red circle", "a blue square"])


def test_an_autoencoder_of_a_lora_s_activations_says_so_where_it_is_used_without(lora, tmp_path):
    where = {"model": "flux-tiny", "num_steps": 1, "batch_size": 2}
    for name, choices in (("with", {"lora": lora, "lora_strength": 0.5}), ("plain", {})):
        flux_ir.collect(["a red circle", "a blue square"], ["single.7.img"], tmp_path / name, **where, **choices)
    words = {"batch_tokens": 32, "k": 4, "expansion": 1, "held_out": 0.0, "output_dir": tmp_path / "saes"}
    trained = {
        name: list(flux_ir.train_sae(tmp_path / name, **words))[-1].finished[0].folder for name in ("with", "plain")
    }
    (said,) = flux_ir.load_sae(trained["with"]).metadata["data"]["loras"]
    assert (said["name"], said["strength"]) == (lora.name, 0.5)
    assert "loras" not in flux_ir.load_sae(trained["plain"]).metadata["data"]
    told = {}
    for sae, captures in ((a, b) for a in trained for b in trained):
        notes = []
        load_for(trained[sae], open_source(tmp_path / captures), None, notes.append)
        told[sae, captures] = [note.text for note in notes]
    assert told["with", "with"] == told["plain", "plain"] == []
    model, plain = f"the model with the LoRA {lora.name} at 0.5", "the model without LoRAs, not quantised"
    assert told["with", "plain"] == [
        f"note: {trained['with']} was trained on {model}, and these captures are of {plain}"
    ]
    assert told["plain", "with"] == [
        f"note: {trained['plain']} was trained on {plain}, and these captures are of {model}"
    ]
    notes = []
    note_trained_on_others(
        {"it": flux_ir.load_sae(trained["with"])}, flux_ir.load_model("flux-tiny", parts=[]), notes.append
    )
    assert [note.text for note in notes] == [f"note: it was trained on {model}, and it is used in {plain}"]


def test_live_data_are_of_the_model_with_its_lora(lora):
    live = TrainSAESettings(
        model="flux-tiny", prompts=("a red circle",), site=("single.7.img",), held_out=0.0,
        lora=(lora,), lora_strength=(0.5,), quantize="nf4",
    )  # fmt: skip
    with joined() as ranks:
        described = open_data(live, ranks).described
        plain = open_data(replace(live, lora=None, lora_strength=None, quantize=None), ranks).described
    assert [one["name"] for one in described["loras"]] == [lora.name]
    assert described["quantize"] == "nf4"
    assert described["weights"] != plain["weights"]
    assert not plain.keys() & {"loras", "quantize"}
    assert json.dumps(live.to_json())
    with pytest.raises(FluxIRError, match=r"--quantize is for live data, whose model is loaded here: got --captures"):
        TrainSAESettings(captures=lora, quantize="nf4")


def test_the_command_takes_a_lora(lora, tmp_path, capsys):
    words = ["capture", "--model", "flux-tiny", "--prompt", "a red circle", "--num_steps", "1", "--lora", str(lora)]
    words += ["--sites", "single.7", "--noshould_decode_intermediates", "--output_dir", str(tmp_path)]
    assert main([*words, "--lora_strength=-0.5"]) == 0
    assert "(kohya, names of BFL), strength -0.5" in capsys.readouterr().err
    (metadata,) = tmp_path.glob("*/intermediates/metadata_*.json")
    assert json.loads(metadata.read_text())["loras"][0]["strength"] == -0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "gone.safetensors"], "--lora must name a file or a folder that exists: got 'gone.safetensors'"),
        (["--lora", "LORA", "--lora_strength", "nan"], "--lora_strength must be a finite number: got nan"),
        (["--lora", "LORA", "--lora_strength", "1,2"], "--lora_strength must be one number, or one for each LoRA"),
        (["--lora_strength", "1"], "--lora_strength is that of a LoRA: got no --lora"),
        (["--lora_scale", "1"], "--lora_scale: no such flag; here it is --lora_strength"),
        (["--lora", "WEIGHTS"], "is no LoRA: it has"),
    ],
)
def test_what_cannot_be_merged_is_one_line(words, message, lora, tmp_path, capsys):
    assets = get_spec("flux-tiny").assets
    named = {"LORA": str(lora), "WEIGHTS": str(assets / "transformer.safetensors")}
    words = [named.get(word, word) for word in words]
    assert main(["capture", "--model", "flux-tiny", "--output_dir", str(tmp_path / "runs"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        line for line in said.splitlines() if message in line
    ]


def test_a_loaded_model_has_settled_its_loras(lora):
    model = flux_ir.load_model("flux-tiny", parts=[])
    with pytest.raises(FluxIRError, match="a loaded model is used as it is: got lora as well"):
        flux_ir.capture("a red circle", model=model, lora=lora)
