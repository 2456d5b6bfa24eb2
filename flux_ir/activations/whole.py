"""A complete capture written at once from memory: the fast way for many small files.

The bytes are those that `store.CaptureWriter` writes for the same values: PyTorch lays the same file out, in memory, so
this is for captures that fit there with ease. What depends on the plan's shapes alone is worked out once for each.
"""

import hashlib
import io
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file, disk_error
from flux_ir.models.transformer import FluxParams
from flux_ir.recording.archive import Record, blank_tensors, lay_out, records_in, unpickled
from flux_ir.recording.pieces import Of, pieces_of_context, pieces_of_site, places, positions
from flux_ir.recording.plan import CapturePlan, contents
from flux_ir.recording.recorder import StepContext
from flux_ir.sites import Site

_LAYOUTS = 64  # plans of so many shapes are remembered


class FileRecord(NamedTuple):
    """What was written: the size of the file in bytes, and the SHA-256 of its content in hex."""

    bytes: int
    sha256: str


def write_capture(
    path: Path,
    plan: CapturePlan,
    values: Mapping[tuple[int, Site], Tensor],
    contexts: Mapping[int, StepContext],
) -> FileRecord:
    """Write the capture of a plan: for every kept step its context and the value of every site, as the network made it.

    Raises FluxIRError for tensors that are not as planned or missing, and for a disk that is full or cannot be written.
    """
    content = capture_content(plan, values, contexts)
    try:
        with complete_file(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise disk_error(path, error, needed_bytes=len(content)) from error
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def capture_content(
    plan: CapturePlan,
    values: Mapping[tuple[int, Site], Tensor],
    contexts: Mapping[int, StepContext],
) -> memoryview:
    """The bytes of the file that `write_capture` writes."""
    file = io.BytesIO()
    lay_out(file, contents(plan, blank_tensors()))
    record_of, names = records_in(file), _record_names(_layout(plan))
    content = file.getbuffer()
    for step, of, value in _pieces(plan, values, contexts):
        _fill(content, record_of[names[step, of]], value)
    if (kept := positions(plan)) is not None:
        _fill(content, record_of[names[_POSITIONS]], kept)
    return content


def _pieces(
    plan: CapturePlan, values: Mapping[tuple[int, Site], Tensor], contexts: Mapping[int, StepContext]
) -> Iterator[tuple[int, Of, Tensor]]:
    for step in plan.kept_steps:
        missing = [site for site in plan.sites if (step, site) not in values]
        if missing or step not in contexts:
            raise FluxIRError(
                f"a capture needs every site at every kept step: {missing[0] if missing else 'the context'} is missing "
                f"at step {step}",
                hint="record the sites and the steps of the plan",
            )
        for piece in pieces_of_context(plan, step, contexts[step]):
            yield step, *piece
        for site in plan.sites:
            for piece in pieces_of_site(plan, step, site, values[step, site]):
                yield step, *piece


def _fill(content: memoryview, record: Record, value: Tensor) -> None:
    data = value.detach().cpu().contiguous().view(torch.uint8).flatten().numpy().data
    content[record.offset : record.offset + record.nbytes] = data
    crc = zlib.crc32(data).to_bytes(4, "little")
    for offset in record.crc_offsets:
        content[offset : offset + 4] = crc


class _Layout(NamedTuple):
    """All of a plan that decides which record holds which tensor."""

    flux: FluxParams
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    txt_tokens: int
    img_tokens: int
    kept_img_tokens: int | None
    dtype: torch.dtype
    context_dtype: torch.dtype | None
    batch: int
    rounds: bool


def _layout(plan: CapturePlan) -> _Layout:
    return _Layout(
        plan.flux,
        tuple(plan.sites),
        plan.kept_steps,
        plan.txt_tokens,
        plan.img_tokens,
        None if plan.img_positions is None else plan.kept_img_tokens,
        plan.dtype,
        plan.context_dtype,
        plan.batch,
        plan.rounds,
    )


# Stands for the tensor of positions, which belongs to no step, among the pieces of the steps.
_POSITIONS: tuple[int, Of] = (-1, "img_state")


@lru_cache(_LAYOUTS)
def _record_names(layout: _Layout) -> dict[tuple[int, Of], str]:
    """The name of the record that holds each piece: records are numbered in the order of the dictionary."""
    kept = layout.kept_img_tokens
    plan = CapturePlan(
        flux=layout.flux,
        sites=layout.sites,
        timesteps=[0.0] * (layout.steps[-1] + 2),
        txt_tokens=layout.txt_tokens,
        img_tokens=layout.img_tokens,
        guidance=0.0,
        metadata={},
        steps=layout.steps,
        dtype=layout.dtype,
        context_dtype=layout.context_dtype,
        batch=layout.batch,
        img_positions=None if kept is None else range(kept),
        rounds=layout.rounds,
    )
    file = io.BytesIO()
    lay_out(file, contents(plan, blank_tensors()))
    record = records_in(file)["data.pkl"]
    stored = unpickled(file.getvalue()[record.offset : record.offset + record.nbytes])
    names = {at: tensor.record for at, tensor in places(plan, stored).items()}
    return names | ({} if kept is None else {_POSITIONS: stored["token_positions"].record})
