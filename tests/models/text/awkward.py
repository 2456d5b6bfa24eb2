"""Texts that tokenizers are known to differ on, drawn from a seed."""

import random
from collections.abc import Iterator

WORDS = "a red circle on a white background, two blue squares; it's LARGE: don't, we'll I'd 24 cats' 3.14"
ACCENTED = "caf\u00e9 cafe\u0301 a\u0308\u0323 \u1e69 s\u0323\u0307 \ufb01ne \u212bngstrom \u0130stanbul"
RIGHT_TO_LEFT = (
    "\u0634\u0645\u0633 \u0642\u0650\u0637\u0651\u0629 "
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u200f123\u200e \u061f"
)
EMOJI = (
    "\U0001f408 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd "
    "\U0001f1eb\U0001f1f7 \u2764\ufe0f \u263a"
)
SCRIPTS = (
    "\u6f22\u5b57 \u3072\u3089\u304c\u306a \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\uff21\uff22\uff43 \u2460\u00bd\u00b2"
)
CONTROLS = [chr(code) for code in (0, 7, 0x1B, 0x7F, 0x85, 0xAD, 0x200B, 0xFEFF, 0xFFFD, 0xE000, 0xE0041)]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "     " * 9]
MARKS = "</s> <pad> <unk> <extra_id_0> <|endoftext|> <|ENDOFTEXT|> <|startoftext|> </w> \u2581 \u2581red"
PUNCTUATION = "!!! ... \u2026 \u201cq\u201d a-b x_y #$% ^^ 's 'S ''re ` \\ ((( ://"
KINDS = [CONTROLS, *(k.split() for k in (WORDS, ACCENTED, RIGHT_TO_LEFT, EMOJI, SCRIPTS, MARKS, PUNCTUATION))]


def awkward_texts(count: int, *, seed: int) -> list[str]:
    """The empty text, 2,000 words, each of the pieces above alone, then mixtures of them."""
    fixed = ["", " ", "\n\t ", " ".join((WORDS.split() * 200)[:2000]), "x" * 3000]
    fixed += [piece for kind in (*KINDS, SPACES) for piece in kind]
    mixed = _mixed(random.Random(seed))
    return [*fixed, *(next(mixed) for _ in range(count - len(fixed)))]


def _mixed(draw: random.Random) -> Iterator[str]:
    while True:
        kinds = draw.sample(KINDS, draw.randint(1, len(KINDS)))
        parts: list[str] = []
        for _ in range(draw.choice([1, 3, 10, 40])):
            parts.append(draw.choice(draw.choice(kinds)))
            if draw.random() < 0.1:  # any character there is, but half a surrogate pair, which UTF-8 has not
                parts.append(chr(draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)])))
            if draw.random() < 0.7:
                parts.append(draw.choice(SPACES) if draw.random() < 0.3 else " ")
        yield "".join(parts)
