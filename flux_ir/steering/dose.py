"""Dose and price: the same noise with different strengths, and what each of them costs the rest of the picture.

Pictures are made side by side: on a CPU one per thread, each by a replica of the network (a batch has other bits than
its rows by themselves), on a GPU in batches. So what is made does not depend on how many are made together on a CPU.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from flux_ir.collecting.batches import borrowed, replicas
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.suite import TextEncoders
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Intervention
from flux_ir.sampling.generate import Inputs, decode, noise_for, prepare, sample
from flux_ir.sampling.latents import TOKEN_PX
from flux_ir.sampling.pictures import EncodedPictures
from flux_ir.shapes import Tokens
from flux_ir.sites import Site
from flux_ir.steering.apply import PictureEdits, ReadyEdit, Steering, steered
from flux_ir.steering.directions import Features
from flux_ir.steering.regions import Grid
from flux_ir.threads import in_order

MOVED = 0.1
"""A feature counts as moved when its largest activation changes by this share of the largest it had in training."""

Picture = UInt8[Tensor, "height width 3"]


class Variant(NamedTuple):
    """One picture to make."""

    row: str
    """What it is a case of: edit, unsteered, a control, a window of steps."""
    strength: float
    seed: int
    text: TextEmbedding
    """One prompt's, after the edits of the text encoders and of the pooled vector."""
    steering: PictureEdits | None
    """None: unsteered."""


class Activity(NamedTuple):
    """How active the edited features are in one picture, in their own maxima (1 where they have none)."""

    after: float
    """Behind the edit: mean over the region's tokens, the edited steps, features and sites."""
    carried: float | None
    """Before the edit, at the steps after the first edited one: what the network made of it. None: there are none."""
    others: tuple[Float[Tensor, "d_sae"], ...]
    """The largest activation of every feature over the tokens behind the edit, mean over steps: per edit and site."""


class Made(NamedTuple):
    """One picture."""

    variant: Variant
    latent: Float[Tensor, "tokens packed"]
    picture: Picture
    activity: Activity | None


class Painter(NamedTuple):
    """Everything it takes to make pictures, in one place."""

    model: Transformer
    autoencoder: AutoEncoder
    grid: Grid
    timesteps: Sequence[float]
    guidance: float
    dtype: torch.dtype
    meter: Steering | None
    """The edits whose features are measured, also in pictures without them; None: nothing is measured."""
    batch: int = 1
    """Pictures a GPU makes together. A CPU makes one per thread."""
    cpu_batch: int = 1
    """Pictures each thread of a CPU makes together. More than 1 is faster where pictures are only counted: each has
    other last bits than by itself."""
    given: EncodedPictures = EncodedPictures()
    """The pictures that every run begins with, or refers to."""

    def make(self, variants: Sequence[Variant]) -> Iterator[Made]:
        """The pictures, in the order of the variants."""
        if self.model.img_in.weight.device.type != "cpu":
            for batch in in_batches(variants, self.batch):
                yield from self._paint(self.model, batch)
            return
        threads = torch.get_num_threads()
        networks = replicas(self.model, min(threads, len(variants)))

        def paint(batch: Sequence[Variant]) -> list[Made]:
            with borrowed(networks) as network:
                return self._paint(network, batch)

        for made in in_order(paint, in_batches(variants, self.cpu_batch), threads, torch_threads=1):
            yield from made

    @torch.no_grad()
    def _paint(self, network: Transformer, variants: Sequence[Variant]) -> list[Made]:
        """Pictures made in one batch."""
        inputs = self._inputs(network, variants)
        meters = [Meter(self.meter) for _ in variants] if self.meter is not None else []
        steering = [variant.steering for variant in variants]
        first = self.given.first_step
        with (
            measuring(network, meters, "before", first_step=first),
            steered(network, steering, first_step=first),
            measuring(network, meters, "behind", first_step=first),
        ):
            *_, last = sample(network, inputs, list(self.timesteps), self.guidance, first_step=first)
        pictures = decode(self.autoencoder, last.after, self.grid.height, self.grid.width, self.dtype)
        activities: list[Activity | None] = [meter.activity() for meter in meters]
        activities = activities or [None] * len(variants)
        latents = last.after.float().cpu()
        return [Made(*parts) for parts in zip(variants, latents, pictures, activities, strict=True)]

    def _inputs(self, network: Transformer, variants: Sequence[Variant]) -> Inputs:
        device = network.img_in.weight.device
        noise = noise_for([v.seed for v in variants], self.grid.height, self.grid.width, device, self.dtype)
        text = TextEmbedding(*(torch.cat(parts) for parts in zip(*(v.text for v in variants), strict=True)))
        return self.given.put_into(prepare(noise, text, self.grid.height, self.grid.width))


