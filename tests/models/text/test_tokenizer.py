"""Token numbers are those of transformers, from every form of tokenizer that a checkpoint may have."""

import json

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, T5Tokenizer

from flux_ir.errors import FluxIRError
from flux_ir.models.text.tokenizer import PromptTokenizer, load_tokenizer

PROMPTS = [
    "a red circle",
    "",
    "  two  spaces, \n a line and a tab\t. ",
    "it's the CAT's 24 cats \N{CAT} caf\u00e9 cafe\u0301 \u6f22\u5b57",
    "a red circle " * 40,
    "the end </s> <|endoftext|> in the middle",
]
LENGTHS = [5, 16, 77]


def t5_tokenizer():
    """As small as a SentencePiece vocabulary can be: letters, a few words, and the marks of T5."""
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz'.,24", "\u2581red", "\u2581circle", "\u2581a", "cat"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(piece))) for piece in pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=2)


def clip_tokenizer():
    letters = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + number) for number in range(68)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>"]
    numbers = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=numbers, merges=[("r", "e"), ("re", "d</w>")])


@pytest.mark.parametrize("make", [t5_tokenizer, clip_tokenizer])
def test_token_numbers_are_those_of_transformers(make, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, what="the tokenizer")
    for length in LENGTHS:
        settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        expected = theirs(PROMPTS, **settings)["input_ids"]
        assert torch.equal(ours.fixed(PROMPTS, length), expected)
        used = [len(theirs(prompt, truncation=True, max_length=length)["input_ids"]) for prompt in PROMPTS]
        assert [ours.used(prompt, length) for prompt in PROMPTS] == used
    assert ours.numbers(PROMPTS) == theirs(PROMPTS)["input_ids"]
    assert ours.numbers(PROMPTS, special=False) == theirs(PROMPTS, add_special_tokens=False)["input_ids"]
    assert (len(ours), ours.end_id, ours.unknown_id) == (len(theirs), theirs.eos_token_id, theirs.unk_token_id)
    assert ours.words() == theirs.get_vocab().keys() - set(theirs.all_special_tokens)


def test_a_sentencepiece_model_alone_gives_the_numbers_of_sentencepiece(tmp_path):
    """As google/t5-v1_1-xxl has it: transformers converts it."""
    sentences = ["a red circle on a white background", "two blue squares and the cat", "it's a large yellow ring"] * 9
    marks = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=33, minloglevel=2, **marks
        )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    tokenizer = load_tokenizer(tmp_path, what="the tokenizer")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    prompts = ["a red circle", "", "two red cats, a RING"]
    assert tokenizer.numbers(prompts) == [[*processor.encode(prompt), 1] for prompt in prompts]
    assert (tokenizer.end_id, tokenizer.padding_id, tokenizer.unknown_id) == (1, 0, 2)


@pytest.mark.parametrize("form", ["vocab.json", "no names", "older names", "map beside it"])
def test_older_forms_give_the_same_numbers(tmp_path, form):
    clip_tokenizer().save_pretrained(tmp_path)
    expected = load_tokenizer(tmp_path, what="the tokenizer").fixed(PROMPTS, 16)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = {name: settings[name] for name in ("eos_token", "pad_token", "unk_token", "bos_token")}
    match form:
        case "vocab.json":
            model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
            merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
            (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
            (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
            (tmp_path / "tokenizer.json").unlink()
        case "no names":
            settings = {name: value for name, value in settings.items() if name not in names}
        case "older names":
            settings |= {name: {"content": value, "__type": "AddedToken"} for name, value in names.items()}
        case "map beside it":
            settings = {name: value for name, value in settings.items() if name not in names}
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "CLIPTokenizer"}))
    assert torch.equal(load_tokenizer(tmp_path, what="the tokenizer").fixed(PROMPTS, 16), expected)


def test_what_a_file_was_saved_with_is_not_kept(tmp_path):
    """A tokenizer.json may cut and pad by itself: then the note on a cut prompt would never come."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    tokenizer = PromptTokenizer(backend, end="</s>", padding="<pad>", unknown="<unk>")
    assert tokenizer.numbers(["a A a"]) == [[3, 3, 3, 1]]
    assert tokenizer.fixed(["a A a", ""], 3).tolist() == [[3, 3, 1], [1, 0, 0]]


def test_a_special_token_that_is_not_there_is_named(tmp_path):
    clip_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": "<nothing>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(FluxIRError, match=r"the tokenizer: .* it has no '<nothing>'"):
        load_tokenizer(tmp_path, what="the tokenizer")


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_a_broken_file_is_one_line(tmp_path, content):
    clip_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FluxIRError, match="cannot be read: the tokenizer"):
        load_tokenizer(tmp_path, what="the encoder")
