"""What of the network's tensors goes into a capture, and where: checked against the plan, picked, and rounded.

`store.CaptureWriter` writes them into a capture file.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.recording.archive import StoredTensor
from flux_ir.recording.plan import CapturePlan, Shape, stored_value
from flux_ir.recording.precision import rounded, scaled
from flux_ir.recording.recorder import StepContext
from flux_ir.sites import Site


class ScaleOf(NamedTuple):
    """The scales of one site, as a tensor of its own."""

    site: Site

    def __str__(self) -> str:
        return f"the scales of {self.site}"


# What one tensor of the file is of: a site, its scales, or a part of the step's context.
Of = Site | ScaleOf | Literal["img_state", "y"]


class Piece(NamedTuple):
    """One tensor, as the file holds it."""

    of: Of
    value: Tensor


def positions(plan: CapturePlan) -> Tensor | None:
    """The kept places on the image grid, int32; None: all are kept."""
    return None if plan.img_positions is None else torch.tensor(plan.img_positions, dtype=torch.int32)


def pieces_of_context(plan: CapturePlan, step: int, context: StepContext) -> list[Piece]:
    """What a step began with; of the state, the kept places. Raises FluxIRError for what is not as planned."""
    if context.txt_tokens != plan.txt_tokens:
        raise FluxIRError(
            f"step {step} must have {plan.txt_tokens} text tokens, as planned: got {context.txt_tokens}",
            hint="plan the capture with the text this prompt is encoded to",
        )
    dtype = plan.of_context
    _check(plan, step, "img_state", context.img, plan.full_img_shape, dtype)
    _check(plan, step, "y", context.y, plan.y_shape, dtype)
    state = _picked(plan, context.img, leading=0)
    return [Piece("img_state", rounded(state, dtype)), Piece("y", rounded(context.y, dtype))]


def pieces_of_site(plan: CapturePlan, step: int, site: Site, value: Tensor) -> list[Piece]:
    """One site of one step, with its scales where the plan has such. Raises FluxIRError for what is not as planned."""
    _check(plan, step, site, value, plan.full_shape(site), plan.dtype)
    if site.stream != "txt":
        value = _picked(plan, value, leading=plan.txt_tokens if site.stream is None else 0)
    if not plan.scales:
        return [Piece(site, rounded(value, plan.dtype))]
    values, scale = scaled(value)
    return [Piece(site, values), Piece(ScaleOf(site), scale)]


def pieces_of_text(plan: CapturePlan, site: Site, value: Tensor) -> list[Piece]:
    """A layer of a text encoder, likewise."""
    if site not in plan.text_sites:
        raise not_planned(None, site)
    _check(plan, None, site, value, plan.shape(site), plan.dtype)
    if not plan.scales:
        return [Piece(site, rounded(value, plan.dtype))]
    values, scale = scaled(value)
    return [Piece(site, values), Piece(ScaleOf(site), scale)]


def places(plan: CapturePlan, file: Mapping[str, Any]) -> dict[tuple[int | None, Of], StoredTensor]:
    """Which tensor of a laid-out capture's dictionary (`Archive.contents`) is which, by step (None: it has none)."""
    found: dict[tuple[int | None, Of], StoredTensor] = {}
    for site in plan.text_sites:
        found[None, site] = file["text_sites"][str(site)]
        if plan.scales:
            found[None, ScaleOf(site)] = file["text_scales"][str(site)]
    for index, step in enumerate(plan.kept_steps):
        for part in ("img_state", "y"):
            found[step, part] = file["denoising_context"][part][index]
        for site in plan.sites:
            found[step, site] = stored_value(file, site, index)
            if plan.scales:
                found[step, ScaleOf(site)] = file["scales"][str(site)][index]
    return found


def not_planned(step: int | None, of: Of) -> FluxIRError:
    """What to say of a tensor that has no place in the file, or none left."""
    return FluxIRError(
        f"{of}{at_step(step)} is not in the plan of this capture, or came twice",
        hint="record the sites and the steps of the plan, one forward for each step",
    )


def at_step(step: int | None) -> str:
    """Where a tensor belongs, in words behind its name."""
    return "" if step is None else f" at step {step}"


def _check(plan: CapturePlan, step: int | None, of: Of, value: Tensor, shape: Shape, dtype: torch.dtype) -> None:
    fits = value.dtype == dtype or (plan.rounds and value.is_floating_point())
    if tuple(value.shape) != shape or not fits:
        wanted = "floats" if plan.rounds else str(dtype)
        raise FluxIRError(
            f"{of}{at_step(step)} must be {wanted} {list(shape)}, as planned: got {value.dtype} {list(value.shape)}",
            hint="plan the capture with the sizes and the dtype the network runs with",
        )


def _picked(plan: CapturePlan, value: Tensor, *, leading: int) -> Tensor:
    """The tokens that are kept: `leading` of text, and the image tokens at the plan's places."""
    if plan.img_positions is None:
        return value
    kept = torch.tensor([*range(leading), *(leading + place for place in plan.img_positions)], device=value.device)
    return value.index_select(1, kept)
