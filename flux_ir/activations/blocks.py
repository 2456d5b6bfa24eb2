"""What training reads, whatever it was stored as: tokens of images at one site and step.

A source gives one image at a time (`TokenBlock`), or a run of images that lie one after the other (`TokenRun`), which
is how training reads. Neither is a block of the transformer or the run folder of a capture. Next: `source`, which opens
a source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flux_ir.activations.spans import Memory
from flux_ir.errors import FluxIRError
from flux_ir.models.quantisation import Method
from flux_ir.recording.stored_dtype import FLOAT8, READ_AS, dequantised
from flux_ir.sites import Site, as_site

SiteName = Site | str | None
"""A site as a source is asked for it; None for what has no sites."""


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
    """[tokens], int32: the position of each token in its own stream (row by row on the image grid)."""
    txt_tokens: int
    """How many leading rows are text: none of an image site, all of a text site."""
    used_txt: int | None
    """How many text tokens are not padding; None: unknown."""

    def floats(self) -> Tensor:
        """The values to compute with, [tokens, d]: bfloat16, float16 or float32."""
        return floats(self.values, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in (self.values, self.scale, self.positions) if part is not None)


class TokenRun(NamedTuple):
    """Some tokens of images that lie one after the other in a source, at one site and step."""

    values: Tensor
    """[images, tokens, d], as stored. They may lie in the caller's `Memory`."""
    scale: Tensor | None
    """[images, tokens], float32: what float8 values are multiplied with."""
    positions: Tensor
    """[images, tokens], int32: the position of each token in its own stream."""
    txt_tokens: int
    """How many of these tokens, the leading ones, are text."""
    used_txt: Sequence[int | None]
    """For each image how many of its text tokens are not padding; None: unknown."""

    def floats(self) -> Tensor:
        """The values to compute with, [images, tokens, d]: bfloat16, float16 or float32."""
        return floats(self.values, self.scale)


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of a source. `path` is the file that holds it."""

    id: str
    prompt: str
    path: Path | None


@runtime_checkable
class TokenSource(Protocol):
    """Stored activations. All generations have the same sites, steps and widths. May be used by several threads."""

    @property
    def sites(self) -> Sequence[Site]:
        """What is stored, in depth order; halves of single blocks can be read as well. Empty for plain arrays."""

    @property
    def steps(self) -> Sequence[int]:
        """The stored steps, by the sampler's numbers; [0] for what has none."""

    @property
    def generations(self) -> Sequence[Generation]:
        """The generations, in an order that never changes."""

    @property
    def model(self) -> str | None:
        """The model that was captured; None: unknown."""

    @property
    def runs(self) -> Sequence[range]:
        """All generations in order, cut where they do not lie one after the other in one file.

        Those of one run have equally many tokens.
        """

    @property
    def identity(self) -> str:
        """A digest of the content, whatever the files are called: 16 hex digits.

        Of a collection: its settings (the model's weights among them) and which generations are there. Of other files:
        their values.
        """

    def d(self, site: SiteName) -> int:
        """The width of a site (of a plain array: None)."""

    def tokens(self, site: SiteName) -> int:
        """Tokens per generation and step (where generations differ: the most)."""

    def read(self, generation: int, site: SiteName, step: int) -> TokenBlock:
        """One generation, by its index. Raises FluxIRError for what is not there, and for a broken or missing file."""

    def read_run(
        self, images: range, site: SiteName, step: int, tokens: range | None = None, memory: Memory | None = None
    ) -> TokenRun:
        """Some `tokens` (None: all) of `images`, which lie within one of the `runs`.

        With `memory` the values may be read into it: they are overwritten when it is read into again.
        """


class Sampling(NamedTuple):
    """How a generation was made: what it takes to run it again."""

    prompt: str
    seed: int
    width: int
    height: int
    timesteps: tuple[float, ...]
    guidance: float
    dtype: torch.dtype
    """The dtype of the network."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """What must be equal for generations to go through the model together."""
        return self.width, self.height, self.timesteps, self.guidance


@runtime_checkable
class SampledSource(Protocol):
    """A source that knows how its generations were made."""

    @property
    def generations(self) -> Sequence[Generation]:
        """As `TokenSource` has them."""

    def sampling(self, generation: int) -> Sampling:
        """Raises FluxIRError where the files do not say."""

    def state(self, generation: int, step: int) -> Tensor | None:
        """The packed latent that a step began with, [img_tokens, channels]; None where not all of it was kept.

        To sample again from there it must be whole; `NoisySource.noisy` gives what there is of it.
        """


def loras_of(source: object) -> list[dict[str, Any]]:
    """The LoRAs that the model of a source was loaded with, as its files say: path, sha256 and strength of each."""
    return list(getattr(source, "loras", ()))


def quantize_of(source: object) -> Method | None:
    """How the blocks of the model of a source were quantised, as its files say; None: they were not, or not known."""
    return getattr(source, "quantize", None)


def changes_of(source: object) -> dict[str, Any]:
    """What was changed of the weights of a source's model, as its files say: `changed_by` of them."""
    return changed_by(loras_of(source), quantize_of(source))


