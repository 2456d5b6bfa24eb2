"""Which features made this part of the picture: how far each one's removal moves it, to first order, for all at once.

A feature f that is taken out of a token adds -z_f W_dec[f] there, at every step. What that makes of the finished latent
is J of it, to first order, where J runs through the rest of the network and through the steps behind. With random signs
u on the region, u . J a is one dot product of a gradient with what is taken out, and the mean of its squares over draws
of u is |J a|^2 (Hutchinson, 1990). So a few walks back through the sampler, one step's graph at a time, serve every
feature of every autoencoder; how good the order is, only removing them one by one says. Next: `removals`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flux_ir.collecting.batches import borrowed, replicas
from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.recording.intervention import Change, Intervention
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.evaluation.metrics import DENSE_VALUES
from flux_ir.sampling.denoise import euler_step, per_sample
from flux_ir.sampling.generate import Inputs
from flux_ir.shapes import PackedLatent, Tokens
from flux_ir.sites import Site
from flux_ir.steering.apply import Steering
from flux_ir.steering.directions import Features
from flux_ir.threads import in_order

Draws = Float[Tensor, "probes tokens packed"]
Inside = Bool[Tensor, "tokens"]

PROBES = 16
"""Draws of u. The relative standard error of an estimate is at most 1 / sqrt(2 PROBES): 18 %."""
DRAWS_TOGETHER = 4
"""Draws that share one forward: fewer would compute it more often, and more would leave threads without work."""
ROWS_AT_ONCE = 1 << 24
"""Values of W_dec that are gathered at a time: 64 MB in float32."""


# ---- The states of the run


class States(NamedTuple):
    """What every step of one run begins with, and what it ends with."""

    before: tuple[PackedLatent, ...]
    last: PackedLatent
    drift: float
    """How far, at worst and relative to it, a stored state is from the one that is sampled here; 0 where none is."""


@torch.no_grad()
def states_of(
    model: Transformer, inputs: Inputs, timesteps: Sequence[float], guidance: float, stored: Mapping[int, PackedLatent]
) -> States:
    """The states of a run: the stored ones, and those between them as they are sampled from the ones before.

    Every stored state is compared with what the step before it leads to, the first with the noise in `inputs`.
    """
    before: list[Tensor] = []
    drift, state = 0.0, inputs.img
    for step in range(len(timesteps) - 1):
        if step in stored:
            known = stored[step].to(state)
            drift = max(drift, float((state - known).float().norm() / known.float().norm()))
            state = known
        before.append(state)
        velocity = _velocity(model, inputs._replace(img=state), timesteps[step], guidance)
        state = euler_step(state, velocity, timesteps[step], timesteps[step + 1])
    return States(tuple(before), state, drift)


def _velocity(model: Transformer, inputs: Inputs, t_curr: float, guidance: float) -> Tensor:
    img, img_ids, txt, txt_ids, y, cond, cond_ids = inputs
    at = per_sample(t_curr, img), y, per_sample(guidance, img)
    velocity: Tensor = model(img, img_ids, txt, txt_ids, *at, cond, cond_ids)
    return velocity


# ---- Back through the sampler


class StepGradients(NamedTuple):
    """What one step has to say."""

    step: int
    values: Mapping[Site, Float[Tensor, "tokens d"]]
    """What each site put out."""
    gradients: Mapping[Site, Float[Tensor, "probes tokens d"]]
    """By what each site put out, of u . (the finished latent), one for each draw u."""


def signs(probes: int, inside: Inside, packed: int, seed: int) -> Draws:
    """Draws of random signs on the region's tokens, zeros elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, (probes, len(inside), packed), generator=draw).float() * 2 - 1
    return values * inside.float()[:, None]


