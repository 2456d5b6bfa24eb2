"""What a capture will hold, known before the first step: so it can be laid out, and its size told, in advance.

`planned_tensors` is the one list of its tensors, and `tensor_keys` the one place that says where the file's dictionary
has each: the size, the empty file, the writer and the reader all go by these two. At the end, `pieces_of_context` and
`pieces_of_site` make of the network's tensors what the plan says. Next: `writer` and `reader`.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import TransformerParams
from flux_ir.recording.recorder import StepContext
from flux_ir.recording.stored_dtype import FLOAT8, READ_AS, ROUNDED, rounded, scaled
from flux_ir.sites import Site, check_sites

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CapturePlan:
    """Everything known of a capture before the first step. Sites and steps are sorted, and repeated ones dropped.

    A capture keeps every token, in the dtype it was computed in; some image tokens (`img_positions`) and other dtypes
    (`rounds`) are chosen by collections, whose shards hold the same pieces.

    Raises FluxIRError for sites the model does not have and steps the schedule does not have.
    """

    flux: TransformerParams
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
    sampler's state. None: all. Text tokens are always kept. The file calls them `token_positions`."""
    rounds: bool = False
    """Whether values of any float dtype are taken and rounded to `dtype`; float8 gets a scale per token. If not, only
    values of that dtype are taken, and kept bit for bit."""
    text_sites: Mapping[Site, tuple[int, int]] = field(default_factory=dict)
    """Layers of the text encoders, kept once and not per step: tokens and width of each."""
    cond_tokens: int = 0
    """Tokens of a reference picture. They are kept at sites that name them (`double.3.cond`) and nowhere else."""

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
        if not self.cond_tokens and (of_cond := [site for site in self.sites if site.stream == "cond"]):
            raise FluxIRError(
                f"{min(of_cond)} is of a reference picture, and this run has none",
                hint="pass a reference picture, or leave the site out",
            )
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
        """The dtype that the sampler's state and the pooled text are stored in."""
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
        """[batch, tokens, width] of one site at one step, or of a layer of a text encoder, as kept."""
        return self._shape(site, self.kept_img_tokens)

    def full_shape(self, site: Site) -> Shape:
        """[batch, tokens, width] of one site at one step, as the network puts it out."""
        return self._shape(site, self.img_tokens)

    def _shape(self, site: Site, img_tokens: int) -> Shape:
        if site.per_prompt:
            return self.batch, *self.text_sites[site]
        whole = self.txt_tokens + img_tokens
        streams = {"img": img_tokens, "txt": self.txt_tokens, "cond": self.cond_tokens, None: whole}
        tokens = streams[site.stream]
        width = self.flux.hidden_size
        return self.batch, tokens, int(width * self.flux.mlp_ratio) if site.part == "neurons" else width


def _checked_positions(positions: Sequence[int], img_tokens: int) -> tuple[int, ...]:
    kept = tuple(positions)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= img_tokens:
        raise FluxIRError(
            f"img_positions must be places among the {img_tokens} image tokens, counted from 0, in order, each once: "
            f"got {list(kept[:8]) or 'none'}{' ...' if len(kept) > 8 else ''}",
            hint="choose other places, or None to keep every image token",
        )
    return kept


class ScaleOf(NamedTuple):
    """The scales of one site, as a tensor of its own."""

    site: Site

    def __str__(self) -> str:
        return f"the scales of {self.site}"


TensorName = Site | ScaleOf | Literal["img_state", "y", "token_positions"]
"""Which tensor of the file is meant: a site's values, a site's scales, the sampler's state or the pooled text before a
step, or the kept places on the image grid."""


class PlannedTensor(NamedTuple):
    """One tensor of the file, before there is a value."""

    step_index: int | None
    """The step's index among the kept ones; None: the tensor has no step."""
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def planned_tensors(plan: CapturePlan) -> dict[tuple[int | None, TensorName], PlannedTensor]:
    """Every tensor of the capture, by its step (None: it has none) and its name, in the order they are computed."""
    tensors: dict[tuple[int | None, TensorName], PlannedTensor] = {}

    def add_site(step: int | None, index: int | None, site: Site) -> None:
        shape = plan.shape(site)
        tensors[step, site] = PlannedTensor(index, shape, plan.dtype)
        if plan.scales:
            tensors[step, ScaleOf(site)] = PlannedTensor(index, shape[:2], torch.float32)

    if plan.img_positions is not None:
        tensors[None, "token_positions"] = PlannedTensor(None, (plan.kept_img_tokens,), torch.int32)
    for site in plan.text_sites:
        add_site(None, None, site)
    for index, step in enumerate(plan.kept_steps):
        tensors[step, "img_state"] = PlannedTensor(index, plan.img_shape, plan.of_context)
        tensors[step, "y"] = PlannedTensor(index, plan.y_shape, plan.of_context)
        for site in plan.sites:
            add_site(step, index, site)
    return tensors