def in_batches(variants: Sequence[Variant], size: int) -> list[Sequence[Variant]]:
    """The variants in order, so many at a time."""
    return [variants[start : start + size] for start in range(0, len(variants), size)]


# ---- What the edited features do


class Meter:
    """Measures one picture's features at the sites of some edits, before and behind them, while it is sampled."""

    def __init__(self, edits: Steering) -> None:
        self.edits = edits
        self.places = [(edit, site) for edit in edits.ready for site in edit.weights if not site.per_prompt]
        self._behind: list[Tensor] = []
        self._before: list[Tensor] = []
        self._largest: dict[int, list[Tensor]] = {}

    @property
    def sites(self) -> set[Site]:
        """Where it listens."""
        return {site for _, site in self.places}

    def read(self, when: str, site: Site, value: Float[Tensor, "tokens d"], step: int) -> None:
        """One site's tokens at one step, `when` before or behind the edits."""
        for number, (edit, where) in enumerate(self.places):
            if where != site:
                continue
            if when == "behind" and isinstance(edit.direction, Features):
                largest = edit.direction.sae.encode(value).amax(dim=0)
                self._largest.setdefault(number, []).append(largest)
            edited = step in edit.steps
            if edited if when == "behind" else step > min(edit.steps, default=step):
                inside = edit.inside(site, self.edits.txt_tokens, len(value))
                tokens = value if inside is None else value[inside]
                if len(tokens):
                    active = edit.direction.activations(tokens.float(), step) / own_maxima(edit)
                    (self._behind if when == "behind" else self._before).append(active.mean())

    def activity(self) -> Activity:
        """What it measured."""
        others = tuple(torch.stack(steps).mean(dim=0) for _, steps in sorted(self._largest.items()))
        behind = float(torch.stack(self._behind).mean()) if self._behind else 0.0
        carried = float(torch.stack(self._before).mean()) if self._before else None
        return Activity(behind, carried, others)


def measuring(network: Transformer, meters: Sequence[Meter], when: str, *, first_step: int = 0) -> Intervention:
    """While its `with` lasts each meter reads its row of the batch. It gives every value back: no bit changes."""

    def read(site: Site, value: Tokens, step: int) -> Tokens:
        for meter, row in zip(meters, value, strict=True):
            meter.read(when, site, row, step)
        return value

    sites = sorted({site for meter in meters for site in meter.sites})
    return Intervention(network, {site: partial(read, site) for site in sites}, first_step=first_step)


def own_maxima(edit: ReadyEdit) -> Tensor:
    """The largest activation in training of each edited feature; 1 where it is not known, and for vectors."""
    if isinstance(edit.direction, Features) and edit.direction.sae.max_active is not None:
        known = edit.direction.sae.max_active[edit.direction.numbers].float()
        return torch.where(known > 0, known, 1)
    return torch.ones(1, device=edit.direction.rows(0).device)


def moved(edits: Steering, activity: Activity, unsteered: Activity) -> int:
    """How many features that no edit names have changed by more than `MOVED` of the largest they had in training."""
    places = [(e, s) for e in edits.ready for s in e.weights if not s.per_prompt and isinstance(e.direction, Features)]
    count = 0
    for (edit, _), now, then in zip(places, activity.others, unsteered.others, strict=True):
        assert isinstance(edit.direction, Features)
        sae = edit.direction.sae
        largest = torch.ones_like(now) if sae.max_active is None else sae.max_active.float()
        changed = (now - then).abs() > MOVED * largest
        changed[edit.direction.numbers] = False
        count += int(changed.sum())
    return count


# ---- What the rest of the picture pays


