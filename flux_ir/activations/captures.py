"""Capture files and run folders as training data: one generation each, mapped when they are read."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor

from flux_ir.activations.blocks import (
    Drawn,
    Generation,
    Sampling,
    SiteName,
    TokenBlock,
    TokenRun,
    leading_txt,
    not_said,
    pictured_runs,
    required_site,
    run_of,
    steered_runs,
    token_positions,
)
from flux_ir.activations.spans import Memory
from flux_ir.errors import FluxIRError
from flux_ir.layout import picture_of
from flux_ir.models.quantisation import Method
from flux_ir.recording.reader import Capture, load_capture
from flux_ir.sites import Site

_OPEN_FILES = 64


class _Row(NamedTuple):
    """One capture of a source."""

    id: str
    prompt: str
    path: Path
    used_txt: int | None
    content: str
    """A digest of what the file holds."""


class _Layout(NamedTuple):
    """What captures of one source have in common."""

    model: str | None
    loras: list[dict[str, Any]]
    quantize: Method | None
    sites: list[Site]
    steps: list[int]
    widths: dict[Site, int]
    tokens: dict[Site, int]


class CaptureSource:
    """The captures in these files, in their order. All are opened once: they must fit together."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rows = []
        first: tuple[Path, _Layout] | None = None
        for file in files:
            capture = load_capture(file)
            layout, metadata, content = _layout(capture), capture.metadata, _digest(capture)
            first = first or (file, layout)
            _check_same(*first, file, layout)
            # Not the file's name where the id is not known: the file may be renamed.
            generation = metadata.get("generation_id") or content
            self._rows.append(_Row(generation, metadata.get("prompt") or "", file, metadata.get("used_txt"), content))
        self._open: OrderedDict[int, Capture] = OrderedDict()
        self._lock = Lock()
        self._first = self._capture(0)
        layout = _layout(self._first)
        self.sites: Sequence[Site] = layout.sites
        self.steps: Sequence[int] = layout.steps
        self.model: str | None = layout.model
        self.loras: Sequence[dict[str, Any]] = layout.loras
        self.quantize: Method | None = layout.quantize
        self.generations: Sequence[Generation] = [Generation(row.id, row.prompt, row.path) for row in self._rows]
        self.runs: Sequence[range] = [range(index, index + 1) for index in range(len(self._rows))]

    @cached_property
    def identity(self) -> str:
        """A digest of what the files hold: their tensors by CRC-32, which the format keeps of each."""
        return hashlib.sha256("".join(row.content for row in self._rows).encode()).hexdigest()[:16]

    def d(self, site: SiteName) -> int:
        """The width of a site."""
        return self._first.shape(required_site(site, "captures"))[2]

    def tokens(self, site: SiteName) -> int:
        """Tokens of a site per generation and step."""
        return self._first.shape(required_site(site, "captures"))[1]

    def read(self, generation: int, site: SiteName, step: int) -> TokenBlock:
        """One block, mapped from its file."""
        site, row, capture = required_site(site, "captures"), self._rows[generation], self._capture(generation)
        values, scale = capture.read_stored(site, step)
        txt_tokens = capture.context(step).txt_tokens
        return TokenBlock(
            values=values[0],
            scale=None if scale is None else scale[0],
            site=site,
            step=step,
            generation=row.id,
            prompt=row.prompt,
            positions=token_positions(site, txt_tokens, capture.img_positions, values.shape[1]),
            txt_tokens=leading_txt(site, txt_tokens),
            used_txt=row.used_txt,
        )

    def read_run(
        self, images: range, site: SiteName, step: int, tokens: range | None = None, memory: Memory | None = None
    ) -> TokenRun:
        """Some tokens of one generation, mapped from its file."""
        return run_of(self.read(images.start, site, step), tokens)

    def sampling(self, generation: int) -> Sampling:
        """How one generation was made, as its file says."""
        capture = self._capture(generation)
        metadata = capture.metadata
        if "edits" in metadata:
            raise steered_runs(capture.path)
        if metadata.keys() & {"init_image", "reference_image"}:
            raise pictured_runs(capture.path)
        if "prompt_embeds" in metadata:
            raise FluxIRError(
                f"{capture.path} was made from embeddings of a prompt, which it does not hold: it cannot be run again",
                hint="use a capture that was made from its --prompt",
            )
        try:
            return Sampling(
                metadata["prompt"],
                metadata["seed"],
                metadata["width"],
                metadata["height"],
                tuple(metadata["timesteps"]),
                float(metadata["guidance"]),
                capture.context(capture.steps[0]).img.dtype,
            )
        except KeyError as error:
            raise not_said(capture.path, error.args[0]) from error

    def state(self, generation: int, step: int) -> Tensor | None:
        """The packed latent that a step began with; None where only some tokens were kept."""
        capture = self._capture(generation)
        return None if capture.img_positions is not None else capture.context(step).img[0]

    def drawn(self, generation: int) -> Drawn:
        """The picture beside the capture, in its run's folder, and what the capture says of it."""
        capture = self._capture(generation)
        metadata = capture.metadata
        return Drawn(metadata.get("seed"), metadata.get("width"), metadata.get("height"), picture_of(capture.path))

    def noisy(self, images: range, step: int) -> Tensor:
        """The packed latents before a step, of one generation: [1, tokens, channels]."""
        return self._capture(images.start).context(step).img

    def _capture(self, index: int) -> Capture:
        with self._lock:
            capture = self._open.get(index)
        if capture is None:
            capture = load_capture(self._rows[index].path)
        with self._lock:
            self._open[index] = capture
            self._open.move_to_end(index)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return capture


def _digest(capture: Capture) -> str:
    """The digest of every record's size and CRC-32, which stand in the directory of the file: nothing else is read."""
    records = sorted((name, info.file_size, info.CRC) for name, info in capture.archive.infos.items())
    return hashlib.sha256(repr(records).encode()).hexdigest()[:16]


def _layout(capture: Capture) -> _Layout:
    if not capture.sites:
        raise FluxIRError(
            f"{capture.path} holds no site of the transformer, only {', '.join(map(str, capture.text_sites[:4]))}",
            hint="capture again with sites of the transformer, such as double.*.img or single.*",
        )
    shapes = {site: capture.shape(site) for site in capture.sites}
    batch = max(shape[0] for shape in shapes.values())
    if batch != 1:
        raise FluxIRError(
            f"a capture to train on holds one picture: {capture.path} holds {batch}", hint="capture them one by one"
        )
    return _Layout(
        model=capture.metadata.get("model"),
        loras=capture.metadata.get("loras", []),
        quantize=capture.metadata.get("quantize"),
        sites=list(capture.sites),
        steps=list(capture.steps),
        widths={site: shape[2] for site, shape in shapes.items()},
        tokens={site: shape[1] for site, shape in shapes.items()},
    )


def _check_same(first: Path, expected: _Layout, file: Path, found: _Layout) -> None:
    """Raises FluxIRError for the first thing in which a capture differs from the first one."""
    for word, one, other in zip(_Layout._fields, expected, found, strict=True):
        if one != other:
            raise FluxIRError(
                f"all captures of a folder must have the same {word}: {file} has {_short(other)}, {first} has "
                f"{_short(one)}",
                hint="keep different captures in different folders",
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = sorted(set(value.values()))
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value[:4])) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
