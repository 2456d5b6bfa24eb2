"""`flux-ir score-concepts` and `flux-ir probe` as they are typed, on small collections of flux-tiny with pictures."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from flux_ir.activations.source import open_source
from flux_ir.api.known_labels import labels_of
from flux_ir.api.score_concepts import LEVEL_WORDS, score_concepts
from flux_ir.commands.collect import main as collect
from flux_ir.commands.main import main as flux_ir
from flux_ir.commands.probe import main as probe
from flux_ir.commands.score_concepts import main as score
from flux_ir.demo.captions import captions
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from flux_ir.sites import Site
from flux_ir.studies.concepts import ROWS
from flux_ir.studies.labelled_tokens import LabelledTokens

SITE = Site.parse("single.6.img")
FEW = ("--least_positives", "6", "--bootstrap", "4", "--null", "2")


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    """Twenty captions of part A and as many of B, with their pictures: a site, its neurons, and a site of the text."""
    folder = tmp_path_factory.mktemp("collections")
    for part in "AB":
        (folder / f"{part}.txt").write_text("\n".join(captions(20, 5, part=part)))
        collect_part(folder / f"{part}.txt", "single.6.img,single.6.img.neurons,double.3.txt", folder / part)
    return folder


def collect_part(prompts, sites, folder):
    words = ["--model", "flux-tiny", "--prompts", str(prompts), "--num_steps", "4", "--steps", "2", "--sites", sites]
    assert collect([*words, "--save_images", "--output_dir", str(folder)]) == 0


@pytest.fixture(scope="module")
def sae(collections, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes") / "untaught"
    source = open_source(collections / "A")
    values = source.read_run(range(20), SITE, 2).floats().float().flatten(0, 1)
    config = SAEConfig("topk", values.shape[1], 256, k=8, site=str(SITE), model="flux-tiny", steps=(2,))
    save_sae(make_sae(config, sample=values), folder)
    return folder


@pytest.fixture
def words(collections, sae, tmp_path):
    sets = ["--captures", str(collections / "A"), "--report", str(collections / "B")]
    return ["--sae", str(sae), *sets, *FEW, "--output_dir", str(tmp_path / "concepts")]


def refused(capsys, main, *words):
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def test_features_are_scored_on_what_the_judge_saw_and_a_rerun_changes_no_byte(words, tmp_path, capsys):
    words = [*words, "--rows", "sae,pca"]
    assert flux_ir(["score-concepts", *words]) == 0
    printed = capsys.readouterr().out
    assert "colour, any patch, hard ones" in printed
    assert "of a circle" in printed
    assert "best of 64  best of 192" in printed  # of 256 features: as many as the noisy input and the axes have
    folder = tmp_path / "concepts" / "untaught"
    result = json.loads((folder / "concepts.json").read_text())
    rows = result["steps"]["2"]
    assert tuple(rows) == ("sae", "pca")
    asked = [one for one in result["questions"] if one["asked"]]
    assert 10 < len(asked) < len(result["questions"])
    for found in rows.values():
        assert len(found["answers"]) == len(asked)
    for one in result["questions"]:
        enough = min(one["report"].values()) >= 6 and min(one["pick"].values()) >= 3
        assert one["asked"] == enough
    assert result["sets"]["pick"]["prompts"] + sum(result["sets"]["pick"]["left_out"].values()) >= 20
    assert Image.open(folder / "concepts_step_2.png").width > 500
    lines = [re.split(r"  +", line.strip()) for line in printed.splitlines()]
    few = {line[0] for line in lines if "(too few" in line[0]}
    for one in result["questions"]:
        same = [o for o in result["questions"] if all(o[key] == one[key] for key in ("kind", "concept", "level"))]
        against = " and ".join(o["negatives"] for o in sorted(same, key=lambda o: o["negatives"]) if not o["asked"])
        name = f"{one['kind']} {one['concept']}, {LEVEL_WORDS[one['level']]}"
        assert (f"{name} (too few against {against})" in few) == bool(against)
    (titles,) = [line for line in lines if line[0].startswith("step 2, mean AUROC")]
    assert titles[2:6] == ["best feature", "recall", "PCA axis", "recall"]
    (means,) = [line for line in lines if line[0] == "colour, any patch, hard ones"]
    for column, row in ((2, "sae"), (4, "pca")):
        words_ = {"kind": "colour", "level": "any", "negatives": "hard"}
        chosen = [a for a in rows[row]["answers"] if all(a[key] == word for key, word in words_.items())]
        expected = [np.mean([a[number] for a in chosen]) for number in ("auroc", "recall")]
        assert [float(cell) for cell in means[column : column + 2]] == pytest.approx(expected, abs=6e-4)
    before = {path: path.read_bytes() for path in (tmp_path / "concepts").rglob("*") if path.is_file()}
    assert score(words) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "concepts").rglob("*") if path.is_file()} == before


def test_padding_of_the_text_has_no_features(collections, tmp_path):
    source, site = open_source(collections / "A"), Site.parse("double.3.txt")
    labels = labels_of(source, "pick", None, tmp_path, 10**6, site, lambda _: None)
    part = LabelledTokens(source, labels, site, 2)
    config = SAEConfig("topk", source.d(site), 256, k=8, site=str(site), model="flux-tiny", steps=(2,))
    codes = part.codes(make_sae(config, sample=part.values().float()))
    lengths = [source.read(int(image), site, 2).used_txt for image in labels.images]
    image, token = np.divmod(codes.token, source.tokens(site))
    assert max(lengths) < source.tokens(site)
    assert np.bincount(image).tolist() == [8 * length for length in lengths]
    assert (token < np.array(lengths)[image]).all()


def halves(folder, collections):
    """Masks of the left or of the right half of every picture."""
    for side in ("left", "right"):
        (folder / "half" / side).mkdir(parents=True)
    for part in "AB":
        for number, one in enumerate(open_source(collections / part).generations):
            half = np.zeros((8, 8), np.uint8)
            half[:, slice(4) if number % 2 else slice(4, 8)] = 255
            Image.fromarray(half).save(folder / "half" / ("left" if number % 2 else "right") / f"{one.id}.png")
    return folder


def test_every_row_is_made(words, collections, tmp_path):
    assert score([*words, "--labels", str(halves(tmp_path / "masks", collections))]) == 0
    result = json.loads((tmp_path / "concepts" / "untaught" / "concepts.json").read_text())
    rows, asked = result["steps"]["2"], [one for one in result["questions"] if one["asked"]]
    assert tuple(rows) == ROWS
    assert {(one["concept"], one["level"]) for one in asked} == {
        (side, level) for side in ("left", "right") for level in ("interior", "any", "image")
    }
    for row, found in rows.items():
        assert len(found["answers"]) == len(asked), row
        for one in found["answers"]:
            assert 0 <= one["auroc"] <= 1
            assert row == "null" or one["interval"][0] <= one["interval"][1]
    assert rows["sae"]["candidates"] == rows["random"]["candidates"] == rows["untrained"]["candidates"] == 256
    assert [rows[row]["candidates"] for row in ("neurons", "pca", "input_axes", "probe")] == [768, 192, 64, None]
    assert not (tmp_path / "concepts" / "judged").exists()


def test_rows_that_are_there_are_not_made_again(words, tmp_path, collections, sae):
    chosen = [*words, "--rows", "pca,sae"]
    assert score(chosen) == 0
    parts = sorted((tmp_path / "concepts" / "parts").iterdir())
    assert [path.name.split("_step")[0] for path in parts] == ["pca", "sae"]
    times = [path.stat().st_mtime_ns for path in parts]
    other = shutil.copytree(sae, tmp_path / "renamed")
    place = words.index("--sae")
    assert score([*chosen[:place], "--sae", str(other), *chosen[place + 2 :]]) == 0
    assert sorted((tmp_path / "concepts" / "parts").iterdir()) == parts
    assert [path.stat().st_mtime_ns for path in parts] == times
    found = [
        json.loads((tmp_path / "concepts" / name / "concepts.json").read_text()) for name in ("untaught", "renamed")
    ]
    assert found[0]["steps"] == found[1]["steps"]


def test_neurons_that_were_not_kept_are_computed_by_the_model(collections, sae, tmp_path, capsys):
    """The same numbers, up to the rounding of a batch of another size."""
    for part in "AB":
        words = [
            "--model",
            "flux-tiny",
            "--prompts",
            str(collections / f"{part}.txt"),
            "--num_steps",
            "4",
            "--steps",
            "2",
        ]
        words += ["--sites", "single.6.img", "--save_images", "--output_dir", str(tmp_path / part)]
        assert collect(words) == 0
    settings = {"rows": "neurons", "null": 0, "bootstrap": 0, "least_positives": 40}
    stored = score_concepts(sae, collections / "A", collections / "B", output_dir=tmp_path / "stored", **settings)
    bare = score_concepts(sae, tmp_path / "A", tmp_path / "B", output_dir=tmp_path / "bare", **settings)
    assert bare.result["steps"]["2"] == {}
    run = score_concepts(sae, tmp_path / "A", tmp_path / "B", output_dir=tmp_path / "run", run_model=True, **settings)
    found = [one.auroc("neurons", 2, level="any") for one in (stored, run)]
    assert len(found[0]) == len(found[1]) > 3
    np.testing.assert_allclose(*found, atol=0.02)


def test_labels_from_a_table(collections, words, tmp_path):
    known = [one for part in "AB" for one in open_source(collections / part).generations]
    rows = ["id,many", *(f"{one.id},{'two' if ' a ' in one.prompt[2:-20] else 'one'}" for one in known)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert score([*words, "--rows", "sae,probe,shuffled", "--labels", str(tmp_path / "labels.csv")]) == 0
    result = json.loads((tmp_path / "concepts" / "untaught" / "concepts.json").read_text())
    answers = result["steps"]["2"]["probe"]["answers"]
    assert [(one["kind"], one["concept"], one["level"]) for one in answers] == [
        ("many", "one", "image"),
        ("many", "two", "image"),
    ]
    assert result["settings"]["labels"] == "labels.csv"


def test_probes_of_every_site_and_step(collections, tmp_path, capsys):
    rows = ["id,objects,number"]
    source = open_source(collections / "A")
    for number, one in enumerate(source.generations):
        values = source.read(number, "double.3.txt", 2).floats().float()
        rows.append(f"{one.id},{'two' if number % 3 else 'one'},{values[:, 3].mean():.6f}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    words = ["--captures", str(collections / "A"), "--least_positives", "2", "--bootstrap", "0"]
    words += ["--output_dir", str(tmp_path / "probes")]
    assert flux_ir(["probe", *words, "--labels", str(tmp_path / "labels.csv"), "--held_out", "0.5"]) == 0
    result = json.loads((tmp_path / "probes" / "A" / "probes.json").read_text())
    assert list(result["sites"]) == ["double.3.txt", "single.6.img", "single.6.img.neurons"]
    for of_steps in result["sites"].values():
        assert [one["concept"] for one in of_steps["2"]["answers"]] == ["one", "two"]
        (number,) = of_steps["2"]["numbers"]
        assert number["pictures"] == [10, 10]
    assert result["sites"]["double.3.txt"]["2"]["numbers"][0]["r_squared"] > 0.5
    assert "number (R^2), step 2" in capsys.readouterr().out
    before = (tmp_path / "probes" / "A" / "probes.json").read_bytes()
    assert probe([*words, "--labels", str(tmp_path / "labels.csv"), "--held_out", "0.5"]) == 0
    assert (tmp_path / "probes" / "A" / "probes.json").read_bytes() == before
    words += ["--report", str(collections / "B"), "--sites", "single.6.img", "--name", "tiny"]
    assert probe(words) == 0
    result = json.loads((tmp_path / "probes" / "tiny" / "probes.json").read_text())
    assert {one["level"] for one in result["sites"]["single.6.img"]["2"]["answers"]} == {"any", "image"}
    assert Image.open(tmp_path / "probes" / "tiny" / "probes.png").width > 300


def test_sets_with_a_common_prompt_are_refused_before_anything_else(collections, sae, tmp_path, capsys):
    words = ["--sae", sae, "--captures", collections / "A", "--report", collections / "A"]
    error = refused(capsys, score, *words, "--output_dir", tmp_path / "concepts")
    assert "what picks and what reports must share no prompt: " in error
    first = open_source(collections / "A").generations[0].prompt
    assert f"both have {first!r}" in error
    assert not (tmp_path / "concepts").exists()
    assert "must share no prompt" in refused(
        capsys, probe, "--captures", collections / "A", "--report", collections / "A", "--output_dir", tmp_path
    )


def test_too_few_positives_are_no_number_but_an_error(words, capsys):
    error = refused(capsys, score, *[word.replace("6", "5000") if word == "6" else word for word in words])
    assert "no concept has 5000 positives to report on and half as many to pick with" in error


def test_one_picture_to_pick_with_is_one_line(collections, words, tmp_path, capsys):
    (tmp_path / "one.txt").write_text((collections / "A.txt").read_text().splitlines()[0])
    collect_part(tmp_path / "one.txt", "single.6.img", tmp_path / "one")
    changed = [str(tmp_path / "one") if word == str(collections / "A") else word for word in words]
    error = refused(capsys, score, *changed)
    assert "pictures of two prompts or more are needed: pick has 1 picture of 1 prompt, of 1 generation" in error


def test_wrong_words_are_one_line_each(words, collections, tmp_path, capsys):
    assert "the steps to score at must have been collected: got 3" in refused(capsys, score, *words, "--steps", "3")
    assert "labels are a table" in refused(capsys, score, *words, "--labels", tmp_path / "none")
    assert "--name is the name of one folder" in refused(capsys, score, *words, "--name", "a/b")
    grid = ["--captures", collections / "A", "--output_dir", tmp_path]
    assert "the steps to probe must have been collected: got 7" in refused(capsys, probe, *grid, "--steps", "7")
    assert "no site of these captures matches 'single.9*'" in refused(capsys, probe, *grid, "--sites", "single.9*")
    assert "no label has 900 positives" in refused(capsys, probe, *grid, "--least_positives", "900", "--sites", "*.txt")


def test_captures_without_pictures_are_refused(collections, words, tmp_path, capsys):
    for part in "AB":
        bare = shutil.copytree(collections / part, tmp_path / part)
        shutil.rmtree(bare / "pictures")
    sets = ["--captures", tmp_path / "A", "--report", tmp_path / "B"]
    error = refused(capsys, score, *words[:2], *sets, *words[6:])
    assert "every generation must have its picture: 20 of 20 have none" in error
    assert "--save_images, or give --labels FILE" in error