def walk_back(
    model: Transformer,
    inputs: Inputs,
    states: Sequence[PackedLatent],
    timesteps: Sequence[float],
    guidance: float,
    sites: Sequence[Site],
    draws: Draws,
    steps: Sequence[int],
) -> Iterator[StepGradients]:
    """The gradients of every step that is asked for, from the last one back; one step's graph is in memory at a time.

    x' = x + dt v(x), so what pulls at x' pulls at x with 1 + dt dv/dx, and at the sites of this step with dt.
    """
    pulls = draws.to(states[0].device, copy=True)
    for step in reversed(range(min(steps), len(states))):
        dt, at = timesteps[step + 1] - timesteps[step], sites if step in steps else ()
        state = states[step].detach().clone().requires_grad_()
        velocity, values, leaves = _with_graph(model, inputs._replace(img=state), timesteps[step], guidance, at)
        wanted = [*leaves.values(), *([state] if step > min(steps) else [])]
        by_site: dict[Site, list[Tensor]] = {site: [] for site in leaves}
        for number, pull in enumerate(pulls):
            left = number < len(pulls) - 1
            # The network may compute in bf16; what is carried from step to step is float32.
            found = torch.autograd.grad(velocity, wanted, (dt * pull[None]).to(velocity.dtype), retain_graph=left)
            for site, gradient in zip(leaves, found, strict=False):
                by_site[site].append(gradient[0])
            if step > min(steps):
                pulls[number] += found[-1][0].float()
        del velocity, leaves, wanted
        if at:
            yield StepGradients(step, values, {site: torch.stack(by_site[_behind(site)]) for site in at})


def _with_graph(
    model: Transformer, inputs: Inputs, t_curr: float, guidance: float, sites: Sequence[Site]
) -> tuple[Tensor, dict[Site, Tensor], dict[Site, Tensor]]:
    """The velocity, what each site put out, and the leaf at each site that the gradient is taken by."""
    leaves: dict[Site, Tensor] = {}

    def add_zeros(site: Site, value: Tokens, step: int) -> Tokens:
        leaves[site] = torch.zeros_like(value, requires_grad=True)
        return value + leaves[site]

    with torch.enable_grad():
        if not sites:
            return _velocity(model, inputs, t_curr, guidance), {}, {}
        changes: dict[str | Site, Change] = {site: partial(add_zeros, site) for site in map(_behind, sites)}
        with Intervention(model, changes), Recorder(model, list(sites)) as recorder:
            velocity = _velocity(model, inputs, t_curr, guidance)
    assert isinstance(recorder.sink, MemorySink)
    home = inputs.img.device  # where the gradients are, wherever the blocks are
    return velocity, {site: recorder.sink.values[0, site][0].to(home) for site in sites}, leaves


def _behind(site: Site) -> Site:
    """Where the gradient is taken: out = in + update, so that by an update is that by the output."""
    return replace(site, part=None) if site.part == "update" else site


# ---- Every feature at once


class Estimates(NamedTuple):
    """What removing each feature of one autoencoder does to the region of the finished latent, to first order."""

    dots: Float[Tensor, "probes d_sae"]
    """u . change, all steps together."""
    by_step: Float[Tensor, "steps d_sae"]
    """|change| of a removal at this step alone, as estimated; 0 at steps that were not asked for."""
    active: Int64[Tensor, "d_sae"]
    """Image tokens that the feature is active on, counted at every step."""
    active_inside: Int64[Tensor, "d_sae"]
    """Those of them that are in the region."""
    fires: Bool[Tensor, "d_sae"]
    """Whether it is active at all: on a text token too."""

    @property
    def change(self) -> Float[Tensor, "d_sae"]:
        """|change|, as estimated."""
        return self.dots.square().mean(dim=0).sqrt()


class Source(NamedTuple):
    """One autoencoder where it is used."""

    sae: SparseAutoencoder
    site: Site
    digest: str
    """16 hex digits that stand for its weights."""


def sources_of(steering: Steering) -> list[Source]:
    """The autoencoders, read. Raises FluxIRError for one of a text encoder, at several sites, or named twice."""
    sources = []
    for ready in steering.ready:
        assert isinstance(ready.direction, Features)  # a removal of features
        sites = list(ready.weights)
        if len(sites) > 1:
            raise FluxIRError(
                f"an autoencoder is at one site: got {', '.join(map(str, sites))}", hint="name one of them with --sites"
            )
        if sites[0].per_prompt:
            raise FluxIRError(
                f"{sites[0]} is computed once per prompt: removals are estimated at sites of the transformer",
                hint="flux-ir steer --kind ablate removes features of a text encoder",
            )
        sources.append(Source(ready.direction.sae, sites[0], ready.direction.digest()))
    if len({(source.site, source.digest) for source in sources}) < len(sources):
        raise FluxIRError("an autoencoder is named twice, and its features would count twice", hint="name it once")
    return sources


