"""What a capture file will hold, known before the first step: so it can be laid out, and its size told, in advance."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import FluxParams
from flux_ir.recording.precision import FLOAT8, READ_AS, ROUNDED
from flux_ir.sites import Site, check_sites

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CapturePlan:
    """Everything known of a capture before the first step. Sites and steps are sorted, and repeated ones dropped.

    Raises FluxIRError for sites the model does not have and steps the schedule does not have.
    """

    flux: FluxParams
    sites: Sequence[Site]
    timesteps: Sequence[float]
    """The sampler's whole schedule, from noise to image: one more than there are steps."""
    txt_tokens: int
    img_tokens: int
    guidance: float
    metadata: Mapping[str, Any]
    """Kept with the tensors as it is: anything that JSON can say."""
    steps: Sequence[int] | None = None
    """The steps to keep; None: all."""
    dtype: torch.dtype = torch.bfloat16
    """The dtype of what the sites put out."""
    context_dtype: torch.dtype | None = None
    """That of the sampler's state and the pooled text; None: the same as `dtype` (bfloat16, where that is float8)."""
    batch: int = 1
    img_positions: Sequence[int] | None = None
    """The image tokens to keep, by their places on the image grid, row by row: of every site, every step, and the
    sampler's state. None: all. Text tokens are always kept."""
    rounds: bool = False
    """Whether values of any float dtype are taken and rounded to `dtype`; float8 gets a scale per token. If not, only
    values of that dtype are taken, and kept bit for bit."""
    text_sites: Mapping[Site, tuple[int, int]] = field(default_factory=dict)
    """Layers of the text encoders, kept once and not per step: tokens and width of each."""

    def __post_init__(self) -> None:
        num_steps = len(self.timesteps) - 1
        steps = range(num_steps) if self.steps is None else sorted(set(self.steps))
        unknown = [step for step in steps if step not in range(num_steps)]
        if unknown or not steps:
            raise FluxIRError(
                f"steps to keep must be among the schedule's {num_steps}, counted from 0: got {unknown or 'none'}",
                hint=f"pass --steps between 0 and {num_steps - 1}, or more --num_steps",
            )
        if not self.sites and not self.text_sites:
            raise FluxIRError("a capture needs at least one site: got none", hint="leave --sites out for every block")
        check_sites(self.sites, self.flux.depth, self.flux.depth_single_blocks)
        if self.rounds and self.dtype not in ROUNDED:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in ROUNDED)
            raise FluxIRError(f"activations are rounded to one of {names}: got {self.dtype}", hint="pass another dtype")
        if self.img_positions is not None:
            object.__setattr__(self, "img_positions", _checked_positions(self.img_positions, self.img_tokens))
        # frozen, so not by plain assignment
        object.__setattr__(self, "steps", tuple(steps))
        object.__setattr__(self, "sites", tuple(sorted(set(self.sites))))
        object.__setattr__(self, "text_sites", dict(sorted(self.text_sites.items())))
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        object.__setattr__(self, "metadata", json.loads(json.dumps(dict(self.metadata))))

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """The steps to keep, in order."""
        return tuple(self.steps or ())

    @property
    def kept_img_tokens(self) -> int:
        """How many of the image tokens are kept."""
        return self.img_tokens if self.img_positions is None else len(self.img_positions)

    @property
    def scales(self) -> bool:
        """Whether the values are float8 with a scale per token."""
        return self.rounds and self.dtype == FLOAT8

    @property
    def of_context(self) -> torch.dtype:
        """The dtype of the sampler's state and the pooled text."""
        return self.context_dtype or (READ_AS if self.scales else self.dtype)

    @property
    def img_shape(self) -> Shape:
        """The shape of the packed state before a step, as kept."""
        return self.batch, self.kept_img_tokens, self.flux.in_channels

    @property
    def full_img_shape(self) -> Shape:
        """The shape of the packed state before a step, as the sampler has it."""
        return self.batch, self.img_tokens, self.flux.in_channels

    @property
    def y_shape(self) -> Shape:
        """The shape of the pooled text."""
        return self.batch, self.flux.vec_in_dim

    def shape(self, site: Site) -> Shape:
        """[batch, tokens, width] of one site at one step, as kept; of a layer of a text encoder."""
        if site.per_prompt:
            return self.batch, *self.text_sites[site]
        return self._shape(site, self.kept_img_tokens)

    def full_shape(self, site: Site) -> Shape:
        """[batch, tokens, width] of one site at one step, as the network puts it out."""
        return self._shape(site, self.img_tokens)

    def _shape(self, site: Site, img_tokens: int) -> Shape:
        tokens = {"img": img_tokens, "txt": self.txt_tokens, None: self.txt_tokens + img_tokens}[site.stream]
        width = self.flux.hidden_size
        return self.batch, tokens, int(width * self.flux.mlp_ratio) if site.part == "neurons" else width