class Price(NamedTuple):
    """How far a picture is from the unsteered one of the same noise, inside the region and outside of it."""

    identical: bool
    """Every byte of the picture and every bit of its latent."""
    psnr_inside_db: float | None
    """None: nothing differs there, or there is nothing outside."""
    psnr_outside_db: float | None
    latent_inside: float
    """|difference| / |unsteered| of the finished latent."""
    latent_outside: float | None
    lpips: float | None = None
    """Of the whole picture. None: not measured (see `perceptual`)."""
    lpips_outside: float | None = None
    """With the region's pixels made equal. None: not measured, or there is nothing outside."""

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it; without LPIPS where it was not measured."""
        return {name: value for name, value in self._asdict().items() if value is not None or "lpips" not in name}


def price(made: Made, unsteered: Made, inside: Bool[Tensor, "tokens"] | None, grid: Grid) -> Price:
    """What this picture paid. `inside` None: the region is the whole picture."""
    everywhere = torch.ones(grid.tokens, dtype=torch.bool)
    inside = everywhere if inside is None else inside
    outside = None if bool(inside.all()) else ~inside
    return Price(
        identical=torch.equal(made.picture, unsteered.picture) and torch.equal(made.latent, unsteered.latent),
        psnr_inside_db=_psnr(made.picture, unsteered.picture, inside, grid),
        psnr_outside_db=None if outside is None else _psnr(made.picture, unsteered.picture, outside, grid),
        latent_inside=_distance(made.latent, unsteered.latent, inside),
        latent_outside=None if outside is None else _distance(made.latent, unsteered.latent, outside),
    )


def _psnr(picture: Picture, other: Picture, tokens: Bool[Tensor, "tokens"], grid: Grid) -> float | None:
    """Peak signal to noise [dB] over the pixels of these tokens; None where nothing differs, or there are none."""
    mask = pixels_of(tokens, grid)
    error = (picture[mask].double() - other[mask].double()).square()
    mean = float(error.mean()) if error.numel() else 0.0
    return 10 * math.log10(255**2 / mean) if mean > 0 else None


def pixels_of(tokens: Bool[Tensor, "tokens"], grid: Grid) -> Bool[Tensor, "height width"]:
    """Which pixels these tokens have."""
    return tokens.reshape(grid.rows, grid.columns).repeat_interleave(TOKEN_PX, 0).repeat_interleave(TOKEN_PX, 1)


def _distance(
    latent: Float[Tensor, "tokens packed"], other: Float[Tensor, "tokens packed"], tokens: Bool[Tensor, "tokens"]
) -> float:
    size = float(other[tokens].norm())
    return float((latent[tokens] - other[tokens]).norm()) / size if size > 0 else 0.0


# ---- Controls: other directions, as far


def random_directions(steering: Steering, number: int) -> dict[Site, Float[Tensor, "d"]]:
    """A random direction of length 1 for each site: the same for this number, whatever the picture."""
    draw = torch.Generator().manual_seed(number)
    return {site: normalize(torch.randn(steering.width(site), generator=draw), dim=0) for site in steering.sites}


@torch.no_grad()
def aligned_neurons(
    model: Transformer, steering: Steering, vec: Float[Tensor, "1 d"]
) -> dict[Site, tuple[int, Float[Tensor, "d"]]]:
    """For each site the feed-forward neuron of its block whose output direction is nearest to the edit's, and that.

    A neuron adds its column of the second linear, times the block's gate under `vec`; it may add it with either sign.
    Sites without a feed-forward block, and those of a space of their own (neurons, queries), have none.
    """
    found: dict[Site, tuple[int, Tensor]] = {}
    for edit in steering.ready:
        for site in edit.weights:
            if site.per_prompt or not site.in_residual:
                continue
            rows = edit.direction.rows(min(edit.steps, default=0))
            target = normalize(rows.float().sum(dim=0), dim=0)
            columns = normalize(neuron_outputs(model, site, vec), dim=0)
            cosines = target.to(columns.device) @ columns
            best = int(cosines.abs().argmax())
            found[site] = best, columns[:, best] * cosines[best].sign()
    return found


def neuron_outputs(model: Transformer, site: Site, vec: Float[Tensor, "1 d"]) -> Float[Tensor, "d neurons"]:
    """What each neuron of the site's block adds to the stream, per unit of its activation, under `vec`."""
    block = model.get_submodule(f"{site.kind}_blocks.{site.block}")
    if site.kind == "double":
        weight: Tensor = block.get_parameter(f"{site.stream}_mlp.2.weight")
    else:  # its second linear takes the attention branch and the neurons side by side
        weight = block.get_parameter("linear2.weight")[:, model.params.hidden_size :]
    gate = model.modulation(site, vec)[-1].gate  # that of the feed-forward branch is the last
    return weight.float() * gate[0, 0, :, None].float()


def text_neuron_outputs(encoders: TextEncoders, site: Site) -> Float[Tensor, "d neurons"]:
    """The same of a layer of T5, whose block has no gate."""
    weight: Tensor = encoders.t5.model.get_parameter(f"encoder.block.{site.block}.layer.1.DenseReluDense.wo.weight")
    return weight.float()


WINDOWS = ("early", "middle", "late")


def windows(num_steps: int, first_step: int = 0) -> dict[str, range]:
    """The thirds of the steps that are run, by name; of fewer than three steps, as many as there are steps."""
    edges = [first_step + round((num_steps - first_step) * third / 3) for third in range(4)]
    named = {name: range(edges[i], edges[i + 1]) for i, name in enumerate(WINDOWS)}
    return {name: steps for name, steps in named.items() if len(steps)}