class Walk(NamedTuple):
    """All that a walk back needs but the network and the draws."""

    inputs: Inputs
    states: Sequence[PackedLatent]
    timesteps: Sequence[float]
    guidance: float
    sources: Sequence[Source]
    steps: Sequence[int]
    inside: Inside


def estimate_in_parts(model: Transformer, walk: Walk, draws: Draws) -> Iterator[list["PartOfDraws"]]:
    """What some draws after the others say of each autoencoder; `joined` makes estimates of all of them.

    On a CPU every thread walks by itself with a replica of the network: each on one core, because threads that share so
    small a network wait for each other, and because bits then do not depend on how many there are.
    """
    parts = torch.split(draws, DRAWS_TOGETHER)
    sites = list(dict.fromkeys(source.site for source in walk.sources))

    def along(network: Transformer, some: Draws) -> list[PartOfDraws]:
        sums = [PartOfDraws(source, walk.inside, len(some), len(walk.states)) for source in walk.sources]
        steps = walk_back(network, walk.inputs, walk.states, walk.timesteps, walk.guidance, sites, some, walk.steps)
        for at in steps:
            for one in sums:
                one.add(at)
        return sums

    if model.img_in.weight.device.type != "cpu":
        yield from (along(model, some) for some in parts)
        return
    threads = min(torch.get_num_threads(), len(parts))
    networks = replicas(model, threads)

    def by_thread(some: Draws) -> list[PartOfDraws]:
        with borrowed(networks) as network:
            return along(network, some)

    yield from in_order(by_thread, parts, threads, torch_threads=1)


class PartOfDraws:
    """Adds up what some of the draws say of one autoencoder, step by step."""

    def __init__(self, source: Source, inside: Inside, draws: int, num_steps: int) -> None:
        self.sae, self.site, self.inside = source.sae, source.site, inside
        d_sae = source.sae.config.d_sae
        self.dots = torch.zeros(draws, d_sae, dtype=torch.float64)
        self.squares = torch.zeros(num_steps, d_sae, dtype=torch.float64)
        self.active, self.active_inside = (torch.zeros(d_sae, dtype=torch.int64) for _ in range(2))
        self.fires = torch.zeros(d_sae, dtype=torch.bool)

    @torch.no_grad()
    def add(self, at: StepGradients) -> None:
        """One step."""
        values, gradients = at.values[self.site].float(), at.gradients[self.site]
        dots = torch.zeros_like(self.dots)
        txt_tokens = 0 if self.site.stream == "img" else len(values) - len(self.inside)
        at_once = max(1, DENSE_VALUES // self.sae.config.d_sae)
        for first in range(0, len(values), at_once):
            code = self.sae.encode_sparse(values[first : first + at_once])
            self._count(code.values.cpu(), code.indices.cpu(), first - txt_tokens)
            some = max(1, ROWS_AT_ONCE // (code.values.shape[1] * values.shape[1]))
            for begin in range(0, len(code.values), some):
                z, feature = code.values[begin : begin + some], code.indices[begin : begin + some]
                rows = slice(first + begin, first + begin + len(z))
                along = torch.einsum("pnd,nkd->pnk", gradients[:, rows].float(), self.sae.W_dec[feature].float())
                # Summed on the CPU in float64: a GPU would add in another order each time.
                dots.index_add_(1, feature.flatten().cpu(), (-z * along).flatten(1).double().cpu())
        self.dots += dots
        self.squares[at.step] = dots.square().sum(dim=0)

    def _count(self, z: Tensor, feature: Tensor, first: int) -> None:
        """Count where features are active; `first` is the place of the first of these rows among the image tokens."""
        self.fires[feature[z > 0]] = True
        if self.site.stream == "txt":
            return
        place = torch.arange(first, first + len(z))[:, None].expand_as(z)
        on_image = (z > 0) & (place >= 0)
        inside = on_image & self.inside[place.clamp_min(0)]
        for counts, chosen in ((self.active, on_image), (self.active_inside, inside)):
            counts += torch.bincount(feature[chosen], minlength=len(counts))


def joined(parts: Sequence[PartOfDraws]) -> Estimates:
    """The estimates of one autoencoder, from all draws. Each part has seen the same tokens."""
    dots = torch.cat([part.dots for part in parts])
    by_step = torch.stack([part.squares for part in parts]).sum(dim=0) / len(dots)
    first = parts[0]
    return Estimates(dots.float(), by_step.sqrt().float(), first.active, first.active_inside, first.fires)
