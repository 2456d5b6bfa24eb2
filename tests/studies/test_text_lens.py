"""The lens of the text encoders: layers as if they were the last, tokens from here and there, and known answers."""

import pytest
import torch
from scipy.stats import binomtest
from transformers import CLIPTextModel, T5EncoderModel

from flux_ir.demo.drawing import draw
from flux_ir.demo.judge import look
from flux_ir.demo.scenes import parse_caption
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import TextEncoders
from flux_ir.models.text import encode, load_clip, load_t5
from flux_ir.studies.text_lens import (
    NEVER,
    JudgedPicture,
    Selection,
    TextMix,
    answers,
    choose_layers,
    read_layers,
    read_swap,
    score,
    select,
    settling,
    wilson,
    words_of_prompt,
)

PROMPT, OTHER = "a red circle", "a large blue square"
LAYERS = ["t5.embeddings", "t5.0", "t5.1", "clip.embeddings", "clip.0", "clip.1"]
LENGTH = 9


@pytest.fixture(scope="module")
def encoders(text_folders):
    return TextEncoders(
        load_t5(text_folders.t5, text_folders.t5, LENGTH, "cpu", torch.float32),
        load_clip(text_folders.clip, text_folders.clip, "cpu", torch.float32),
    )


@pytest.fixture(scope="module")
def read(encoders):
    return {text: read_layers(encoders, text, LAYERS) for text in (PROMPT, OTHER, "")}


@pytest.fixture(scope="module")
def told(encoders, read):
    """What the transformer is told of the prompt."""

    def mixed(layer="t5.1", tokens="all", words=(), rest="empty", pooled="prompt", swaps=()):
        (selection,) = select(words_of_prompt(encoders, PROMPT), [tokens], words, LENGTH)
        return TextMix(swaps, rest, pooled).embedding(layer, selection, read[PROMPT], read[""], read[OTHER])

    return mixed


# ---- Layers


@torch.no_grad()
def test_layers_are_hidden_states_of_transformers_behind_its_last_norm(encoders, read, text_folders):
    t5, clip = T5EncoderModel.from_pretrained(text_folders.t5), CLIPTextModel.from_pretrained(text_folders.clip)
    states = t5(input_ids=encoders.t5.token_ids([PROMPT]), output_hidden_states=True).hidden_states
    for name, state in zip(("t5.embeddings", "t5.0"), states, strict=False):
        assert torch.equal(read[PROMPT].txt[name], t5.encoder.final_layer_norm(state)), name
    ids = encoders.clip.token_ids([PROMPT])
    end = (ids[0] == encoders.clip.tokenizer.end_id).int().argmax()
    states = clip(input_ids=ids, output_hidden_states=True).hidden_states
    for name, state in zip(("clip.embeddings", "clip.0", "clip.1"), states, strict=True):
        norm = getattr(clip, "text_model", clip).final_layer_norm
        assert torch.equal(read[PROMPT].y[name], norm(state)[:, end]), name


def test_the_last_layer_with_all_tokens_is_the_plain_embedding_bit_for_bit(encoders, told):
    plain = encode(*encoders, [PROMPT])
    for layer in ("t5.1", "clip.1"):
        for rest in ("empty", "zeros", "removed", "last", "other"):
            text = told(layer, rest=rest)
            assert torch.equal(text.txt, plain.txt)
            assert torch.equal(text.y, plain.y)
    assert told().digest() == plain.digest()
    assert not torch.equal(told("t5.0").txt, plain.txt)
    assert torch.equal(told("t5.0").y, plain.y)
    assert torch.equal(told("clip.0").txt, plain.txt)
    assert not torch.equal(told("clip.0").y, plain.y)


def test_layers_are_chosen_by_name_and_pattern_in_depth_order():
    spec = get_spec("flux-tiny")
    assert choose_layers(None, spec) == ["t5.embeddings", "t5.0", "t5.1", "t5.2"]
    assert choose_layers("clip.2, t5.[12]", spec) == ["t5.1", "t5.2", "clip.2"]
    assert len(choose_layers("t5.*", get_spec("flux-dev"))) == 25
    with pytest.raises(FluxIRError, match=r"3 layers of T5 and 3 of CLIP, and none matches 't5\.3' .*nearest are t5"):
        choose_layers(["t5.0", "t5.3"], spec)


# ---- Tokens


def test_every_token_is_of_the_words_the_end_or_the_padding(encoders):
    groups = select(words_of_prompt(encoders, PROMPT), ["words", "end", "padding", "all"], [], LENGTH)
    assert [one.tokens for one in groups] == [(0, 1, 2), (3,), (4, 5, 6, 7, 8), tuple(range(9))]


def test_words_are_kept_by_themselves_or_together(encoders):
    words = ["red", "red circle", "a+circle"]
    found = select(words_of_prompt(encoders, PROMPT), ["all"], words, LENGTH)
    assert found == [Selection(name, tokens) for name, tokens in zip(words, [(1,), (1, 2), (0, 2)], strict=True)]
    with pytest.raises(FluxIRError, match=r"no word 'blue' .*its words are a, red, circle"):
        select(words_of_prompt(encoders, PROMPT), ["all"], ["red+blue"], LENGTH)


def test_the_rest_comes_from_where_it_is_asked_for(read, told):
    own, layer = read[PROMPT].txt, "t5.0"
    for rest, expected in {
        "empty": read[""].txt[layer],
        "zeros": torch.zeros(1, LENGTH, own[layer].shape[2]),
        "last": own["t5.1"],
        "other": read[OTHER].txt[layer],
    }.items():
        txt = told(layer, "words", rest=rest).txt
        assert torch.equal(txt[:, :3], own[layer][:, :3]), rest
        assert torch.equal(txt[:, 3:], expected[:, 3:]), rest
    assert torch.equal(told(layer, "padding", rest="removed").txt, own[layer][:, 4:])
    assert torch.equal(told(layer, words=["red"], rest="removed").txt, own[layer][:, 1:2])


