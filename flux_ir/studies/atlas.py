"""What is each block for? One thing is done to one block in a window of steps, and the picture says what was lost.

    bench = Bench(autoencoder, grid, timesteps, guidance, dtype, shift=2)
    plain = bench.unedited(model, batch)
    bench.edited(model, batch, plain, "double.3", Ablation("skip", "early"))

Two published tests are among the kinds: a block that is skipped (Stable Flow: Avrahami et al., 2025) and image keys
whose rotary positions are shifted (FreeFlux: Wei et al., 2025). Beside an edit there may be its control, which moves
every token of the same sites as far, in a random direction. Next: `atlas_table`, what many pictures come to.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from flux_ir.demo.judge import Sight, look
from flux_ir.demo.scenes import Scene, parse_caption
from flux_ir.lens.measures import psnr_db, relative_distance
from flux_ir.models.architecture import Transformer, TransformerParams
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.flux1.attention import rotary_table, rotate
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Change, Intervention
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.generate import Inputs, decode, noise_for, prepare, sample
from flux_ir.shapes import PackedLatent, Pixels, Tokens
from flux_ir.sites import Site
from flux_ir.steering.dose import Picture, windows
from flux_ir.steering.perceptual import Lpips
from flux_ir.steering.regions import Grid
from flux_ir.studies.judged import agreement

AblationKind = Literal[
    "skip", "img_update", "txt_update", "attn", "mlp", "rotary", "patch_img", "patch_txt", "patch_update"
]
KINDS: tuple[AblationKind, ...] = get_args(AblationKind)
PATCHES: tuple[AblationKind, ...] = ("patch_img", "patch_txt", "patch_update")
"""The kinds that need the run of another prompt."""
KIND_TITLES: dict[AblationKind, str] = {
    "skip": "the block is passed over: its update of every token is 0",
    "img_update": "its update of the image tokens is 0",
    "txt_update": "its update of the text tokens is 0",
    "attn": "its attention branch is 0",
    "mlp": "its feed-forward branch is 0",
    "rotary": "its image keys stand elsewhere: their rotary positions are shifted, down and to the right",
    "patch_img": "the image tokens behind it are those of another prompt's run from the same noise",
    "patch_txt": "the text tokens behind it are those of another prompt's run",
    "patch_update": "its update of every token is that of another prompt's run",
}
WindowName = Literal["all", "early", "middle", "late"]
WINDOW_NAMES: tuple[WindowName, ...] = get_args(WindowName)
ASPECTS = ("number", "background", "colour", "shape", "size", "place")
"""What the judge is asked of a picture of flux-tiny; place: of a single object, or the relation of two."""


class Ablation(NamedTuple):
    """One thing that is done to a block."""

    kind: AblationKind
    window: WindowName = "all"
    control: bool = False
    """Not the edit itself, but random directions that move every token of its sites as far."""

    @property
    def name(self) -> str:
        """As files have it: `skip_all`, `skip_all_control`."""
        return f"{self.kind}_{self.window}" + ("_control" if self.control else "")


class Batch(NamedTuple):
    """Pictures that are made together. A picture's last bits depend on the size of its batch."""

    seeds: tuple[int, ...]
    text: TextEmbedding
    other_text: TextEmbedding | None
    """Of the other prompts, which patches come from; None: there are none."""


class Run(NamedTuple):
    """A batch that was sampled."""

    states: list[PackedLatent]
    """Before each step that was run, and the finished latent."""
    pictures: Pixels

    @property
    def latents(self) -> PackedLatent:
        """The finished ones, [batch, tokens, packed]."""
        return self.states[-1]