def changed_by(loras: Sequence[Mapping[str, Any]], quantize: Method | None) -> dict[str, Any]:
    """The same by what it was loaded with: `loras`, each by its name, content and strength, and `quantize`.

    Empty: its weights are those of its files. Two models with the same files and equal changes are the same.
    """
    named = [
        {"name": Path(lora["path"]).name, "sha256": lora["sha256"], "strength": lora["strength"]}
        for lora in loras
        if lora["strength"]
    ]
    return ({"loras": named} if named else {}) | ({} if quantize is None else {"quantize": quantize})


def other_model(trained: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """Both models in words, if they are not the same: what they are changed by (`changed_by`); None: they are."""

    def content(changes: Mapping[str, Any]) -> object:
        return [(lora["sha256"], lora["strength"]) for lora in changes.get("loras", ())], changes.get("quantize")

    return None if content(trained) == content(now) else (_told(trained), _told(now))


def _told(changes: Mapping[str, Any]) -> str:
    loras = [f"{lora['name']} at {lora['strength']:g}" for lora in changes.get("loras", ())]
    told = [f"with the LoRA{'s' if len(loras) > 1 else ''} {' and '.join(loras)}"] if loras else []
    told += [f"quantised to {changes['quantize']}"] if changes.get("quantize") else []
    return f"the model {', '.join(told) or 'without LoRAs, not quantised'}"


class Drawn(NamedTuple):
    """What is known of the picture of a generation; None: not known."""

    seed: int | None
    width: int | None
    """Pixels."""
    height: int | None
    picture: Path | None
    """The picture itself, if it was kept and lies on this machine."""


@runtime_checkable
class DrawnSource(Protocol):
    """A source whose generations are pictures."""

    @property
    def generations(self) -> Sequence[Generation]:
        """As `TokenSource` has them."""

    def drawn(self, generation: int) -> Drawn:
        """What is known of its picture."""


@runtime_checkable
class NoisySource(Protocol):
    """A source that kept what every step began with."""

    def noisy(self, images: range, step: int) -> Tensor:
        """The packed noisy latents before a step, [images, tokens, channels], of the image tokens that were kept.

        `images` lie within one of the source's runs. Raises FluxIRError for what is not there.
        """


def not_said(file: Path, word: str) -> FluxIRError:
    """What is raised where a file lacks what it takes to run its generations again."""
    return FluxIRError(
        f"{file} does not say its {word}, so it cannot be run again",
        hint="use captures made with flux-ir capture or flux-ir collect",
    )


def steered_runs(file: Path) -> FluxIRError:
    """What is raised for generations made with edits: without these, running them again gives something else."""
    return FluxIRError(
        f"{file} was made with edits, and would be run again without them",
        hint="use captures that were made without --edit",
    )


def pictured_runs(file: Path) -> FluxIRError:
    """What is raised for generations made from pictures: running them again from noise alone gives something else."""
    return FluxIRError(
        f"{file} was made with --init_image or --reference_image, and would be run again without",
        hint="use captures that were made without them",
    )


def floats(values: Tensor, scale: Tensor | None) -> Tensor:
    """Stored values as bfloat16, float16 or float32."""
    values = dequantised(values, scale)
    return values.to(READ_AS) if values.dtype == FLOAT8 else values


def run_of(block: TokenBlock, tokens: range | None) -> TokenRun:
    """Some tokens of one generation as a run."""
    rows = slice(None) if tokens is None else slice(tokens.start, tokens.stop)
    first = 0 if tokens is None else tokens.start
    values = block.values[None, rows]
    return TokenRun(
        values=values,
        scale=None if block.scale is None else block.scale[None, rows],
        positions=block.positions[None, rows],
        txt_tokens=min(max(block.txt_tokens - first, 0), values.shape[1]),
        used_txt=[block.used_txt],
    )


def token_positions(site: Site, txt_tokens: int, img_positions: Tensor | None, tokens: int) -> Tensor:
    """The position of each of a site's `tokens` in its own stream: int32. `txt_tokens` are those of the whole text."""
    leading = {"img": 0, "cond": 0, "txt": tokens, None: txt_tokens}[site.stream]
    chosen = None if site.stream == "cond" else img_positions  # places are chosen among those of the image
    img = torch.arange(tokens - leading, dtype=torch.int32) if chosen is None else chosen
    return torch.cat([torch.arange(leading, dtype=torch.int32), img[: tokens - leading]])


def leading_txt(site: Site, txt_tokens: int) -> int:
    """How many leading tokens of a site are text, where the whole text has `txt_tokens`."""
    return 0 if site.stream in ("img", "cond") else txt_tokens


def required_site(site: SiteName, what: str) -> Site:
    """The site, given as `Site` or as text. Raises FluxIRError for None, saying that `what` are read by site."""
    if site is None:
        raise FluxIRError(f"{what} are read by site: got None", hint="name a site such as double.18.img")
    return as_site(site)