def test_the_pooled_vector_comes_from_where_it_is_asked_for(read, told):
    assert torch.equal(told(pooled="zeros").y, torch.zeros(1, read[PROMPT].plain.y.shape[1]))
    assert torch.equal(told(pooled="other").y, read[OTHER].plain.y)
    assert torch.equal(told("clip.0", pooled="empty").y, read[""].y["clip.0"])


def test_a_swapped_word_is_told_as_the_other_prompts(encoders, read, told):
    words = words_of_prompt(encoders, PROMPT), words_of_prompt(encoders, OTHER)
    swap = read_swap("red=blue", *words)
    expected = read[PROMPT].txt["t5.0"].clone()
    expected[:, 1] = read[OTHER].txt["t5.0"][:, 2]
    assert torch.equal(told("t5.0", swaps=(swap,)).txt, expected)
    assert torch.equal(read[PROMPT].plain.txt, told().txt)  # and what was read is as it was
    assert read_swap("a", *words).other.tokens == (0,)


@pytest.mark.parametrize(
    ("swap", "says"),
    [
        ("green=blue", "the prompt has no word 'green' .*its words are a, red, circle"),
        ("red=green", "the other prompt has no word 'green' .*its words are a, large, blue, square"),
        ("red", "the other prompt has no word 'red'"),
        ("red=large blue", "red has 1, large blue has 2"),
    ],
)
def test_a_swap_of_what_is_not_there_is_refused(encoders, swap, says):
    with pytest.raises(FluxIRError, match=says):
        read_swap(swap, words_of_prompt(encoders, PROMPT), words_of_prompt(encoders, OTHER))


def test_a_swap_is_of_one_place(encoders):
    twice = words_of_prompt(encoders, "a red circle a red square")
    with pytest.raises(FluxIRError, match="the prompt has red#1, red#2"):
        read_swap("red=blue", twice, words_of_prompt(encoders, OTHER))
    assert read_swap("red#2=blue", twice, words_of_prompt(encoders, OTHER)).word.tokens == (4,)


# ---- Known answers

ONE = "a large red circle on the left on a white background"
TWO = "a large red circle left of a small blue square on a white background"
BLUE = "a large blue circle on the left on a white background"


def judged(prompt, caption, layer, seed=0):
    return JudgedPicture(prompt, "all", layer, seed, look(draw(parse_caption(caption))))


def test_only_what_a_caption_asks_for_is_answered():
    one, two = (answers(look(draw(parse_caption(caption))), parse_caption(caption)) for caption in (ONE, TWO))
    assert all(one.values())
    assert all(two.values())
    assert "relation" not in one
    assert "place" not in two
    wrong = answers(look(draw(parse_caption(BLUE))), parse_caption(ONE))
    assert [aspect for aspect, right in wrong.items() if not right] == ["colour", "everything"]


def test_scores_are_shares_beside_chance_and_the_other_caption():
    scenes = [parse_caption(ONE), parse_caption(TWO)]
    pictures = [judged(0, BLUE, "t5.0"), judged(0, ONE, "t5.1"), judged(1, TWO, "t5.0"), judged(1, TWO, "t5.1")]
    found = {(one.layer, one.aspect): one for one in score(pictures, scenes, [parse_caption(BLUE), None])}
    early, late = found["t5.0", "colour"], found["t5.1", "colour"]
    assert (early.right, late.right) == (0.5, 1.0)
    assert (early.other, late.other) == (1.0, 0.0)  # of the first prompt alone
    assert early.chance == 0.5  # the red and the blue object of the second picture; the first has no second object
    assert (early.prompts, early.pictures) == (2, 2)
    assert (early.low, early.high) == wilson(0.5, 2)
    assert found["t5.0", "place"].pictures == found["t5.0", "relation"].pictures == 1


def test_the_caption_that_something_comes_from_is_no_chance():
    scenes = [parse_caption(caption) for caption in (ONE, BLUE, TWO)]
    pictures = [judged(0, BLUE, "t5.0")]
    without, beside = (
        next(one for one in score(pictures, scenes, [other, None, None]) if one.aspect == "colour")
        for other in (None, scenes[1])
    )
    assert (without.chance, without.other) == (0.5, None)
    assert (beside.chance, beside.other) == (0.0, 1.0)


def test_an_aspect_settles_at_the_layer_from_which_on_it_stays_right():
    scenes = [parse_caption(ONE)]
    runs = {0: (BLUE, ONE, ONE), 1: (ONE, BLUE, ONE), 2: (ONE, ONE, BLUE), 3: (ONE, ONE, ONE)}
    pictures = [judged(0, caption, f"t5.{n}", seed) for seed, run in runs.items() for n, caption in enumerate(run)]
    (colour,) = [one for one in settling(pictures, scenes) if one.aspect == "colour"]
    assert colour.layers == {"t5.0": 0.25, "t5.1": 0.25, "t5.2": 0.25, NEVER: 0.25}
    assert colour.pictures == 4


@pytest.mark.parametrize(("right", "cases"), [(0, 7), (3, 7), (7, 7), (1, 1)])
def test_the_interval_is_wilsons(right, cases):
    expected = binomtest(right, cases).proportion_ci(method="wilson")
    assert wilson(right / cases, cases) == pytest.approx((expected.low, expected.high), abs=1e-6)