def capture_bytes(plan: CapturePlan) -> int:
    """Bytes of all tensors of the capture. The file adds about 4 kB a tensor at most; `store.file_bytes` is exact."""
    per_step = sum(prod(plan.shape(site)) for site in plan.sites) * plan.dtype.itemsize
    per_step += (prod(plan.img_shape) + prod(plan.y_shape)) * plan.of_context.itemsize
    if plan.scales:
        per_step += sum(prod(plan.shape(site)[:2]) for site in plan.sites) * torch.float32.itemsize
    positions = plan.kept_img_tokens * torch.int32.itemsize if plan.img_positions is not None else 0
    text = sum(prod(plan.shape(site)) for site in plan.text_sites) * plan.dtype.itemsize
    if plan.scales:
        text += sum(prod(plan.shape(site)[:2]) for site in plan.text_sites) * torch.float32.itemsize
    return per_step * len(plan.kept_steps) + positions + text


def contents(plan: CapturePlan, make: Callable[[Shape, torch.dtype], Any]) -> dict[str, Any]:
    """The dictionary in the capture file, with `make(shape, dtype)` for every tensor.

    A double block kept with both streams stands under `double_blocks` as pairs, a single block kept whole under
    `single_blocks`; every other site, a lone stream too, stands under `sites` by its name (where there are such).
    Every site has its scales under `scales`, where the plan has such; `token_positions` is there where not all image
    tokens are. Layers of the text encoders stand under `text_sites` (and `text_scales`), one tensor each.
    """
    steps = plan.kept_steps
    file: dict[str, Any] = {"double_blocks": {}, "single_blocks": {}, "denoising_context": {}, "metadata": {}}
    for site in plan.sites:
        if _is_half_of_a_pair(site, plan.sites):
            pair = file["double_blocks"].setdefault(_block(site), [])
            if not pair:  # made with the first stream of the two
                shapes = [plan.shape(Site("double", site.block, stream)) for stream in ("img", "txt")]
                pair += [tuple(make(shape, plan.dtype) for shape in shapes) for _ in steps]
        else:
            whole = site.kind == "single" and site.stream is None and site.part is None
            place, name = ("single_blocks", _block(site)) if whole else ("sites", str(site))
            file.setdefault(place, {})[name] = [make(plan.shape(site), plan.dtype) for _ in steps]
    context_dtype = plan.of_context
    file["denoising_context"] = {
        "y": [make(plan.y_shape, context_dtype) for _ in steps],
        "txt_seq_len": [plan.txt_tokens for _ in steps],
        "img_state": [make(plan.img_shape, context_dtype) for _ in steps],
        "timestep_pairs": [(plan.timesteps[step], plan.timesteps[step + 1]) for step in steps],
        "guidance": plan.guidance,
    }
    names = [str(site) for site in (*plan.text_sites, *plan.sites)]
    file["metadata"] = {**plan.metadata, "captured_steps": list(steps), "sites": names}
    if plan.text_sites:
        file["text_sites"] = {str(site): make(plan.shape(site), plan.dtype) for site in plan.text_sites}
        if plan.scales:
            file["text_scales"] = {str(s): make(plan.shape(s)[:2], torch.float32) for s in plan.text_sites}
    if plan.scales:
        file["scales"] = {str(s): [make(plan.shape(s)[:2], torch.float32) for _ in steps] for s in plan.sites}
    if plan.img_positions is not None:
        file["token_positions"] = make((plan.kept_img_tokens,), torch.int32)
    return file


def stored_value(file: Mapping[str, Any], site: Site, index: int) -> Any:
    """What the dictionary holds for a stored site at its `index`-th kept step. Raises KeyError for other sites."""
    if site.part is None and site.kind == "double" and _block(site) in file["double_blocks"]:
        img, txt = file["double_blocks"][_block(site)][index]
        return img if site.stream == "img" else txt
    if site.part is None and site.stream is None:
        return file["single_blocks"][_block(site)][index]
    return file["sites"][str(site)][index]


def stored_sites(file: Mapping[str, Any]) -> list[Site]:
    """The transformer's sites that a capture's dictionary holds, in depth order."""
    sites = [Site.parse(name) for name in file.get("sites", {})]
    sites += [Site.parse(f"single.{_number(name)}") for name in file["single_blocks"]]
    for name in file["double_blocks"]:
        sites += [Site.parse(f"double.{_number(name)}.{stream}") for stream in ("img", "txt")]
    return sorted(sites)


def _checked_positions(positions: Sequence[int], img_tokens: int) -> tuple[int, ...]:
    kept = tuple(positions)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= img_tokens:
        raise FluxIRError(
            f"img_positions must be places among the {img_tokens} image tokens, counted from 0, in order, each once: "
            f"got {list(kept[:8]) or 'none'}{' ...' if len(kept) > 8 else ''}",
            hint="choose other places, or None to keep every image token",
        )
    return kept


def _is_half_of_a_pair(site: Site, sites: Sequence[Site]) -> bool:
    if site.kind != "double" or site.part is not None:
        return False
    return all(Site("double", site.block, stream) in sites for stream in ("img", "txt"))


def _block(site: Site) -> str:
    return f"block_{site.block}"


def _number(name: str) -> str:
    return name.removeprefix("block_")
