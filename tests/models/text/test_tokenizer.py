"""Token numbers are those of transformers, from every form of tokenizer that a checkpoint may have."""

import json
import shutil
import subprocess
import sys
import unicodedata

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, CLIPTokenizerFast, T5Tokenizer, T5TokenizerFast

from flux_ir.errors import FluxIRError
from flux_ir.models.text.tokenizer import PromptTokenizer, load_tokenizer
from tests.models.text.awkward import awkward_texts

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


AWKWARD = awkward_texts(1000, seed=0)


@pytest.fixture(scope="module")
def t5_files(tmp_path_factory):
    """A `spiece.model` with the rules of SentencePiece for all of Unicode, trained on awkward texts; T5's numbers."""
    folder = tmp_path_factory.mktemp("t5")
    marks = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentences = [text for text in awkward_texts(3000, seed=1) if "</s>" not in text and 0 < len(text) < 500]
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=1500,
            character_coverage=0.98,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc",
            minloglevel=2,
            **marks,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 7}))
    return folder


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """`vocab.json` and `merges.txt` of byte pairs, merged as in awkward texts; CLIP's last two tokens."""
    folder = tmp_path_factory.mktemp("clip")
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(awkward_texts(2000, seed=1), trainer)
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for token in (*(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}
    said = {"tokenizer_class": "CLIPTokenizer", **names, "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def known_by(tokenizer, texts):
    """The share of all tokens of the texts that are known: a tokenizer that knows nothing would agree with any."""
    numbers = [number for text in tokenizer.numbers(texts, special=False) for number in text]
    return sum(number != tokenizer.unknown_id for number in numbers) / len(numbers)


def has_marks(text):
    """Whether a letter has a mark on it, in one character or two."""
    return any(unicodedata.combining(character) for character in unicodedata.normalize("NFD", text))


def assert_equal_numbers(ours, theirs):
    expected = theirs(AWKWARD)["input_ids"]
    for text, own, other in zip(AWKWARD, ours.numbers(AWKWARD), expected, strict=True):
        assert own == other, repr(text)
    settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(ours.fixed(AWKWARD, 77), theirs(AWKWARD, **settings)["input_ids"])
    assert len(ours) == len(theirs)
    roles = (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert (ours.end_id, ours.padding_id, ours.unknown_id) == roles


@pytest.mark.parametrize("form", ["older files", "tokenizer.json"])
def test_t5_has_the_numbers_of_transformers_for_a_thousand_awkward_texts(t5_files, tmp_path, form):
    theirs = T5TokenizerFast.from_pretrained(t5_files)
    if form == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
    ours = load_tokenizer(t5_files if form == "older files" else tmp_path, what="T5")
    assert_equal_numbers(ours, theirs)
    assert 0.7 < known_by(ours, AWKWARD) < 1


# As the published files have it: a token that is looked for once the text is in lower case.
FOUND_IN_LOWER_CASE = {"lstrip": False, "rstrip": False, "single_word": False, "special": True, "normalized": True}


@pytest.mark.parametrize("form", ["older files", "objects", "list of tokens", "token more", "tokenizer.json"])
def test_clip_has_the_numbers_of_transformers_for_a_thousand_awkward_texts(clip_files, tmp_path, form):
    folder = tmp_path / "clip"
    shutil.copytree(clip_files, folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    numbers = json.loads((folder / "vocab.json").read_text())
    names = ["<|startoftext|>", "<|endoftext|>"]
    match form:
        case "objects":
            roles = ("bos_token", "eos_token", "unk_token")
            said |= {role: {"content": said[role], "__type": "AddedToken"} for role in roles}
        case "list of tokens":
            added = {str(numbers[name]): {"content": name, **FOUND_IN_LOWER_CASE} for name in names}
            said["added_tokens_decoder"] = added
        case "token more":
            said["added_tokens_decoder"] = {str(len(numbers)): {"content": "cats", **FOUND_IN_LOWER_CASE}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    theirs = CLIPTokenizerFast.from_pretrained(folder)
    if form == "tokenizer.json":
        shutil.rmtree(folder)
        theirs.save_pretrained(folder)
        assert not (folder / "vocab.json").is_file()
    ours = load_tokenizer(folder, what="CLIP")
    assert_equal_numbers(ours, theirs)
    assert len({number for text in ours.numbers(AWKWARD) for number in text}) > 600


def test_a_sentencepiece_model_alone_gives_the_numbers_of_sentencepiece(t5_files):
    """As google/t5-v1_1-xxl has it. Where that and transformers differ, transformers counts: letters with marks on
    them, which it normalises by themselves, U+0085, and names of special tokens.
    """
    tokenizer = load_tokenizer(t5_files, what="the tokenizer")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(t5_files / "spiece.model"))
    special = ("</s>", "<pad>", "<unk>", "<extra", "\x85")
    prompts = [text for text in AWKWARD if not has_marks(text) and not any(word in text for word in special)]
    assert len(prompts) > 200
    for prompt in prompts:
        assert tokenizer.numbers([prompt]) == [[*processor.encode(prompt), 1]], repr(prompt)


def test_no_form_of_a_tokenizer_needs_transformers(t5_files, clip_files):
    """Importing it takes several times as long as PyTorch."""
    code = (
        "import sys; from pathlib import Path; from flux_ir.models.text.tokenizer import load_tokenizer\n"
        f"for folder in {[str(t5_files), str(clip_files)]}: load_tokenizer(Path(folder), what='it')\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_folder_without_a_tokenizer_says_which_files_it_might_be(clip_files, tmp_path):
    shutil.copy(clip_files / "vocab.json", tmp_path)
    with pytest.raises(FluxIRError, match=r"no tokenizer\.json, no vocab\.json with merges\.txt, no spiece\.model"):
        load_tokenizer(tmp_path, what="CLIP")


def test_an_added_token_that_would_have_another_number_is_named(clip_files, tmp_path):
    shutil.copytree(clip_files, tmp_path / "clip")
    said = {"added_tokens_decoder": {"99999": {"content": "cats"}}}
    (tmp_path / "clip" / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(FluxIRError, match=r"'cats' must have the number 99999 that tokenizer_config\.json says"):
        load_tokenizer(tmp_path / "clip", what="CLIP")


def test_other_sentencepiece_models_are_refused(tmp_path):
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red circle"] * 9),
            model_writer=file,
            vocab_size=15,
            model_type="bpe",
            minloglevel=2,
        )
    with pytest.raises(FluxIRError, match=r"spiece\.model must be a unigram model without bytes"):
        load_tokenizer(tmp_path, what="T5")
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(FluxIRError, match=r"T5 in .* cannot be read: the tokenizer"):
        load_tokenizer(tmp_path, what="T5")


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