def capture_bytes(plan: CapturePlan) -> int:
    """Bytes of all tensors of the capture. The file adds about 4 kB a tensor at most; `writer.file_bytes` is exact."""
    return sum(tensor.nbytes for tensor in planned_tensors(plan).values())


def tensor_keys(name: TensorName, step_index: int | None, pairs: Collection[str]) -> tuple[str | int, ...]:
    """Where the file's dictionary holds a tensor: the keys to follow, one inside the other.

    A double block kept with both streams (`pairs` names these) stands under `double_blocks` as pairs, a single block
    kept whole under `single_blocks`, as in the original program; every other site, a lone stream too, stands under
    `sites` by its name. Layers of the text encoders have no step: they are one tensor each.
    """
    match name:
        case "token_positions":
            keys: tuple[str | int | None, ...] = ("token_positions",)
        case "img_state" | "y":
            keys = ("denoising_context", name, step_index)
        case ScaleOf(site):
            keys = ("text_scales", str(site)) if site.per_prompt else ("scales", str(site), step_index)
        case Site() if name.per_prompt:
            keys = ("text_sites", str(name))
        case Site(kind="double", part=None, stream="img" | "txt") if _block(name) in pairs:
            keys = ("double_blocks", _block(name), step_index, 0 if name.stream == "img" else 1)
        case Site(kind="single", stream=None, part=None):
            keys = ("single_blocks", _block(name), step_index)
        case _:
            keys = ("sites", str(name), step_index)
    if None in keys:
        raise KeyError(f"{name} is kept at every step: say which")
    return tuple(key for key in keys if key is not None)


def contents(plan: CapturePlan, make: Callable[[Shape, torch.dtype], Any]) -> dict[str, Any]:
    """The dictionary in the capture file, with `make(shape, dtype)` for every tensor at its `tensor_keys`.

    The first four keys are always there, the others where they have something in them.
    """
    steps = plan.kept_steps
    names = [str(site) for site in (*plan.text_sites, *plan.sites)]
    # The order is that of the records in the file: another one would change the bits of every capture.
    file: dict[str, Any] = {
        "double_blocks": {},
        "single_blocks": {},
        "denoising_context": {
            "y": [],
            "txt_seq_len": [plan.txt_tokens for _ in steps],
            "img_state": [],
            "timestep_pairs": [(plan.timesteps[step], plan.timesteps[step + 1]) for step in steps],
            "guidance": plan.guidance,
        },
        "metadata": {**plan.metadata, **_token_map(plan), "captured_steps": list(steps), "sites": names},
        "sites": {},
    }
    text, scales = bool(plan.text_sites), plan.scales
    optional = {"text_sites": text, "text_scales": text and scales, "scales": scales}
    file |= {key: {} for key, there in optional.items() if there}
    pairs = {_block(site) for site in plan.sites if _is_half_of_a_pair(site, plan.sites)}
    planned = planned_tensors(plan)
    if (kept := planned.pop((None, "token_positions"), None)) is not None:
        planned[None, "token_positions"] = kept  # the last of the file, though the first to be written
    for (_, name), tensor in planned.items():
        _put(file, tensor_keys(name, tensor.step_index, pairs), make(tensor.shape, tensor.dtype))
    for block in file["double_blocks"].values():
        block[:] = map(tuple, block)
    if not file["sites"]:
        del file["sites"]
    return file


def _token_map(plan: CapturePlan) -> dict[str, Any]:
    """How many tokens each stream has, where a reference picture is one of them."""
    if not plan.cond_tokens:
        return {}
    return {"tokens": {"txt": plan.txt_tokens, "img": plan.img_tokens, "cond": plan.cond_tokens}}


