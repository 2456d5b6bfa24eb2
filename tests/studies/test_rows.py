"""The rows of the study on tokens of which it is known what they mean."""

import copy
from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch

from flux_ir.demo.scenes import COLOURS
from flux_ir.studies.auroc import auroc
from flux_ir.studies.concepts import Readers, askable, limited, null_as_json
from flux_ir.studies.judged import judge_collection
from flux_ir.studies.labelled_tokens import LabelledTokens
from flux_ir.studies.labels import known_answers
from flux_ir.studies.rows import (
    Bench,
    FeatureRows,
    Space,
    _ranks,
    best_directions,
    best_of,
    mean_differences,
    pooled,
    principal_axes,
    probes,
    random_directions,
)
from tests.studies.drawn import SITE, TEXT, TOKENS, D, TrueScenes, channels, drawn


class Texts(TrueScenes):
    """The tokens of pictures as if they were those of texts, each of another length; the others are padding."""

    @classmethod
    def of(cls, source):
        texts = copy.copy(source)
        texts.__class__, texts.values = cls, source.values.clone()
        return texts

    def fill_padding(self, value):
        for image in range(len(self.scenes)):
            self.values[:, image, length_of(image) :] = value

    def read_run(self, images, site, step, tokens=None, memory=None):
        lengths = [length_of(image) for image in images]
        return super().read_run(images, site, step, tokens)._replace(txt_tokens=TOKENS, used_txt=lengths)


def length_of(image):
    return 5 + image % 7


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    sources = [drawn(tmp_path_factory.mktemp("drawn"), 120, seed) for seed in (0, 1)]
    parts = [LabelledTokens(source, known_answers(judge_collection(source)), SITE, 0) for source in sources]
    return Bench(*parts, askable(*parts, 15), draws=0)


@pytest.fixture(scope="module")
def features(bench):
    return FeatureRows(bench, channels())


@pytest.fixture(scope="module")
def space(bench):
    return Space(bench.pick.values(), bench.report.values())


@pytest.fixture(scope="module")
def few(bench):
    """Of the tasks those about colours of patches, and two of whole pictures: fitting takes a while."""
    planted = [one for one in bench.tasks if is_planted(one)]
    return replace(bench, tasks=[*planted, *bench.tasks[-2:]])


def is_planted(task):
    return task.question.kind == "colour" and task.question.of_tokens


def test_best_features_are_exact_on_both_sets(bench, features):
    sae = channels()
    dense = [part.values().clamp(min=0).numpy() for part in (bench.pick, bench.report)]
    for answer in features.best():
        task = answer.task
        values = dense
        if not task.question.of_tokens:
            values = [side.reshape(-1, 64, D).max(1) for side in dense]
        flags = [part.flags(task) for part in (bench.pick, bench.report)]
        found = [[auroc(column, *flag) for column in side.T] for side, flag in zip(values, flags, strict=True)]
        feature, sign, best = best_of(np.array(found[0]))
        assert (answer.chosen["feature"], answer.chosen["sign"]) == (feature, sign)
        expected = found[1][feature] if sign > 0 else 1 - found[1][feature]
        assert (answer.picked_on, answer.auroc) == pytest.approx((best, expected))
        if is_planted(task):
            assert answer.auroc > 0.999
            assert answer.recall > 0.8
            assert answer.precision > 0.9
            assert COLOURS[feature] == task.question.concept
    assert sae.config.d_sae == features.candidates


def test_the_best_of_fewer_is_the_mean_over_all_draws(bench, features):
    """Against the sum over all subsets of three of the twelve features."""
    from itertools import combinations

    answers = {answer.task: answer for answer in features.best(fewer=(3, D))}
    for task in bench.tasks[::9]:
        there, here = features.pick.aurocs(task), features.report.aurocs(task)
        picked = [max(some, key=lambda f: (abs(there[f] - 0.5), -f)) for some in combinations(range(D), 3)]
        assert len(picked) == comb(D, 3)
        expected = np.mean([here[f] if there[f] >= 0.5 else 1 - here[f] for f in picked])
        assert answers[task].chosen["expected_of_fewer"] == {"3": pytest.approx(expected, abs=2e-4)}


def test_k_sparse_probes_read_the_features_that_differ_most(few):
    for answer in FeatureRows(few, channels()).k_sparse(2):
        if is_planted(answer.task):
            assert COLOURS.index(answer.task.question.concept) in answer.chosen["features"]
            assert len(answer.chosen["features"]) == 2
            assert answer.auroc > 0.99


def test_the_null_of_a_planted_feature_is_chance(bench, features):
    draws = [[(found, picked) for _, picked, found in features.null(draw)] for draw in range(8)]
    reported, picked = np.moveaxis(np.array(draws), -1, 0)
    assert reported.shape == (8, len(bench.tasks))
    assert abs(reported.mean() - 0.5) < 0.02
    assert picked.min() >= 0.5
    assert picked.mean() > reported.mean()
    assert [[pair for _, *pair in features.null(3)]] == [[pair for _, *pair in features.null(3)]]
    assert [pair for _, *pair in features.null(3)] != [pair for _, *pair in features.null(4)]