class Bench(NamedTuple):
    """Everything it takes to run batches with one block edited. The network is given to each call."""

    autoencoder: AutoEncoder
    grid: Grid
    timesteps: Sequence[float]
    guidance: float
    dtype: torch.dtype
    shift: int
    """Of rotary positions: patches down and to the right. 0 changes no bit."""

    @property
    def windows(self) -> dict[str, range]:
        """The steps of every window that there is."""
        num_steps = len(self.timesteps) - 1
        return {"all": range(num_steps), **windows(num_steps)}

    @torch.no_grad()
    def unedited(self, network: Transformer, batch: Batch) -> Run:
        """The run of the batch's own prompts."""
        return self._run(network, self._inputs(network, batch, batch.text))

    @torch.no_grad()
    def other(self, network: Transformer, batch: Batch, sites: Sequence[Site] = ()) -> tuple[Run, MemorySink]:
        """The run of the other prompts from the same noise, and what these sites put out in it at every step."""
        assert batch.other_text is not None
        sink, inputs = MemorySink(), self._inputs(network, batch, batch.other_text)
        with Recorder(network, sites, sink):
            return self._run(network, inputs), sink

    @torch.no_grad()
    def edited(
        self,
        network: Transformer,
        batch: Batch,
        plain: Run,
        block: str,
        ablation: Ablation,
        other: MemorySink | None = None,
    ) -> Run:
        """The run of the batch with one block edited. The steps before the window are those of the unedited run.

        `other` has what patches come from: `sites_of` of the kind.
        """
        changes = changes_of(ablation.kind, block, network.params, self.shift, other)
        if ablation.control:
            changes = {site: _as_far(change, site, batch.seeds) for site, change in changes.items()}
        steps = self.windows[ablation.window]
        inputs = self._inputs(network, batch, batch.text)._replace(img=plain.states[steps.start])
        with Intervention(network, changes, steps=steps, first_step=steps.start):
            return self._run(network, inputs, first_step=steps.start)

    def _inputs(self, network: Transformer, batch: Batch, text: TextEmbedding) -> Inputs:
        device = network.img_in.weight.device
        noise = noise_for(list(batch.seeds), self.grid.height, self.grid.width, device, self.dtype)
        return prepare(noise, text, self.grid.height, self.grid.width)

    def _run(self, network: Transformer, inputs: Inputs, *, first_step: int = 0) -> Run:
        steps = sample(network, inputs, list(self.timesteps), self.guidance, first_step=first_step)
        states = [inputs.img, *(step.after for step in steps)]
        return Run(states, decode(self.autoencoder, states[-1], self.grid.height, self.grid.width, self.dtype))


# ---- What is done to a block


def sites_of(kind: AblationKind, block: str) -> list[Site]:
    """The sites of a block (`double.3`, `single.9`) at which a kind of edit stands."""
    double = block.startswith("double")
    match kind:
        case "skip" | "patch_update":
            names = ["img.update", "txt.update"] if double else ["update"]
        case "img_update":
            names = ["img.update"]
        case "txt_update":
            names = ["txt.update"]
        case "attn":
            names = ["img.attn", "txt.attn"] if double else ["attn"]
        case "mlp":
            names = ["img.mlp", "txt.mlp"] if double else ["neurons"]
        case "rotary":
            names = ["img.k"]
        case "patch_img":
            names = ["img"]
        case "patch_txt":
            names = ["txt"]
    return [Site.parse(f"{block}.{name}") for name in names]


def changes_of(
    kind: AblationKind, block: str, params: TransformerParams, shift: int, other: MemorySink | None
) -> dict[str | Site, Change]:
    """What an `Intervention` does at each site of a block."""
    sites = sites_of(kind, block)
    if kind == "rotary":
        return {site: partial(_shifted, params, shift) for site in sites}
    if kind in PATCHES:
        assert other is not None
        return {site: partial(_patched, other, site) for site in sites}
    return dict.fromkeys(sites, _zero)


def _zero(value: Tokens, step: int) -> Tokens:
    return torch.zeros_like(value)


def _patched(other: MemorySink, site: Site, value: Tokens, step: int) -> Tokens:
    return other.read(site, step).to(value.device)


def _shifted(params: TransformerParams, shift: int, value: Tokens, step: int) -> Tokens:
    """Rotated keys with their positions so many patches down and to the right: rotations add up."""
    if shift == 0:
        return value
    place = torch.zeros(*value.shape[:2], len(params.axes_dim), device=value.device)
    place[..., 1:3] = shift  # row and column
    heads = rearrange(value, "b n (heads d) -> b heads n d", heads=params.num_heads)
    turned = rotate(heads, rotary_table(place, params.axes_dim, params.theta))
    return rearrange(turned, "b heads n d -> b n (heads d)")


