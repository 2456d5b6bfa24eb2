"""Which generations are never trained on: a hash of the prompt decides, so all repeats of a prompt stay together.

A hash needs no list: the same prompt falls on the same side in every collection, however it grows, and in a live stream
too. A split is one number, its `threshold`.
"""

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.blocks import TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site

Side = Literal["training", "held_out"]
SplitBy = Literal["prompt", "image", "tokens"]

# Neighbouring tokens see each other, so of a single picture whole runs of them are held out. A tenth of a small one.
_RUN_TOKENS, _RUNS = 16, 10
_EVERY_PROMPT = "all repeats of a prompt are on one side"


@dataclass(frozen=True)
class Split:
    """Training data on one side, held-out data on the other. What hashes below `threshold` is held out."""

    by: SplitBy
    threshold: float
    run_tokens: int = 1
    """How many neighbouring tokens stay together, where the split is by tokens."""

    @property
    def note(self) -> str:
        """How the data are split, as a note."""
        if self.threshold == 0:
            return "nothing is held out"
        if self.by == "prompt":
            return f"held out by prompt: {_EVERY_PROMPT}"
        if self.by == "image":
            return "held out by image: there is one prompt only, so measures on held-out data do not show new prompts"
        return (
            f"held out by runs of {self.run_tokens} tokens: there is one generation only, so measures on held-out data "
            "show neither new prompts nor new images"
        )

    def has(self, side: Side, generation: str, prompt: str) -> bool:
        """Whether any token of this generation is on this side."""
        if self.by == "tokens":
            return self.threshold > 0 or side == "training"
        held_out = _share(_name(self.by, generation, prompt)) < self.threshold
        return held_out == (side == "held_out")

    def tokens(self, side: Side, generation: str, positions: Tensor) -> Tensor | None:
        """Which tokens of a generation that `has` the side are on it, by their position in their stream: bool [tokens].

        None: all. A position is on the same side at every step and site.
        """
        if self.by != "tokens":
            return None
        runs, run_of_token = np.unique(positions.cpu().numpy() // self.run_tokens, return_inverse=True)
        held_out = np.array([_share(_run_name(generation, int(run))) < self.threshold for run in runs], dtype=bool)
        return torch.from_numpy((held_out == (side == "held_out"))[run_of_token.ravel()])


def split_source(source: TokenSource, held_out: float) -> Split:
    """A split of stored activations: about the share `held_out` of their prompts, and at least one on each side.

    Where there is one prompt (or none is known) images are held out; where there is one image, runs of its tokens.
    `held_out` = 0 holds nothing out.
    """
    _check(held_out)
    prompts = {generation.prompt for generation in source.generations}
    if len(prompts) > 1:
        names = {_name("prompt", generation.id, generation.prompt) for generation in source.generations}
        return Split("prompt", _threshold(names, held_out))
    names = {_name("image", generation.id, generation.prompt) for generation in source.generations}
    if len(names) > 1:  # images of one content are one image
        return Split("image", _threshold(names, held_out))
    sites: list[Site | None] = [*source.sites] or [None]
    tokens = max(source.tokens(site) for site in sites)
    run_tokens = min(max(tokens // _RUNS, 1), _RUN_TOKENS)
    names = {_run_name(source.generations[0].id, run) for run in range(tokens // run_tokens)}
    return Split("tokens", _threshold(names, held_out), run_tokens)


def split_prompts(prompts: Collection[str], held_out: float) -> Split:
    """The split of a live stream that will be made from these prompts, the same as of captures of them."""
    _check(held_out)
    return Split("prompt", _threshold(set(prompts), held_out))


def _check(held_out: float) -> None:
    if not (math.isfinite(held_out) and 0 <= held_out < 1):
        raise FluxIRError(
            f"the held-out share of the prompts must be in [0, 1): got {held_out}", hint="--held_out 0.1 keeps a tenth"
        )


def _threshold(names: set[str], held_out: float) -> float:
    """`held_out`, moved just so far that at least one of two and more names is on each side."""
    if held_out == 0 or len(names) < 2:
        return held_out
    shares = [_share(name) for name in names]
    return max(min(held_out, max(shares)), math.nextafter(min(shares), 1.0))


def _name(by: SplitBy, generation: str, prompt: str) -> str:
    return prompt if by == "prompt" and prompt else f"\0{generation}"  # no prompt begins so


def _run_name(generation: str, run: int) -> str:
    return f"\0{generation}\0{run}"


def _share(name: str) -> float:
    """A number in [0, 1) that only depends on the name, evenly spread over different names."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48
