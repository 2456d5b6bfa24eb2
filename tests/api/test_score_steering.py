"""`score_steering` on flux-tiny with an autoencoder of random features: every row is there, and is kept."""

import csv
import json
import re
from itertools import islice

import pytest
import torch

from flux_ir import FluxIRError, collect
from flux_ir.api.score_steering import ROWS, score_steering
from flux_ir.commands.score_steering import main, tables
from flux_ir.demo.captions import captions
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae

FAST = {
    "strength": 2.0,
    "kinds": "colour",
    "tasks": 2,
    "search_tasks": 2,
    "small_tasks": 1,
    "candidates": 1,
    "controls": 1,
}


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """Ten pictures of large objects, some of them red, all of part A."""
    large = [one for one in captions(300, 1, "A", alone=300) if one.startswith(("a large red", "a large blue"))]
    path = tmp_path_factory.mktemp("captures") / "A"
    collect(
        prompts=list(islice(large, 10)),
        model="flux-tiny",
        sites="double.3.img,double.0.txt,t5.0,clip.0",
        num_steps=4,
        steps=range(4),
        save_images=True,
        output_dir=path,
        dtype="float32",
    )
    return path


def random_sae(site, path):
    width = 128 if site.startswith(("t5", "clip")) else 192
    made = make_sae(SAEConfig("topk", d_in=width, d_sae=32, k=4, site=site, model="flux-tiny", seed=1))
    made.max_active, made.mean_active = torch.full((32,), 3.0), torch.ones(32)
    save_sae(made, path)
    return path


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return random_sae("double.3.img", tmp_path_factory.mktemp("saes") / "random")


@pytest.fixture(scope="module")
def scored(captures, sae, tmp_path_factory):
    return score_steering(sae, captures, concepts="red", output_dir=tmp_path_factory.mktemp("scores"), **FAST)


def test_every_row_is_counted_on_fresh_scenes(scored):
    stored = json.loads((scored.folder / "steering_scores.json").read_text())
    assert stored == scored.result
    red = stored["kinds"]["colour"]["red"]
    for row in ROWS:
        assert red[row]["tasks"] == 2
        low, high = red[row]["interval"]
        assert low <= red[row]["joint"] <= high
        assert red[row]["joint"] <= min(red[row]["changed"], red[row]["kept"])
    assert red["ceiling"]["joint"] == 1.0  # flux-tiny draws what the edited caption says
    assert [dose["strength"] for dose in red["doses"]] == sorted(dose["strength"] for dose in red["doses"])
    assert set(red["windows"]) == {"early", "middle", "late"}
    assert red["others"] == {}
    assert scored.joint("ceiling", "colour") == {"red": 1.0}
    with (scored.folder / "steering_scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ROWS)
    assert {path.name for path in scored.folder.glob("*.png")} == {"colour.png", "colour_others.png"}
    (table,) = tables(scored.result)
    assert [len(line) for line in table] == [1 + len(ROWS)] * 2


def test_the_same_call_reads_what_is_kept(captures, sae, scored):
    before = {path.name: path.stat().st_mtime_ns for path in (scored.folder.parent / "parts").iterdir()}
    again = score_steering(sae, captures, concepts="red", output_dir=scored.folder.parent, **FAST)
    assert again.result == scored.result
    assert before == {path.name: path.stat().st_mtime_ns for path in (scored.folder.parent / "parts").iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--concepts", "redd"), "redd"),
        (("--tasks", "0"), "--tasks"),
        (("--strength", "0"), "strength"),
    ],
)
def test_wrong_words_are_told_before_anything_is_read(words, told, capsys):
    assert main(["--sae", "nowhere", "--captures", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "hint" in error.lower()


def test_what_captures_and_autoencoders_must_be(captures, sae, tmp_path):
    with pytest.raises(FluxIRError, match="mean difference"):  # no cyan in these captures
        score_steering(sae, captures, concepts="cyan", output_dir=tmp_path, **FAST)
    for site in ("clip.0", "single.3"):  # a whole single block begins with the text: patch 0 is not token 0
        other = random_sae(site, tmp_path / site)
        with pytest.raises(FluxIRError, match=f"image tokens, or of words.*of {re.escape(site)}"):
            score_steering(other, captures, output_dir=tmp_path, **FAST)
    other = random_sae("t5.2", tmp_path / "t5.2")
    with pytest.raises(FluxIRError, match=r"holds no t5\.2"):
        score_steering(other, captures, output_dir=tmp_path, **FAST)


def test_captures_must_be_of_every_step_and_of_no_caption_that_counts(sae, tmp_path):
    small = {"model": "flux-tiny", "sites": "double.3.img", "num_steps": 2, "dtype": "float32"}
    collect(prompts=captions(2, 1, "A"), output_dir=tmp_path / "one_step", steps=[1], **small)
    with pytest.raises(FluxIRError, match="a mean difference is of every step: these captures have 1 of 2 steps"):
        score_steering(sae, tmp_path / "one_step", output_dir=tmp_path, **FAST)
    collect(prompts=list(islice(captions(50, 1, "C"), 2)), output_dir=tmp_path / "C", **small)
    with pytest.raises(FluxIRError, match="must share no caption with the scenes that are counted"):
        score_steering(sae, tmp_path / "C", output_dir=tmp_path, **FAST)
    collect(prompts=["a cat"], output_dir=tmp_path / "cats", **(small | {"sites": "double.0.txt"}))
    other = random_sae("double.0.txt", tmp_path / "double.0.txt")
    with pytest.raises(FluxIRError, match="captions of flux-tiny's world alone: got 'a cat'"):
        score_steering(other, tmp_path / "cats", output_dir=tmp_path, **FAST)


def test_words_are_turned_where_they_were_picked(captures, tmp_path):
    saes = [random_sae(site, tmp_path / site) for site in ("t5.0", "double.0.txt")]
    fast = FAST | {"candidates": 6, "controls": 2, "strength": (1.0,)}
    scored = score_steering(saes, captures, concepts="red", output_dir=tmp_path / "scores", **fast)
    red = scored.result["kinds"]["colour"]["red"]
    for row in ("feature", "set", "swap", "mean_difference", "mean_swap", "neuron", "random"):
        assert red[row]["rule"] in ("word", "phrase", "text")
        assert red[row]["candidate"].endswith(("t5.0", "double.0.txt"))
    assert red["feature"]["candidates"] == 6  # the best one of both autoencoders at three levels
    assert red["set"]["candidates"] == 2 * 3 * 4
    assert red["mean_difference"]["candidates"] == 2 * 3