def _as_far(change: Change, site: str | Site, seeds: Sequence[int]) -> Change:
    """A change that moves every token as far as another one, along one random direction for each picture and site."""

    def along(value: Tokens, step: int) -> Tokens:
        far = (change(value, step).float() - value.float()).norm(dim=-1, keepdim=True)
        directions = torch.stack([random_direction(site, seed, value.shape[-1]) for seed in seeds])
        return (value.float() + far * directions[:, None].to(value.device)).to(value.dtype)

    return along


def random_direction(site: str | Site, seed: int, width: int) -> Float[Tensor, "width"]:
    """A direction of length 1 that follows from the site and the seed of the picture's noise alone."""
    number = int.from_bytes(hashlib.sha256(f"control {site} {seed}".encode()).digest()[:7], "big")
    return normalize(torch.randn(width, generator=torch.Generator().manual_seed(number)), dim=0)


# ---- What becomes of a picture


Judge = Callable[[Picture, int], dict[str, list[bool]]]
"""What the judge says of picture number i of a batch: for each of `ASPECTS`, whether it is as its caption says (`own`)
and as the other prompt says (`other`, if there is one)."""


def judge_of(prompts: Sequence[str], others: Sequence[str] | None, grid: Grid) -> Judge | None:
    """The judge of pictures of these prompts; None where they are no captions of flux-tiny's world.

    It looks at square pictures only.
    """
    try:
        own = [parse_caption(prompt) for prompt in prompts]
        other = None if others is None else [parse_caption(prompt) for prompt in others]
    except ValueError:
        return None
    if grid.width != grid.height:
        return None

    def judge(picture: Picture, number: int) -> dict[str, list[bool]]:
        sight = look(picture.numpy())
        answers = {"own": aspects_right(sight, own[number])}
        return answers if other is None else answers | {"other": aspects_right(sight, other[number])}

    return judge


def aspects_right(sight: Sight, scene: Scene) -> list[bool]:
    """For each of `ASPECTS`, whether what was seen is as the scene's caption says."""
    number, background, colour, shape, size, place, relation = agreement(sight, scene)
    return [number, background, colour, shape, size, place if scene.relation is None else relation]


def measured(run: Run, plain: Run, judge: Judge | None, lpips: Lpips | None) -> list[dict[str, Any]]:
    """The numbers of every picture of a batch against the unedited one of the same prompt and noise."""
    return [_measured(run, plain, judge, lpips, number) for number in range(len(run.pictures))]


def _measured(run: Run, plain: Run, judge: Judge | None, lpips: Lpips | None, i: int) -> dict[str, Any]:
    picture, unedited = run.pictures[i], plain.pictures[i]
    numbers: dict[str, Any] = {
        "identical": torch.equal(picture, unedited) and torch.equal(run.latents[i], plain.latents[i]),
        "psnr_db": psnr_db(picture[None], unedited[None]),
        "latent": relative_distance(run.latents[i], plain.latents[i]),
    }
    if lpips is not None:
        numbers["lpips"] = lpips.distance(picture, unedited)
    return numbers if judge is None else numbers | {"right": judge(picture, i)}


def ablations_of(
    kinds: Sequence[AblationKind],
    window_kinds: Sequence[AblationKind],
    control_kinds: Sequence[AblationKind],
    steps: Mapping[str, range],
) -> list[Ablation]:
    """What is done to every block, in one order: each kind at all steps, its control, then in every window there is."""
    found = []
    for kind in [kind for kind in KINDS if kind in {*kinds, *window_kinds, *control_kinds}]:
        if kind in kinds:
            found.append(Ablation(kind))
        if kind in control_kinds:
            found.append(Ablation(kind, control=True))
        if kind in window_kinds:
            found += [Ablation(kind, window) for window in WINDOW_NAMES if window != "all" and window in steps]
    return found
