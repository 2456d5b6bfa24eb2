"""Edits at work: made ready for one model, one size and one schedule, then entered like any intervention.

    ready = Steering(edits, model.spec, grid=Grid(128, 128), num_steps=8)
    with steered(model.flux, [ready]):
        *_, last = sample(model, text, seed=7)

The change of a token is m (z' - z) W_dec, m the product of schedule and weight: only that is added to x, in float32, so
the part that an autoencoder does not explain is never touched, and a token whose change is 0 keeps its bits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.registry import ModelSpec
from flux_ir.models.suite import TextEncoders
from flux_ir.recording.intervention import Change, Intervention, TextChange, TextIntervention
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.folder import load_sae
from flux_ir.shapes import Pooled, Tokens
from flux_ir.sites import Site, Stream, sites_among
from flux_ir.steering.directions import Direction, Features, Rows, Vector, read_vector, tensors_digest
from flux_ir.steering.edits import POOLED, Edit
from flux_ir.steering.regions import Grid

# ---- What is done at sites while a picture is sampled


@runtime_checkable
class SiteEdit(Protocol):
    """A change at sites: called with what one of them computed for one picture, it gives what shall stand there."""

    @property
    def weights(self) -> Mapping[Site, float]:
        """Its sites, each with what the change is multiplied by."""

    def __call__(self, site: Site, txt_tokens: int, value: Tokens, step: int) -> Tokens: ...


@runtime_checkable
class PictureEdits(Protocol):
    """Everything that is done to one picture: its edits hold in their order."""

    @property
    def ready(self) -> Sequence[SiteEdit]: ...
    @property
    def txt_tokens(self) -> int: ...


# ---- One edit made ready


class ReadyEdit:
    """One edit, with its files read and its tokens counted."""

    def __init__(
        self,
        edit: Edit,
        direction: Direction,
        weights: Mapping[Site, float],
        *,
        grid: Grid,
        num_steps: int,
        instead: Mapping[Site, Tensor] | None = None,
    ) -> None:
        self.edit, self.direction, self.weights, self.grid = edit, direction, dict(weights), grid
        self.steps = frozenset(range(num_steps) if edit.steps is None else edit.steps)
        self.instead = instead
        self._masks: dict[tuple[str, int], Tensor] = {}

    def share(self, site: Site, step: int) -> float:
        """What the change is multiplied by: 0 where this edit does nothing."""
        if self.edit.is_neutral or step not in self.steps or site not in self.weights:
            return 0.0
        return self.weights[site] * (1.0 if self.edit.schedule is None else self.edit.schedule[step])

    def __call__(self, site: Site, txt_tokens: int, value: Tokens, step: int) -> Tokens:
        """The value [1, tokens, d] after the edit: itself, and not a copy, where nothing is changed."""
        share = self.share(site, step)
        if share == 0:
            return value
        before = value[0].float()
        inside = self.inside(site, txt_tokens, value.shape[1])
        chosen = before if inside is None else before[inside]
        if len(chosen) == 0:
            return value
        change = share * self.change(chosen, before.norm(dim=1).mean(), step)
        if self.instead is not None:
            # Also as far to the same side: else a control turned down is the picture of the control turned up.
            backwards = change @ self.direction.rows(step).sum(dim=0) < 0
            change = change.norm(dim=1, keepdim=True) * torch.where(backwards, -1.0, 1.0)[:, None] * self.instead[site]
        kept = (change == 0).all(dim=1, keepdim=True)
        new = torch.where(kept, chosen, chosen + change).to(value.dtype)
        if inside is None:
            return new[None]
        result = value.clone()
        result[0, inside] = new
        return result

    def change(self, x: Rows, length: Float[Tensor, ""], step: int) -> Rows:
        """(z' - z) W_dec of each token; `length` is the mean one of the site's tokens."""
        edit, direction = self.edit, self.direction
        rows = direction.rows(step)
        amount = torch.tensor(edit.strengths, device=x.device)
        if edit.kind not in ("scale", "ablate"):
            amount = amount * direction.unit(edit.units, length)
        if edit.kind == "add" and edit.gate == "all":
            return amount.expand(len(x), len(rows)) @ rows  # the only kind that need not know z
        z = direction.activations(x, step)
        match edit.kind:
            case "add" | "replace":
                change = amount.expand_as(z)
            case "scale":
                change = (amount - 1) * z
            case "clamp":
                change = torch.maximum(z, amount) - z
            case "set":
                change = amount - z
            case "ablate":
                change = -z
        if edit.gate != "all":
            gate = 0.0 if isinstance(edit.gate, str) else edit.gate * direction.unit(edit.units, length)
            change = torch.where(z > gate, change, 0)
        change = change @ rows
        if edit.kind == "replace":
            assert isinstance(direction, Features)  # an Edit of a vector cannot be of this kind
            change = change - direction.explained(x)
        return change

    def inside(self, site: Site, txt_tokens: int, tokens: int) -> Bool[Tensor, "tokens"] | None:
        """Which of the site's tokens the region has; None: it has no region."""
        region = self.edit.region
        if region is None:
            return None
        key = (str(site), txt_tokens)
        if key not in self._masks:
            if site.per_prompt or site.stream == "txt":
                mask = region.mask("txt", tokens, self.grid)
            elif site.stream is None and region.of_image:  # text and image together: a place is on the picture
                on_picture = region.mask("img", self.grid.tokens, self.grid)
                mask = np.concatenate([np.zeros(txt_tokens, dtype=bool), on_picture])
            else:
                mask = region.mask("img" if site.stream else "txt", tokens, self.grid)
            self._masks[key] = torch.from_numpy(mask)
        return self._masks[key]


# ---- All edits of one run


class Steering:
    """Edits made ready for one model, one size of picture and one schedule. Nothing of the model is touched yet.

    Raises FluxIRError for what cannot be done: a feature the autoencoder lacks, an autoencoder or a vector of another
    model, width or site, a step the schedule does not have, a region outside the picture.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        spec: ModelSpec,
        *,
        grid: Grid,
        num_steps: int,
        first_step: int = 0,
        txt_tokens: int | None = None,
        device: torch.device | str = "cpu",
        loaded: dict[str, SparseAutoencoder] | None = None,
    ) -> None:
        self.spec, self.grid, self.num_steps, self.first_step = spec, grid, num_steps, first_step
        self.txt_tokens = spec.text_tokens if txt_tokens is None else txt_tokens
        self.device = torch.device(device)
        self.loaded = {} if loaded is None else loaded
        """Autoencoders by their folder: read once for all strengths."""
        self.edits = tuple(edits)
        self.pooled = [edit for edit in edits if edit.sites == (POOLED,)]
        self.ready = [self._ready(edit) for edit in edits if edit.sites != (POOLED,)]

    @property
    def sites(self) -> list[Site]:
        """Every site of the transformer that some edit changes, by depth."""
        return sorted({site for edit in self.ready for site in edit.weights if not site.per_prompt})

    @property
    def text_sites(self) -> list[Site]:
        """Every layer of a text encoder that some edit changes."""
        return sorted({site for edit in self.ready for site in edit.weights if site.per_prompt})

    def check_encodes(self, *, encodes: bool) -> None:
        """Raises FluxIRError for edits of the text where the prompt's embedding is given, and nothing encodes it."""
        if not encodes and (self.text_sites or self.pooled):
            raise FluxIRError(
                "--prompt_embeds is what the text encoders made of a prompt: they do not run again, to be edited",
                hint="pass its --prompt",
            )

    def notes(self) -> list[str]:
        """Edits that change nothing, whatever their strength."""
        notes = []
        for number, edit in enumerate(self.ready, start=1):
            masks = [edit.inside(site, self.txt_tokens, self.tokens(site)) for site in edit.weights]
            if all(mask is not None and not mask.any() for mask in masks):
                notes.append(f"note: edit {number} changes nothing: its region has no token")
            if not any(edit.edit.schedule or [1]) or not edit.steps:
                notes.append(f"note: edit {number} changes nothing: it has none of the steps that are run")
            elif before := sorted(set(edit.edit.steps or ()) & set(range(self.first_step))):
                notes.append(f"note: edit {number} names steps that are not run: {', '.join(map(str, before))}")
        return notes

    def at(self, strength: float, number: int | None = None) -> "Steering":
        """The same with another strength for the edit of this number, or (None) for all that take one."""
        edits = [
            edit if edit.kind == "ablate" or number not in (None, place) else edit.at(strength)
            for place, edit in enumerate(self.edits)
        ]
        return self.of(edits)

    def of(self, edits: Sequence[Edit]) -> "Steering":
        """Other edits, made ready for the same runs."""
        return Steering(
            edits,
            self.spec,
            grid=self.grid,
            num_steps=self.num_steps,
            first_step=self.first_step,
            txt_tokens=self.txt_tokens,
            device=self.device,
            loaded=self.loaded,
        )

    def along(self, directions: Mapping[Site, Tensor]) -> "Steering":
        """The same with every token moved as far along other directions, of length 1: a control. A token that the edit
        moves against its own direction is moved against the other one.
        """
        same = self.of(self.edits)
        for edit in same.ready:
            edit.instead = {site: directions[site].to(self.device) for site in edit.weights}
        return same

    def at_steps(self, steps: Collection[int]) -> "Steering":
        """The same at these steps alone, as far as it has them."""
        same = self.of(self.edits)
        for edit in same.ready:
            edit.steps = edit.steps & frozenset(steps)
        return same

    def region_of_image(self) -> Bool[Tensor, "tokens"] | None:
        """The image tokens that some edit may change; None: all of them, or no edit says where."""
        masks = [
            torch.from_numpy(edit.edit.region.mask("img", self.grid.tokens, self.grid))
            for edit in self.ready
            if edit.edit.region is not None
            and any(site.stream != "txt" and not site.per_prompt for site in edit.weights)
        ]
        return torch.stack(masks).any(dim=0) if masks and len(masks) == len(self.ready) else None

    def described(self, *, with_strength: bool) -> list[dict[str, Any]]:
        """Every edit by the content of what it names: edits that are described alike change alike."""
        strengths = [{"strength": list(edit.strengths)} if with_strength else {} for edit in self.edits]
        return [self._described(edit) | strength for edit, strength in zip(self.edits, strengths, strict=True)]

    def _described(self, edit: Edit) -> dict[str, Any]:
        by_content = ("strength", "sae", "vector", "region", "weights", "sites")
        said = {name: value for name, value in vars(edit).items() if name not in by_content and value is not None}
        named: dict[str, Any] = {n: list(value) if isinstance(value, tuple) else value for n, value in said.items()}
        if edit.sites == (POOLED,):
            vector = edit.vector if isinstance(edit.vector, Tensor | None) else read_vector(edit.vector)
            return named | {"sites": [POOLED], "direction": None if vector is None else tensors_digest(vector)}
        ready = self.ready[[one.edit is edit for one in self.ready].index(True)]
        sites: dict[str, Any] = {}
        for site, weight in ready.weights.items():
            inside = ready.inside(site, self.txt_tokens, self.tokens(site))
            tokens = None if inside is None else inside.nonzero().flatten().tolist()
            sites[str(site)] = {"weight": weight, "tokens": tokens}
        return named | {"direction": ready.direction.digest(), "sites": sites}

    def during(self, model: Transformer) -> AbstractContextManager[None]:
        """While it lasts, every picture that `model` makes is steered."""
        return steered(model, [self], first_step=self.first_step)

    def during_text(self, encoders: TextEncoders) -> AbstractContextManager[None]:
        """While it lasts, every prompt is encoded with the edits of the text encoders."""
        return steered_text(encoders, self)

    def edit_pooled(self, y: Pooled) -> Pooled:
        """CLIP's vector after the edits of it; itself, where there are none."""
        for edit in self.pooled:
            y = edited_pooled(edit, y)
        return y

    def _ready(self, edit: Edit) -> ReadyEdit:
        direction, trained_site = self._direction(edit)
        named = edit.sites if edit.sites is not None else trained_site
        assert named is not None  # an edit without sites has an autoencoder that says its own
        sites = sites_among(named, self.spec.sites)
        self._check_sites(edit, sites, direction, trained_site)
        self._check_steps(edit, sites)
        ready = ReadyEdit(edit, direction, _weights(edit, sites), grid=self.grid, num_steps=self.num_steps)
        ready.steps = ready.steps & frozenset(range(self.first_step, self.num_steps))
        # What cannot be is told now, not in the middle of a run.
        for site in sites:
            ready.inside(site, self.txt_tokens, self.tokens(site))
        if edit.kind not in ("scale", "ablate") or not isinstance(edit.gate, str):
            direction.unit(edit.units, torch.ones((), device=self.device))
        return ready

    def _direction(self, edit: Edit) -> tuple[Direction, str | None]:
        """The direction of an edit, and the site its autoencoder was trained on."""
        if edit.vector is not None:
            vector = edit.vector if isinstance(edit.vector, Tensor) else read_vector(edit.vector)
            name = "the vector" if isinstance(edit.vector, Tensor) else str(edit.vector)
            return Vector(vector.to(self.device), edit.units, name), None
        sae = self.sae_of(edit)
        if sae.config.model is not None and sae.config.model != self.spec.name:
            raise FluxIRError(
                f"this autoencoder was trained on {sae.config.model}: it is no dictionary of {self.spec.name}",
                hint=f"--model {sae.config.model}, or an autoencoder of {self.spec.name}",
            )
        if edit.sites is None and sae.config.site is None:
            raise FluxIRError("this autoencoder does not say of which site it is", hint="name it with --sites")
        if edit.prompt is not None:
            raise FluxIRError("a steering prompt is to be encoded first", hint="pass the edit through `settled`")
        return Features(sae, edit.feature), sae.config.site  # type: ignore[arg-type]  # a tuple by now

    def sae_of(self, edit: Edit) -> SparseAutoencoder:
        """The autoencoder of an edit, read once."""
        if isinstance(edit.sae, SparseAutoencoder):
            return edit.sae
        folder = str(edit.sae)
        if folder not in self.loaded:
            self.loaded[folder] = load_sae(folder, device=self.device)
        return self.loaded[folder]

    def _check_sites(self, edit: Edit, sites: Sequence[Site], direction: Direction, trained: str | None) -> None:
        width = direction.rows(0).shape[1]
        for site in sites:
            if (needed := self.width(site)) != width:
                what = "vector" if edit.vector is not None else "autoencoder"
                raise FluxIRError(
                    f"the tokens of {site} of {self.spec.name} are {needed} wide: this {what} is of {width}",
                    hint="name a site of this width, or another one" if what == "vector" else f"it is of {trained}",
                )
        others = [site for site in sites if trained is not None and str(site) != trained]
        if others and edit.weights is None:
            raise FluxIRError(
                f"this autoencoder was trained on {trained}: got --sites {', '.join(map(str, others))}",
                hint="leave out --sites; --weights 1, or presence, adds its direction at other sites all the same",
            )
        if others and edit.kind != "add":
            raise FluxIRError(
                f"only add can be done at a site the autoencoder was not trained on: got {edit.kind} at {others[0]}",
                hint=f"its features have no activations there: it was trained on {trained}",
            )

    def _check_steps(self, edit: Edit, sites: Sequence[Site]) -> None:
        per_prompt = [site for site in sites if site.per_prompt]
        if per_prompt and (edit.steps is not None or edit.schedule is not None):
            raise FluxIRError(
                f"{per_prompt[0]} is computed once per prompt and has no steps", hint="leave out --steps and --schedule"
            )
        rows = edit.vector.shape[0] if isinstance(edit.vector, Tensor) and edit.vector.ndim == 2 else None
        for name, given in (("a schedule", edit.schedule and len(edit.schedule)), ("a vector per step", rows)):
            if given is not None and given != 1 and given != self.num_steps:
                raise FluxIRError(
                    f"{name} has one entry for each of the {self.num_steps} steps: got {given}",
                    hint=f"--num_steps {given}, or {self.num_steps} entries",
                )

    def width(self, site: Site) -> int:
        """The width of a site's tokens."""
        if site.per_prompt:
            return self.spec.text_shape(site)[1]
        hidden = self.spec.flux.hidden_size
        return int(hidden * self.spec.flux.mlp_ratio) if site.part == "neurons" else hidden

    def tokens(self, site: Site) -> int:
        """How many tokens a site has."""
        if site.per_prompt:
            return self.spec.text_shape(site)[0]
        whole = self.grid.tokens + self.txt_tokens
        return {"img": self.grid.tokens, "txt": self.txt_tokens, None: whole}[self._of_the_picture(site)]

    @staticmethod
    def _of_the_picture(site: Site) -> Stream | None:
        if site.stream == "cond":
            raise FluxIRError(
                f"edits are at tokens of the picture or the text: got {site}, of a reference picture",
                hint="flux_ir.Intervention changes any site",
            )
        return site.stream


def _weights(edit: Edit, sites: Sequence[Site]) -> dict[Site, float]:
    if edit.weights is None:
        return dict.fromkeys(sites, 1.0)
    if isinstance(edit.weights, str):
        raise FluxIRError("the presence of a direction is to be measured first", hint="pass the edit through `settled`")
    given = [edit.weights] if isinstance(edit.weights, int | float) else list(edit.weights)
    weights = given * len(sites) if len(given) == 1 else given
    if len(weights) != len(sites):
        raise FluxIRError(
            f"weights are one for all sites, or one for each: got {len(weights)} for {len(sites)} sites",
            hint=f"the sites are {', '.join(map(str, sites))}, by depth",
        )
    return dict(zip(sites, weights, strict=True))


def edited_pooled(edit: Edit, y: Pooled) -> Pooled:
    """CLIP's vector of each prompt after one edit of it."""
    if edit.is_neutral:
        return y
    before = y.float()
    (strength,) = edit.strengths
    if edit.vector is None:  # the vector itself is the direction
        return (before * (strength if edit.kind == "scale" else 0.0)).to(y.dtype)
    vector = edit.vector if isinstance(edit.vector, Tensor) else read_vector(edit.vector)
    direction = Vector(vector.to(y.device), edit.units, str(edit.vector))
    whole = ReadyEdit(edit, direction, {}, grid=Grid(0, 0), num_steps=1)
    rows = [row[None] + whole.change(row[None], row.norm(), 0) for row in before]
    return torch.cat(rows).to(y.dtype)


@contextmanager
def steered(model: Transformer, rows: Sequence[PictureEdits | None], *, first_step: int = 0) -> Iterator[None]:
    """While the `with` lasts, every picture of a batch is steered by its own entry of `rows`, or all by the only one.

    The first forward is step `first_step`. None leaves its picture alone. Where several edits of a picture are at one
    site, they hold in the order stated. Every picture is changed by itself, so that its bits do not depend on the
    batch.
    """
    every: list[Sequence[SiteEdit]] = [[] if row is None else row.ready for row in rows]
    txt_tokens = next((row.txt_tokens for row in rows if row is not None), 0)
    with ExitStack() as stack:
        for number in range(max(map(len, every), default=0)):
            edits = [ready[number] if number < len(ready) else None for ready in every]
            sites = {site for edit in edits if edit is not None for site in edit.weights if not site.per_prompt}
            if sites:
                edit_rows = partial(_edited_rows, edits, txt_tokens)
                changes: dict[str | Site, Change] = {site: partial(edit_rows, site) for site in sorted(sites)}
                stack.enter_context(Intervention(model, changes, first_step=first_step))
        yield


@contextmanager
def steered_text(encoders: TextEncoders, steering: Steering | None) -> Iterator[None]:
    """While the `with` lasts, layers of the text encoders are edited, for every prompt that is encoded."""
    with ExitStack() as stack:
        for edit in steering.ready if steering is not None else ():
            sites = sorted(site for site in edit.weights if site.per_prompt)
            if sites and steering is not None:
                edit_prompts = partial(_edited_prompts, edit, steering.device)
                changes: dict[str | Site, TextChange] = {site: partial(edit_prompts, site) for site in sites}
                stack.enter_context(TextIntervention(encoders, changes))
        yield


def _edited_prompts(edit: ReadyEdit, device: torch.device, site: Site, value: Tokens) -> Tokens:
    """The prompts after one edit, computed where its direction is: the encoders may be elsewhere."""
    return _edited_rows([edit], value.shape[1], site, value.to(device), 0).to(value.device)


def _edited_rows(edits: Sequence[SiteEdit | None], txt_tokens: int, site: Site, value: Tokens, step: int) -> Tokens:
    """The batch after one edit per picture: itself, where none of them changes anything."""
    each = list(edits) * len(value) if len(edits) == 1 else edits
    if len(each) != len(value):
        raise ValueError(f"{len(each)} edits for {len(value)} pictures")
    rows = torch.split(value, 1)
    parts = [row if edit is None else edit(site, txt_tokens, row, step) for row, edit in zip(rows, each, strict=True)]
    return torch.cat(parts) if any(part is not row for part, row in zip(parts, rows, strict=True)) else value