def _put(file: dict[str, Any], keys: Sequence[str | int], value: Any) -> None:
    """Set a value at its keys. What is missing on the way is made; numbers are places in lists, which grow by one."""
    inside: Any = file
    for key, following in zip(keys, (*keys[1:], None), strict=True):
        new = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(inside, dict):
            inside = inside.setdefault(key, new)
        else:
            if key == len(inside):
                inside.append(new)
            inside = inside[key]


def stored_tensor(file: Mapping[str, Any], name: TensorName, step_index: int | None) -> Any:
    """What a capture's dictionary has under this name, at its `step_index`-th kept step. Raises KeyError if nothing."""
    found: Any = file
    for key in tensor_keys(name, step_index, file["double_blocks"]):
        found = found[key]
    return found


def stored_sites(file: Mapping[str, Any]) -> list[Site]:
    """The transformer's sites that a capture's dictionary holds, in depth order."""
    sites = [Site.parse(name) for name in file.get("sites", {})]
    sites += [Site.parse(f"single.{_number(name)}") for name in file["single_blocks"]]
    for name in file["double_blocks"]:
        sites += [Site.parse(f"double.{_number(name)}.{stream}") for stream in ("img", "txt")]
    return sorted(sites)


def _is_half_of_a_pair(site: Site, sites: Collection[Site]) -> bool:
    if site.kind != "double" or site.part is not None or site.stream == "cond":
        return False
    return all(Site("double", site.block, stream) in sites for stream in ("img", "txt"))


def _block(site: Site) -> str:
    return f"block_{site.block}"


def _number(name: str) -> str:
    return name.removeprefix("block_")


class Piece(NamedTuple):
    """One tensor, as the file holds it: its name, and its values."""

    of: TensorName
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
    if context.cond_tokens != plan.cond_tokens:
        raise FluxIRError(
            f"step {step} must have {plan.cond_tokens} tokens of a reference picture, as planned: "
            f"got {context.cond_tokens}",
            hint="plan the capture with the reference picture it is made with",
        )
    dtype = plan.of_context
    _check(plan, step, "img_state", context.img, plan.full_img_shape, dtype)
    _check(plan, step, "y", context.y, plan.y_shape, dtype)
    state = _picked(plan, context.img, leading=0)
    return [Piece("img_state", rounded(state, dtype)), Piece("y", rounded(context.y, dtype))]


def pieces_of_site(plan: CapturePlan, step: int | None, site: Site, value: Tensor) -> list[Piece]:
    """One site of one step, with its scales where the plan has such; a layer of a text encoder has no step.

    Raises FluxIRError for what is not as planned.
    """
    if site.per_prompt and site not in plan.text_sites:
        raise not_planned(step, site)
    _check(plan, step, site, value, plan.full_shape(site), plan.dtype)
    if not site.per_prompt and site.stream in ("img", None):
        value = _picked(plan, value, leading=plan.txt_tokens if site.stream is None else 0)
    if not plan.scales:
        return [Piece(site, rounded(value, plan.dtype))]
    values, scale = scaled(value)
    return [Piece(site, values), Piece(ScaleOf(site), scale)]


def not_planned(step: int | None, name: TensorName) -> FluxIRError:
    """What to say of a tensor that has no place in the file, or none left."""
    return FluxIRError(
        f"{name}{at_step(step)} is not in the plan of this capture, or came twice",
        hint="record the sites and the steps of the plan, one forward for each step",
    )


def at_step(step: int | None) -> str:
    """Where a tensor belongs, in words behind its name."""
    return "" if step is None else f" at step {step}"


def _check(
    plan: CapturePlan, step: int | None, name: TensorName, value: Tensor, shape: Shape, dtype: torch.dtype
) -> None:
    fits = value.dtype == dtype or (plan.rounds and value.is_floating_point())
    if tuple(value.shape) != shape or not fits:
        wanted = "floats" if plan.rounds else str(dtype)
        raise FluxIRError(
            f"{name}{at_step(step)} must be {wanted} {list(shape)}, as planned: got {value.dtype} {list(value.shape)}",
            hint="plan the capture with the sizes and the dtype the network runs with",
        )


def _picked(plan: CapturePlan, value: Tensor, *, leading: int) -> Tensor:
    """The tokens that are kept: `leading` of text, and the image tokens at the plan's places."""
    if plan.img_positions is None:
        return value
    kept = torch.tensor([*range(leading), *(leading + place for place in plan.img_positions)], device=value.device)
    return value.index_select(1, kept)
