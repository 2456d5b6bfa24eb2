"""Captures that are laid out alike: the first is parsed, others are compared with it and read straight into memory.

Files that differ in values and metadata alone hold the same directory and the same dictionary. Both are compared in
full, so nothing is guessed: a file that differs in anything else, or is broken, is not alike, and left to
`store.load_capture`.
"""

import pickle
import zipfile
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.capture.archive import StoredTensor, unpickled
from flux_ir.capture.capture_file import CAN_READ, CaptureFile, Directory
from flux_ir.capture.plan import Shape
from flux_ir.capture.spare_memory import SpareMemory
from flux_ir.capture.store import Capture
from flux_ir.capture.token_blocks import leading_txt, token_positions
from flux_ir.sites import Site

_ALIGNMENT = 64  # of every tensor in memory, as in the file
_SPARE_PIECES = 8


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

    def announce(self, file: CaptureFile, sites: Sequence[Site], step: int) -> None:
        """Have the system fetch what will be read of a file, where it is if the file is alike. Nobody waits."""
        if self._directory is not None:
            found = (self._found(site, step) for site in sites)
            parts = [part for one in found if one is not None for part in one.parts]
            file.announce(self._directory.about([(part.record, part.offset, part.nbytes) for part in parts]))

    def holds(self, file: CaptureFile) -> bool:
        """Whether the file is laid out in the same way; only then it can be read from here."""
        if self._directory is None:
            return False
        try:
            file.load(self._spare)
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
        parts = [part for one in wanted for part in one.parts]
        tensors = iter(self._read(file, parts))
        return [
            SiteTokens(next(tensors), None if one.scale is None else next(tensors), one.positions, one.txt_tokens)
            for one in wanted
        ]

    def _read(self, file: CaptureFile, parts: Sequence[_Part]) -> list[Tensor]:
        if file.content is not None:
            return [_as_tensor(file.part(part.record, part.offset, part.nbytes), part) for part in parts]
        starts = list(accumulate((-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts), initial=0))
        memory = self._spare.bytes(starts[-1])
        tensors = []
        for part, start in zip(parts, starts, strict=False):
            piece = memory[start : start + part.nbytes]
            file.read_into(piece, part.record, part.offset)
            tensors.append(_as_tensor(piece, part))
        return tensors

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


def _as_tensor(memory: Tensor, part: _Part) -> Tensor:
    return memory.view(part.dtype).view(part.shape)


def _part(stored: StoredTensor, tokens: slice) -> _Part:
    """Some tokens of a tensor [1, tokens, ...]."""
    _, count, *width = stored.shape
    start, stop, _ = tokens.indices(count)
    each = prod(width) * stored.dtype.itemsize
    return _Part(stored.record, start * each, (stop - start) * each, stored.dtype, (stop - start, *width))
