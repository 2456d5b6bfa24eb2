"""Labels of planted features: the right ones, judged on other prompts; none for chance; files, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

import flux_ir
from flux_ir.commands.main import main
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import open_features
from flux_ir.features.labels import (
    MOST_IMAGES,
    Candidates,
    Description,
    FeatureImages,
    _difference_interval,
    clip_candidates,
    describe,
    description_text,
    feature_images,
    holds,
    judge,
    judged_images,
    read_labels,
)
from flux_ir.features.words import phrases_of, prompt_numbers_of, read_words, strength_bounds
from tests.features.planted import (
    ALWAYS,
    CAPTIONS,
    CIRCLE,
    DEAD,
    LARGE_ON_WHITE,
    NOISE,
    RARE,
    RED,
    RED_SQUARE,
    ROUND,
    write_planted,
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return write_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def folder(scored, tmp_path):
    """A copy to write labels into."""
    return open_features(shutil.copytree(scored.path, tmp_path / "planted"))


def made_of(scored):
    """The candidates, and both sides' images."""
    groups = prompt_numbers_of([row.prompt for row in scored.images])
    phrases = phrases_of(CAPTIONS, min_count=5, most=1000)
    firsts = np.unique(groups, return_index=True)[1]
    assert [scored.images[first].prompt for first in firsts] == CAPTIONS
    candidates = Candidates(phrases.texts, ["words"] * len(phrases.texts), phrases.has[groups].tocsr())
    judged = judged_images(scored)
    return (
        candidates,
        groups,
        judged,
        feature_images(scored, "img", strength_bounds(scored, "img"), groups, judged, seed=0),
    )


def test_sides_share_no_prompt_and_hold_one_image_of_each(scored):
    _, groups, judged, sides = made_of(scored)
    assert 0.4 < judged.mean() < 0.6
    assert len({groups[image] for image in np.flatnonzero(judged)} & {*groups[~judged]}) == 0
    red = np.array(["red" in row.prompt for row in scored.images])
    for side, of in enumerate(sides):
        for name, images in of._asdict().items():
            for feature, row in enumerate(images):
                kept = row[row >= 0]
                assert (judged[kept] == bool(side)).all()
                assert len({*groups[kept]}) == len(kept) <= MOST_IMAGES
                values = scored_values(scored, feature)[kept]
                assert (values > 0).all() if name == "strong" else feature == ALWAYS or (values == 0).all()
        assert red[of.strong[RED][of.strong[RED] >= 0]].all()
        assert not red[of.silent[RED][of.silent[RED] >= 0]].any()
        assert (of.strong[DEAD] == -1).all()


def scored_values(scored, feature):
    images, values = scored.scores_of(feature)
    found = np.zeros(scored.settings.images)
    found[images] = values
    return found


def test_look_alikes_are_like_the_strong_images_in_what_else_fires(scored):
    """Silent images of the feature of red squares: those that look alike are red, or fire on what squares fire on."""
    _, _, _, (own, _) = made_of(scored)
    red = np.array(["red" in row.prompt for row in scored.images])
    alike, silent = (red[images[RED_SQUARE][images[RED_SQUARE] >= 0]] for images in (own.alike, own.silent))
    assert alike.mean() > 1.5 * silent.mean()


def test_planted_features_get_their_labels_and_chance_gets_none(folder, capsys):
    assert main(["label-features", "--features", str(folder.path)]) == 0
    printed = capsys.readouterr()
    labels = read_labels(open_features(folder.path))
    texts = {feature: row["text"] for feature, row in labels.items()}
    assert texts.pop(RED) == "red"
    assert texts.pop(CIRCLE) == "circle"
    assert texts.pop(RED_SQUARE) == "red square"
    assert set(texts.pop(ROUND).split(" or ")) == {"circle", "ring"}
    assert set(texts.pop(LARGE_ON_WHITE).split(" and ")) == {"large", "white background"}
    assert texts.pop(ALWAYS) == "star"
    assert texts == {}
    every = {row["feature"]: row for row in json.loads((folder.path / "labels.json").read_text())["streams"]["img"]}
    assert every[NOISE]["text"] is None
    assert every[NOISE]["low"] < 0.5
    assert not {DEAD, RARE} & set(every)  # too few images
    assert labels[RED]["score"] == 1.0 == labels[RED]["high"]
    assert 0.9 < labels[RED]["low"] < 1
    assert labels[RED]["strong"][0] == labels[RED]["strong"][1] > 25
    assert labels[RED]["alike"] == [0, MOST_IMAGES]
    words = read_words(open_features(folder.path))
    assert words[RED][0][0] == "red"
    assert words[RED][0][1] == pytest.approx(2, abs=0.01)  # a quarter of the prompts
    assert "img: words of the prompts lift 6 of 16 features, and 6 have a label" in printed.out
    assert "red square" in printed.out


