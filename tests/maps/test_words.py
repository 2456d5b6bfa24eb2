"""Words of prompts and their tokens, by the tokenizer that flux-tiny ships and by one that cuts words into pieces."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from flux_ir.errors import FluxIRError
from flux_ir.maps.words import Word, prompt_tokens
from flux_ir.models.text.tokenizer import PromptTokenizer

PIECES = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581red", "\u2581cir", "cle", ",", "\u2581on", "\u2581re"]


@pytest.fixture
def tokenizer():
    """A unigram tokenizer as T5 has."""
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")]
    )
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PromptTokenizer(backend, end="</s>", padding="<pad>", unknown="<unk>")


def test_pieces_are_merged_and_repeated_words_are_apart(tokenizer):
    found = prompt_tokens(tokenizer, "a Red  circle, a circle", 12)
    pieces = [PIECES[number] for number in tokenizer.numbers(["a red  circle, a circle"])[0]]
    assert pieces == ["\u2581a", "\u2581red", "\u2581cir", "cle", ",", "\u2581a", "\u2581cir", "cle", "</s>"]
    names = {word.name: word.tokens for word in prompt_tokens(tokenizer, "a red  circle, a circle", 12).words}
    assert names == {"a#1": (0,), "red": (1,), "circle#1": (2, 3), "a#2": (5,), "circle#2": (6, 7)}
    assert found.padding == tuple(range(found.end[0] + 1, 12))


def test_words_are_chosen_by_name_place_or_phrase(tokenizer):
    found = prompt_tokens(tokenizer, "a red circle, a circle", 12)
    assert found.choose(["red"]) == [Word("red", (1,))]
    assert [word.name for word in found.choose(["circle"])] == ["circle#1", "circle#2"]
    assert found.choose(["circle#2"]) == [Word("circle#2", (6, 7))]
    assert found.choose(["Red Circle"]) == [Word("red circle", (1, 2, 3))]
    assert [word.name for word in found.choose(None)] == ["a#1", "red", "circle#1", "a#2", "circle#2"]


@pytest.mark.parametrize("name", ["blue", "circle red", "", "circle#3"])
def test_a_word_that_is_not_in_the_prompt_names_those_that_are(tokenizer, name):
    with pytest.raises(FluxIRError, match=r"the prompt has no word .*its words are a#1, red, circle#1, a#2, circle#2"):
        prompt_tokens(tokenizer, "a red circle, a circle", 12).choose([name])


def test_words_behind_the_cut_of_a_long_prompt_are_left_out(tokenizer):
    found = prompt_tokens(tokenizer, "a red circle on red", 4)
    assert [word.name for word in found.words] == ["a", "red", "circle"]
    assert (found.words[-1].tokens, found.end, found.padding) == ((2,), (3,), ())
