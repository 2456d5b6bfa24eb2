"""`collect` from Python: plain arguments, nothing printed, progress as events, and the command's bytes."""

import pytest
import torch

from flux_ir import Note, Progress, Site, collect, load_model
from flux_ir.activations.shards import read_shard
from flux_ir.activations.source import open_source
from flux_ir.commands.collect import main
from flux_ir.errors import FluxIRError

PROMPTS = ["a red circle", "a small blue square"]
SMALL = {"width": 64, "height": 48, "num_steps": 2, "steps": [0]}


@pytest.fixture(scope="module")
def model():
    return load_model("flux-tiny", parts=["transformer"], device="cpu", dtype="float32")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_loaded_model_and_sites_of_any_kind_give_the_bytes_of_the_command(model, tmp_path, capsys):
    events = []
    sites = [Site.parse("double.1.img"), "single.0"]
    done = collect(PROMPTS, sites, tmp_path / "a", model=model, **SMALL, progress=events.append)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--sites", "double.1.img,single.0", "--dtype", "float32"]
    words += ["--model", "flux-tiny", "--width", "64", "--height", "48", "--num_steps", "2", "--steps", "0"]
    assert main([*words, "--output_dir", str(tmp_path / "b")]) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert (done.where, done.generations, done.made) == (str(tmp_path / "a"), 2, 2)
    assert done.tokens == 2 * (12 + 12 + model.spec.text_tokens)
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.glob("a/shards/*"))
    stages = [event for event in events if isinstance(event, Progress)]
    assert {(event.stage, event.total) for event in stages} == {("text", 2), ("load", 1), ("collect", 2), ("merge", 1)}
    assert [event.done for event in stages if event.stage == "collect"] == [0, 1, 2]
    assert any(isinstance(event, Note) and "no step runs after 0" in event.text for event in events)


def test_what_the_network_computes_in_and_what_is_kept_are_two_things(model, tmp_path):
    collect(PROMPTS[:1], "single.*", tmp_path, model=model, **SMALL, store_dtype="float16")
    shard = read_shard(tmp_path / "shards/000000.safetensors")
    assert shard.tensors["single.7/step_0"].dtype == torch.float16
    assert shard.tensors["state/step_0"].dtype == torch.float32  # the sampler's own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": "double.9.img"}, "no site of this model matches 'double.9.img'"),
        ({"steps": [5]}, r"steps to keep must be among the schedule's 2, counted from 0: got \[5\]"),
        ({"prompts": []}, "there must be a prompt"),
        ({"prompts": ["a", "  "]}, "must not be empty: number 1"),
        ({"repeats": 0}, "repeats must be at least 1: got 0"),
        ({"tokens_per_image": 13}, "from 1 to the 12 image tokens"),
        ({"output_dir": ""}, "must name a folder or a URL"),
    ],
)
def test_wrong_arguments_are_one_clear_line_before_anything_is_made(model, tmp_path, changes, message):
    given = {"prompts": PROMPTS, "sites": "single.0", "output_dir": tmp_path / "out", "model": model} | SMALL | changes
    with pytest.raises(FluxIRError, match=message):
        collect(given.pop("prompts"), given.pop("sites"), given.pop("output_dir"), **given)
    assert not (tmp_path / "out").exists()


def test_layers_of_the_text_encoders_alone_need_no_step_of_the_transformer(tmp_path):
    events = []
    collect(PROMPTS, "t5.0,t5.2", tmp_path / "layers", model="flux-tiny", progress=events.append)
    assert any(isinstance(event, Note) and "sites 2, no step runs" in event.text for event in events)
    source = open_source(tmp_path / "layers" / "t5.2")
    assert [str(site) for site in source.sites] == ["t5.2"]
    assert source.read(1, "t5.2", 0).prompt == PROMPTS[1]