def test_a_description_is_picked_on_one_side_and_judged_on_the_other(scored):
    candidates, _, judged, (own, others) = made_of(scored)
    described = describe(candidates, own)
    cheat = judged[:, None] & (np.arange(16) == NOISE)  # what holds on exactly the strong images the describer saw
    fitted = np.zeros((len(judged), 1), np.float32)
    fitted[own.strong[NOISE][own.strong[NOISE] >= 0]] = 1
    with_cheat = Candidates(["cheat"], ["words"], csr(fitted))
    found = describe(with_cheat, own)
    assert cheat.any()
    assert found.score[NOISE] == 1
    verdict = judge(with_cheat, found, others)
    assert verdict.score[NOISE] == 0.5
    assert verdict.q[NOISE] == 1
    assert description_text(candidates, described, RED) == "red"


def csr(dense):
    from scipy.sparse import csr_array

    return csr_array(dense)


def test_shares_and_scores_are_those_of_counting():
    draw = np.random.default_rng(0)
    has = (draw.random((50, 4)) < 0.4).astype(np.float32)
    candidates = Candidates([f"c{n}" for n in range(4)], ["words"] * 4, csr(has))
    lists = [np.where(np.arange(MOST_IMAGES) < 20, draw.integers(0, 50, (3, MOST_IMAGES)), -1) for _ in range(3)]
    side = FeatureImages(*lists)
    found = describe(candidates, side)
    for feature in range(3):
        shares = [has[images[feature, :20]].mean(0) for images in lists]
        balanced = 0.5 + (shares[0] - (shares[1] + shares[2]) / 2) / 2
        if found.second[feature] < 0:
            assert found.first[feature] == balanced.argmax()
            assert found.score[feature] == pytest.approx(balanced.max())
        else:
            assert found.score[feature] >= balanced.max() + 0.05
    both = Description(np.array([0, 1, 2]), np.array([1, 2, -1]), np.array([True, False, False]), np.ones(3))
    said = holds(candidates, both, np.arange(3), lists[0])
    expected = np.stack(
        [
            (has[lists[0][0], 0] > 0) & (has[lists[0][0], 1] > 0),
            (has[lists[0][1], 1] > 0) | (has[lists[0][1], 2] > 0),
            has[lists[0][2], 2] > 0,
        ]
    )
    assert (said[:, :20] == expected[:, :20]).all()
    assert not said[:, 20:].any()
    verdict = judge(candidates, both, side)
    held = [
        np.array([holds(candidates, both, np.arange(3), images)[f, :20].mean() for f in range(3)]) for images in lists
    ]
    np.testing.assert_allclose(verdict.score, 0.5 + (held[0] - held[1]) / 2)
    np.testing.assert_allclose(verdict.score_silent, 0.5 + (held[0] - held[2]) / 2)


def test_the_interval_is_newcombes():
    """His table II: 56/70 - 48/80 gives .0524 to .3339, and 10/10 - 0/10 gives .6075 to 1 (method 10)."""
    low, high = _difference_interval(*(np.array(column) for column in ([56, 10], [70, 10], [48, 0], [80, 10])))
    np.testing.assert_allclose(low, [0.0524, 0.6075], atol=5e-5)
    np.testing.assert_allclose(high, [0.3339, 1.0], atol=5e-5)


def test_known_concepts_describe_what_no_word_does(folder, tmp_path):
    values = scored_values(folder, NOISE)
    ids = [row.id for row in folder.images if values[row.index] > 0]
    (tmp_path / "concepts.json").write_text(json.dumps({"a thing": ids, "nothing": []}))
    done = flux_ir.label_features(folder, concepts=tmp_path / "concepts.json")
    label = read_labels(done)[NOISE]
    assert (label["text"], label["source"], label["score"]) == ("a thing", "concepts", 1.0)
    assert read_labels(done)[RED]["source"] == "words"