def test_the_axis_of_a_planted_channel_is_found(bench, space):
    """With the axes of the space as candidates, and with directions that are these axes in another order, reversed."""
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    axes = {a.task: a for a in best_directions(bench, space, None)}
    reversed_ = {a.task: a for a in best_directions(bench, space, -torch.eye(D)[:, order])}
    assert axes.keys() == reversed_.keys() == set(bench.tasks)
    for task, answer in axes.items():
        other = reversed_[task]
        assert other.auroc == pytest.approx(answer.auroc, abs=1e-6)
        if is_planted(task):
            assert (answer.chosen["candidate"], answer.chosen["sign"]) == (
                COLOURS.index(task.question.concept),
                1,
            )
            assert (int(order[other.chosen["candidate"]]), other.chosen["sign"]) == (answer.chosen["candidate"], -1)
            assert answer.auroc > 0.999
        if not task.question.of_tokens:
            chosen, sign = answer.chosen["candidate"], answer.chosen["sign"]
            largest = (sign * bench.report.values()[:, chosen]).reshape(-1, 64).amax(1).numpy()
            assert answer.auroc == pytest.approx(auroc(largest, *bench.report.flags(task)))


def test_ranks_of_values_that_tie_are_their_mean():
    values = torch.tensor([[3.0, 1, 1, 2, 3, 3], [0.0, 0, 0, 0, 0, 0], [5.0, 4, 3, 2, 1, 0]])
    expected = [[4, 0.5, 0.5, 2, 4, 4], [2.5] * 6, [5, 4, 3, 2, 1, 0]]
    assert _ranks(values).tolist() == expected


def test_more_candidates_are_screened_than_are_held_at_once(bench, space, monkeypatch):
    expected = [(a.chosen, a.auroc) for a in best_directions(bench, space, random_directions(D, 50, 1))]
    monkeypatch.setattr("flux_ir.studies.rows._NUMBERS", 7 * 64 * bench.pick.images)
    assert [(a.chosen, a.auroc) for a in best_directions(bench, space, random_directions(D, 50, 1))] == expected


def test_probes_and_mean_differences_read_planted_channels(few, space):
    for row, least in ((probes(few, space), 0.97), (mean_differences(few, space), 0.8)):
        answers = {answer.task: answer for answer in row}
        assert answers.keys() == set(few.tasks)
        assert min(answer.auroc for one, answer in answers.items() if is_planted(one)) > least


def test_a_probe_on_shuffled_captions_reads_nothing(few, space):
    found = [answer.auroc for answer in probes(few, space, shuffled=True) if is_planted(answer.task)]
    assert abs(np.mean(found) - 0.5) < 0.12


def test_pictures_are_means_and_extremes_of_their_tokens():
    tokens = torch.randn(12, 3).bfloat16()
    expected = tokens.float().reshape(3, 4, 3)
    found = pooled(tokens, 4)
    assert torch.allclose(found, torch.cat([expected.mean(1), expected.amax(1), expected.amin(1)], 1))


@pytest.mark.parametrize("site", [TEXT, None])  # None: a layer of a text encoder, which is read as one array
def test_what_stands_in_padding_changes_no_row(bench, site):
    asked = [one for one in bench.tasks if not one.question.of_tokens][:2]
    sides = [(Texts.of(part.source), part.labels) for part in (bench.pick, bench.report)]
    found = []
    for padding in (0.0, 1e4):
        for source, _ in sides:
            source.fill_padding(padding)
        texts = Bench(*(LabelledTokens(source, labels, site, 0) for source, labels in sides), asked, draws=0)
        readers = Readers(texts, channels(), None, null_draws=0)
        names = ("sae", "untrained", "pca", "random", "mean_difference", "probe")
        found.append({name: [(a.auroc, a.picked_on, a.chosen) for a in readers.row(name)] for name in names})
    assert found[0] == found[1]
    lengths = [length_of(int(image)) for image in texts.report.labels.images]
    assert texts.report.used.sum(1).tolist() == lengths
    dense = texts.report.values()
    rows = [row[:length] for row, length in zip(dense.reshape(-1, TOKENS, D), lengths, strict=True)]
    expected = torch.stack([torch.cat([row.mean(0), row.amax(0), row.amin(0)]) for row in rows])
    assert torch.allclose(pooled(dense, TOKENS, texts.report.used), expected, atol=1e-6)


def test_principal_axes_are_orthonormal_and_in_order():
    tokens = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 2, 0.1])
    axes = principal_axes(tokens)
    assert torch.allclose(axes.T @ axes, torch.eye(4), atol=1e-5)
    assert (tokens @ axes).var(0).argsort(descending=True).tolist() == [0, 1, 2, 3]


def test_readers_say_what_they_lack(bench):
    readers = Readers(bench, channels(), None, null_draws=3)
    missing = {row: why for row, why in readers.available().items() if why}
    assert missing.keys() == {"neurons", "input_axes", "input_probe"}
    assert readers.candidates("random") == readers.candidates("untrained") == D
    assert readers.candidates("probe") is None
    with_neurons = replace(readers, neurons=lambda part: part.values()[:, :5])
    assert with_neurons.available()["neurons"] is None
    assert with_neurons.candidates("neurons") == 5
    assert len(list(with_neurons.row("neurons"))) == len(bench.tasks)
    assert readers.fewer == ()
    assert replace(readers, neuron_count=5).fewer == (5,)
    assert all("5" in one.chosen["expected_of_fewer"] for one in replace(readers, neuron_count=5).row("sae"))
    found = readers.null()
    assert {pairs.shape for pairs in found.values()} == {(3, 2)}
    assert all(0.4 < row["mean"] < 0.6 <= row["auroc"] + 0.15 for row in null_as_json(found))


def test_pictures_are_limited_by_whole_prompts(bench):
    labels = replace(bench.pick.labels, prompts=tuple(f"{i // 3}" for i in range(bench.pick.images)))
    fewer = limited(labels, 20, seed=0)
    assert 15 <= len(fewer.images) <= 20
    assert set(np.bincount(fewer.groups)) == {3}
    assert limited(labels, 10**6, seed=0) is labels
