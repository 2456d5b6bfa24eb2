"""Captures that are laid out alike: the first is parsed, others are compared with it and read straight into memory.

Files that differ in values and metadata alone hold the same directory and the same dictionary. Both are compared in
full, so nothing is guessed: a file that differs in anything else, or is broken, is not alike, and left to
`store.load_capture`.
"""

import pickle
import zipfile
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.capture_file import CaptureFile, Directory
from flux_ir.activations.open_file import CAN_READ
from flux_ir.activations.read_ahead import ReadAhead
from flux_ir.activations.spare_memory import SpareMemory
from flux_ir.activations.token_blocks import leading_txt, token_positions
from flux_ir.recording.archive import StoredTensor, unpickled
from flux_ir.recording.plan import Shape
from flux_ir.recording.store import Capture
from flux_ir.sites import Site

_SPARE_PIECES = 64


class _Part(NamedTuple):
    """Bytes of a record that are a tensor."""

    record: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: Shape


class SiteTokens(NamedTuple):
    """What a capture holds of one site at one step, as `token_blocks.TokenBlock` has it."""

    values: Tensor
    scale: Tensor | None
    positions: Tensor
    txt_tokens: int


class _Wanted(NamedTuple):
    """Where one site of one step is, and what is the same in all files."""

    values: _Part
    scale: _Part | None
    positions: Tensor
    txt_tokens: int

    @property
    def parts(self) -> list[_Part]:
        """What is read of a file."""
        return [self.values] if self.scale is None else [self.values, self.scale]


class Alike:
    """Reads captures of one picture that are laid out as `first` is. May be used by several threads."""

    def __init__(self, first: Capture) -> None:
        self._first = first
        self._contents, self._steps = _to_compare(first.archive.contents)
        self._directory = Directory(first.archive) if CAN_READ else None
        self._kept = None if first.img_positions is None else first.img_positions.clone()
        self._wanted: dict[tuple[Site, int], _Wanted | None] = {}
        self._spare = SpareMemory(_SPARE_PIECES)
        self._ahead = ReadAhead()

    def opened(self, path: str) -> CaptureFile | None:
        """A file to read from; None: it cannot be opened."""
        try:
            return CaptureFile(path, self._spare)
        except OSError:
            return None

    def announce(self, file: CaptureFile, sites: Sequence[Site], step: int, *, again: bool) -> None:
        """Begin to fetch what will be read of a file, and maybe `again`. Looks at the directory of a large one."""
        if file.is_small:
            file.begin_small(self._ahead, again=again)
        elif self.is_like(file):
            found = (self._found(site, step) for site in sites)
            file.begin(self._ahead, [part[:3] for one in found if one is not None for part in one.parts], again=again)

    def is_like(self, file: CaptureFile) -> bool:
        """`holds`, but asked once of each file."""
        if file.is_alike is None:
            file.is_alike = self.holds(file)
        return file.is_alike

    def holds(self, file: CaptureFile) -> bool:
        """Whether the file is laid out in the same way; only then it can be read from here."""
        if self._directory is None:
            return False
        try:
            file.load()
            found = self._directory.found_in(file)
            if found is None:
                return False
            file.headers, data = found
            return _to_compare(unpickled(data)) == (self._contents, self._steps) and self._same_positions(file)
        except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError):
            return False  # who parses it in full finds out what is wrong

    def read(self, file: CaptureFile, sites: Sequence[Site], step: int) -> list[SiteTokens] | None:
        """These sites at a step, side by side in memory of their own; None: they do not lie in the file in one piece.

        Raises FluxIRError for sites and steps that are not there, and for a file that is cut short.
        """
        found = [self._found(site, step) for site in sites]
        wanted = [one for one in found if one is not None]
        if len(wanted) < len(found):
            return None
        return [
            SiteTokens(
                _read(file, one.values),
                None if one.scale is None else _read(file, one.scale),
                one.positions,
                one.txt_tokens,
            )
            for one in wanted
        ]

    def _found(self, site: Site, step: int) -> _Wanted | None:
        if (site, step) not in self._wanted:
            self._wanted[site, step] = self._look_up(site, step)
        return self._wanted[site, step]

    def _look_up(self, site: Site, step: int) -> _Wanted | None:
        place = self._first.place_of(site, step)
        if any(self._in_pieces(tensor) for tensor in (place.values, place.scale) if tensor is not None):
            return None
        values = _part(place.values, place.tokens)
        txt_tokens = self._first.context(step).txt_tokens
        return _Wanted(
            values,
            None if place.scale is None else _part(place.scale, place.tokens),
            token_positions(site, txt_tokens, self._kept, values.shape[0]),
            leading_txt(site, txt_tokens),
        )

    def _in_pieces(self, stored: StoredTensor) -> bool:
        nbytes = self._first.archive.infos[stored.record].file_size
        contiguous = torch.empty(stored.shape, device="meta").stride() == stored.stride
        whole = stored.storage_offset == 0 and nbytes == prod(stored.shape) * stored.dtype.itemsize
        return not (contiguous and whole and stored.shape[0] == 1)

    def _same_positions(self, file: CaptureFile) -> bool:
        if self._kept is None:
            return True
        data = file.bytes_at(file.start_of(self._contents["token_positions"].record), self._kept.nbytes)
        return data == self._kept.numpy().tobytes()


def _to_compare(contents: dict[str, Any]) -> tuple[dict[str, Any], list[int] | None]:
    """What must be the same: all but the metadata, and the steps that these tell."""
    others = {name: value for name, value in contents.items() if name != "metadata"}
    return others, contents["metadata"].get("captured_steps")


def _read(file: CaptureFile, part: _Part) -> Tensor:
    return file.read(part.record, part.offset, part.nbytes).view(part.dtype).view(part.shape)


def _part(stored: StoredTensor, tokens: slice) -> _Part:
    """Some tokens of a tensor [1, tokens, ...]."""
    _, count, *width = stored.shape
    start, stop, _ = tokens.indices(count)
    each = prod(width) * stored.dtype.itemsize
    return _Part(stored.record, start * each, (stop - start) * each, stored.dtype, (stop - start, *width))