def test_what_clip_sees_describes_features(scored):
    """A CLIP that knows colours and nothing else, and calls everything somewhat blue."""
    words = ["red", "blue", "green", "yellow"]
    seen = np.array([[word in row.prompt for word in words] for row in scored.images], np.float32)
    seen += 0.05 * np.random.default_rng(0).normal(size=seen.shape).astype(np.float32) + [0, 0.3, 0, 0]
    found = clip_candidates(words, torch.from_numpy(seen), torch.eye(4))
    assert found.has.shape == (len(seen), 12)
    assert found.has.sum(axis=0).tolist() == [48] * 4 + [144] * 4 + [384] * 4
    _, _, _, (own, others) = made_of(scored)
    described = describe(found, own)
    assert description_text(found, described, RED).split(" or ")[0] == "red"
    verdict = judge(found, described, others)
    assert verdict.score[RED] > 0.7
    assert verdict.low[NOISE] < 0.5


def test_a_second_run_changes_nothing_and_other_settings_do(folder):
    files = [folder.path / name for name in ("words.json", "labels.json", "features.json")]
    flux_ir.label_features(folder)
    before, notes = [file.read_bytes() for file in files], []
    for file in files[:2]:
        file.touch()
    flux_ir.label_features(folder, progress=notes.append)
    assert [note.text for note in notes] == [f"the words and labels in {folder.path} are complete"]
    again = flux_ir.label_features(folder, min_score=0.9)
    assert files[1].read_bytes() != before[1]
    flux_ir.label_features(again)
    assert [file.read_bytes() for file in files] == before
    files[1].unlink()
    flux_ir.label_features(folder.path)
    assert [file.read_bytes() for file in files] == before


def test_what_cannot_be_used_is_said(folder, tmp_path, small):
    (tmp_path / "list.json").write_text('["red"]')
    (tmp_path / "other.json").write_text('{"red": ["ffff"]}')
    for concepts, message in (
        (tmp_path / "list.json", "must be a JSON object"),
        (tmp_path / "other.json", "names 1 generation that .* lacks, such as ffff"),
        (tmp_path / "none.json", "cannot be read"),
    ):
        with pytest.raises(FluxIRError, match=message):
            flux_ir.label_features(folder, concepts=concepts)
    for wrong, message in (
        ({"vocabulary": tmp_path / "list.json"}, "got no --clip"),
        ({"fdr": 2.0}, "--fdr must be 0 to 1: got 2"),
        ({"min_score": 0.4}, "--min_score must be 0.5 to 1"),
        ({"min_count": 0}, "--min_count must be at least 1"),
    ):
        with pytest.raises(FluxIRError, match=message):
            flux_ir.label_features(folder, **wrong)
    assert not (folder.path / "labels.json").exists()
    assert read_labels(folder) is read_words(folder) is None
    with pytest.raises(FluxIRError, match="holds no features"):
        flux_ir.label_features(tmp_path)


def test_few_images_have_no_labels_and_text_of_an_unknown_model_no_names(small, tmp_path):
    notes = []
    copy = shutil.copytree(small / "features" / "whole", tmp_path / "whole")
    done = flux_ir.label_features(copy, progress=notes.append)
    said = [note.text for note in notes if hasattr(note, "text")]
    assert read_labels(done, "img") == read_labels(done, "txt") == {}
    assert sum("no description of a feature" in text for text in said) == 2
    assert any("the model's tokenizer is not on this machine" in text for text in said)
    assert json.loads((copy / "words.json").read_text())["streams"]["txt"]["tokens"] is None


def test_notebooks_and_pages_have_them(folder):
    with pytest.raises(FluxIRError, match="the stage labels is not complete") as told:
        _ = flux_ir.read_features(folder).labels
    assert told.value.hint == "run flux-ir label-features: it goes on there"
    flux_ir.label_features(folder)
    features = flux_ir.read_features(folder.path)
    assert features.labels[RED_SQUARE] == "red square"
    assert features.words(RED)[0][:1] == ("red",)
    assert features.words(DEAD) == []
    with pytest.raises(FluxIRError, match="features are numbered 0 to 15"):
        features.words(16)
    flux_ir.find_examples(folder.path)
    page = flux_ir.explore_features(folder.path, pictures=False)
    assert '"red square"' in (page.parent / "texts-img.js").read_text()
    assert "label-features" not in page.read_text()
