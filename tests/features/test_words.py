"""Words that lift features and the tokens these fire on, against what was planted and against brute force."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import fisher_exact

from flux_ir.features.folder import open_features
from flux_ir.features.significance import q_values
from flux_ir.features.words import (
    LEAST_STRONG,
    Lift,
    Phrases,
    PromptTokens,
    find_tokenizer,
    lift,
    phrases_of,
    prompt_numbers_of,
    prompt_tokens,
    shortened,
    strength_bounds,
    strong_prompts,
    token_lists,
)
from tests.features.conftest import FEATURES, STEPS, dense_of
from tests.features.planted import ALWAYS, CAPTIONS, DEAD, NOISE, RARE, RED, ROUND, write_planted


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_planted(tmp_path_factory.mktemp("planted"))


def words_of(prompts, min_count=1, **options):
    found = phrases_of(prompts, min_count=min_count, most=options.pop("most", 100), **options)
    return {text: np.flatnonzero(found.has.toarray()[:, number]).tolist() for number, text in enumerate(found.texts)}


# ---- Phrases


def test_phrases_are_of_up_to_three_words_without_articles_at_their_ends():
    found = words_of(["A Red circle", "the red, circle it's", "nothing", "circle"])
    assert found["red"] == [0, 1]
    assert found["circle"] == [0, 1, 3]
    assert found["red circle"] == [0]  # not over the comma of the second
    assert found["circle it's"] == [1]
    assert not {"a", "a red", "the", "the red", "red circle it's"} & set(found)
    assert found["nothing"] == [2]
    longest = words_of(["one two three four five", "one two three four", "one two three", "one two", "one", "none"])
    assert max(len(text.split()) for text in longest) == 3


def test_of_phrases_in_the_same_prompts_one_stands_for_all():
    prompts = [f"a {colour} star on the {side} on a {ground} background" for colour in ("red", "blue")
               for side in ("left", "right") for ground in ("white", "black")]  # fmt: skip
    found = words_of(prompts, min_count=4)
    assert set(found) == {"red star", "blue star", "left", "right", "white background", "black background"}
    others = words_of([*prompts, "a star left of a star"], min_count=4)
    assert {"left", "on the left"} <= set(others)  # no longer the same prompts


def test_frequent_words_come_first_and_those_of_all_or_few_prompts_are_left_out():
    prompts = ["dog cat", "dog cat bird", "dog bird cat", "dog fox"]
    assert list(words_of(prompts, longest=1)) == ["cat", "bird", "fox"]  # all have a dog
    assert list(words_of(prompts, longest=1, min_count=2)) == ["cat", "bird"]
    assert list(words_of(prompts, longest=1, most=1)) == ["cat"]
    assert words_of(["", ""]) == {}


# ---- Strong and silent images


def test_levels_are_the_strongest_fifth_or_fifty_and_what_is_silent(planted):
    folder, n = planted, len(CAPTIONS) * 2
    bounds = strength_bounds(folder, "img")
    scores = np.zeros((n, 16))
    for image in range(n):
        part = folder.part_of(image)
        rows = part.rows(image)
        scores[image, part.feature[rows]] = part.max[rows]
    strong, active = (scores >= bounds.strong).sum(0), (scores > 0).sum(0)
    for feature in range(16):
        wanted = min(max(np.ceil(0.2 * active[feature]), LEAST_STRONG), active[feature])
        assert strong[feature] >= wanted
        # rounded to a sixteenth of an octave: nobody weaker than that is in
        assert (
            strong[feature]
            <= (scores[:, feature] >= 2**-0.125 * np.sort(scores[:, feature])[-max(1, int(wanted))]).sum()
        )
    assert strong[RARE] == active[RARE] == 4
    assert np.isinf(bounds.strong[DEAD])
    assert bounds.silent[RED] == 0
    weak = (scores[:, ALWAYS] <= bounds.silent[ALWAYS]).sum()
    assert 0.12 * n < weak < 0.28 * n  # it fires everywhere: the weakest fifth
    assert (bounds.silent < bounds.strong).all()


def test_strong_prompts_are_those_with_a_strong_image(planted):
    groups = prompt_numbers_of([row.prompt for row in planted.images])
    assert len(set(groups)) == len(CAPTIONS)
    strong = strong_prompts(planted, "img", strength_bounds(planted, "img"), groups).toarray()
    assert strong.shape == (len(CAPTIONS), 16)
    assert set(np.unique(strong)) == {0, 1}
    assert strong[:, RARE].sum() == 4
    by_prompt = {groups[image] for image in planted.scores_of(RARE)[0]}
    assert set(np.flatnonzero(strong[:, RARE])) == by_prompt


# ---- Lift


def test_lift_is_fishers_test_over_all_pairs():
    draw = np.random.default_rng(0)
    has, strong = ((draw.random((60, n)) < 0.3).astype(float) for n in (9, 7))
    strong[:, 2] = has[:, 4]
    strong[:, 6] = 0
    phrases = Phrases([f"w{word}" for word in range(9)], csr_array(has))
    found = lift(phrases, csr_array(strong), min_count=2, fdr=0.2)
    p = np.ones((7, 9))
    for feature, word in np.ndindex(p.shape):
        both = int(has[:, word] @ strong[:, feature])
        table = [[both, has[:, word].sum() - both], [strong[:, feature].sum() - both, 0]]
        table[1][1] = 60 - sum(map(sum, table))
        if both >= 2:
            p[feature, word] = fisher_exact(table, alternative="greater").pvalue
    q = q_values(np.sort(p.ravel()), tests=6 * 9)  # one feature has no strong prompt
    expected = {divmod(at, 9) for at in np.argsort(p.ravel(), kind="stable")[: (q <= 0.2).sum()]}
    assert set(zip(found.feature, found.word, strict=True)) == expected
    assert (2, 4) in expected
    first = np.flatnonzero(found.feature == 2)[0]
    n_word = has[:, 4].sum()
    assert found.word[first] == 4
    assert found.pmi[first] == pytest.approx(np.log2(60 / n_word))
    assert (found.both[first], found.strong[first], found.with_word[first]) == (n_word, n_word, n_word)
    np.testing.assert_allclose(found.p[first], p[2, 4])


def test_chance_alone_lifts_nothing(planted):
    groups = prompt_numbers_of([row.prompt for row in planted.images])
    phrases = phrases_of(CAPTIONS, min_count=5, most=1000)
    strong = strong_prompts(planted, "img", strength_bounds(planted, "img"), groups)
    found = lift(phrases, strong, min_count=5, fdr=0.05)
    names = {feature: [phrases.texts[w] for w in found.word[found.feature == feature]] for feature in range(16)}
    assert names[RED][0] == "red"
    assert {"circle", "ring"} <= set(names[ROUND])
    assert names[ALWAYS][0] == "star"
    assert names[NOISE] == names[DEAD] == names[RARE] == []
    short = shortened(found, phrases.texts, 12)
    assert [phrases.texts[w] for w in short.word[short.feature == RED]] == ["red"]  # not "large red", "red star" ...


def test_a_longer_phrase_is_kept_where_it_says_more():
    texts = ["red", "red square", "red circle"]
    columns = [[0, 0, 0], [0, 1, 2], [1.0, 2.0, 1.2], [9] * 3, [9] * 3, [9] * 3, [0.0] * 3, [0.0] * 3]
    found = Lift._make(map(np.array, columns))
    assert shortened(found, texts, 5).word.tolist() == [0, 1]
    assert shortened(found, texts, 1).word.tolist() == [0]


# ---- Tokens of the text


def test_tokens_are_those_the_model_was_told():
    tokenizer = find_tokenizer("flux-tiny", None)
    tokens = prompt_tokens(tokenizer, ["a red circle", "a blue star on a white background", "a red circle"], 12)
    said = [[tokens.strings[token] for token in row] for row in tokens.ids]
    assert said[0] == said[2]
    assert "".join(said[0][:3]).replace(" ", "") == "aredcircle"
    assert tokens.ids[0][3] == tokens.end
    assert (tokens.ids[0][4:] == tokens.padding).all()
    assert tokens.ids.shape == (3, 12)
    assert find_tokenizer("tiny", None) is find_tokenizer(None, None) is None


def test_token_lists_are_those_of_brute_force(small):
    folder = open_features(small / "features" / "whole")
    z = dense_of(small / "saes" / "whole", small / "captures", "single.1", "txt").z  # NaN on padding
    ids = np.random.default_rng(0).integers(0, 4, (10, 7))
    ids[:, 2], ids[:, 3:] = 4, 5
    tokens = PromptTokens(["a", "b", "c", "d", "</s>", "<pad>"], ids, 4, 5)
    found = token_lists(folder, tokens)
    for feature in range(FEATURES):
        total = np.zeros(6)
        for token in range(6):
            here = np.nan_to_num(z[..., feature])[np.broadcast_to((ids == token)[:, None], z.shape[:3])]
            total[token] = here.sum()
            places = np.flatnonzero(found.token[feature] == token)
            assert len(places) == (here > 0).any()
            if len(places):
                assert found.fired[feature, places[0]] == (here > 0).sum()
                assert found.mean[feature, places[0]] == pytest.approx(here[here > 0].mean(), rel=1e-5)
                assert found.of[feature, places[0]] == len(STEPS) * (ids == token)[:, :3].sum()
        listed = found.token[feature][found.token[feature] >= 0]
        assert np.all(np.diff(total[listed]) <= 1e-6)
        if total.sum():
            assert found.on_end[feature] == pytest.approx(total[4] / total.sum(), rel=1e-5)
    assert (found.on_padding == 0).all()
