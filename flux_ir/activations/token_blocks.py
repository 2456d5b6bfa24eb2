"""What training reads, whatever it was stored as: blocks of tokens of one generation, site and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flux_ir.recording.precision import FLOAT8, READ_AS, dequantised
from flux_ir.sites import Site


class TokenBlock(NamedTuple):
    """All tokens that were kept of one generation at one site and step."""

    values: Tensor
    """[tokens, d], as stored: bfloat16, float16, float32, or float8 with `scale`."""
    scale: Tensor | None
    """[tokens], float32: what float8 values are multiplied with."""
    site: Site | None
    """None: a plain array, of which nothing is known."""
    step: int
    generation: str
    """The id of the generation."""
    prompt: str
    positions: Tensor
    """[tokens], int32: the place of each token within its own stream (row by row on the image grid)."""
    txt_tokens: int
    """How many leading rows are text: none of an image site, all of a text site."""
    used_txt: int | None
    """How many text tokens are not padding; None: unknown."""

    def floats(self) -> Tensor:
        """The values to compute with, [tokens, d]: bfloat16, float16 or float32."""
        values = dequantised(self.values, self.scale)
        return values.to(READ_AS) if values.dtype == FLOAT8 else values


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of a source. `path` is its file, None if it is a part of a larger one."""

    id: str
    prompt: str
    path: Path | None


@runtime_checkable
class TokenSource(Protocol):
    """Stored activations, read a block at a time. All generations have the same sites, steps and sizes."""

    @property
    def sites(self) -> Sequence[Site]:
        """What is stored, in depth order; halves of single blocks can be read as well. Empty for plain arrays."""

    @property
    def steps(self) -> Sequence[int]:
        """The stored steps, by the sampler's numbers; [0] for plain arrays."""

    @property
    def generations(self) -> Sequence[Generation]:
        """The generations, in an order that never changes."""

    @property
    def model(self) -> str | None:
        """The model that was captured; None: unknown."""

    def d(self, site: Site | None) -> int:
        """The width of a site (of a plain array: None)."""

    def tokens(self, site: Site | None) -> int:
        """Tokens per generation and step (of a plain array's last piece: at most)."""

    def read(self, generation_index: int, site: Site | None, step: int) -> TokenBlock:
        """One block. Raises FluxIRError for a site or step that is not there, and a file that is broken or missing."""


@runtime_checkable
class ReadsTogether(Protocol):
    """A source that reads several sites at once, for several threads, into memory that is its own."""

    def announce(self, generation_index: int, sites: Sequence[Site | None], step: int, *, again: bool = False) -> None:
        """These will be read soon, and maybe `again` later: fetching may begin. Errors are left to reading."""

    def forget(self) -> None:
        """What was announced and not read yet will not be."""

    def read_together(self, generation_index: int, sites: Sequence[Site | None], step: int) -> list[TokenBlock]:
        """One block for each site; their memory is used again once nobody holds them."""


def token_positions(site: Site, txt_tokens: int, img_positions: Tensor | None, tokens: int) -> Tensor:
    """The place of each of a site's `tokens` within its own stream: int32. `txt_tokens` are those of the whole text."""
    leading = {"img": 0, "txt": tokens, None: txt_tokens}[site.stream]
    img = torch.arange(tokens - leading, dtype=torch.int32) if img_positions is None else img_positions
    return torch.cat([torch.arange(leading, dtype=torch.int32), img[: tokens - leading]])


def leading_txt(site: Site, txt_tokens: int) -> int:
    """How many leading tokens of a site are text, where the whole text has `txt_tokens`."""
    return 0 if site.stream == "img" else txt_tokens
