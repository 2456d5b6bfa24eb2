"""Training of autoencoders: everything is checked first, then comes a run for each kind of tokens.

Sites that have the same tokens (all image sites, say) are one run: their autoencoders train side by side on one batch.
To follow a training from here to a weight: `run_training`, then `TrainingRun.work` (`training_run`), `Member.step`
(`sae.training.step`, which asks an architecture for its loss) and `RowAdam.step` (`sae.training.optimiser`). On the way
`settings` are what the caller gave (`TrainSAESettings`), and `training` what follows for the steps (`TrainSettings`).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from flux_ir.api.curve_loggers import check_logger
from flux_ir.api.progress import Note, Watch, unwatched
from flux_ir.api.training_data import TrainingData, open_data
from flux_ir.api.training_run import Planned, Trained, TrainingRow, TrainingRun
from flux_ir.api.training_settings import TrainSAESettings
from flux_ir.distributed import Ranks, joined
from flux_ir.errors import FluxIRError, counted, in_units
from flux_ir.models.compute_dtype import bfloat16_on
from flux_ir.models.memory import free_memory
from flux_ir.models.placement import plan
from flux_ir.sae.architectures.config import HAS_K, Architecture, SAEConfig
from flux_ir.sae.data.filters import SiteKey, sites_in_lockstep
from flux_ir.sae.kernels.choose import path_for
from flux_ir.sae.training.step import TrainSettings
from flux_ir.sites import SiteNames

__all__ = ["Trained", "TrainingRow", "run_training", "train_sae"]

# A feature is dead after so many tokens without firing, at most: 10 million, and a twentieth of the run.
MOST_DEAD_AFTER, DEAD_AFTER_PART = 10_000_000, 20


def train_sae(
    captures: str | Path | None = None,
    *,
    site: SiteNames | None = None,
    steps: Sequence[int] | int | None = None,
    stream: Literal["img", "txt"] | None = None,
    padding: bool = False,
    outliers: float | None = None,
    held_out: float = 0.1,
    max_tokens: int | None = None,
    epochs: int | None = None,
    pool_gb: float = 1.0,
    arch: Literal["topk", "batch_topk", "l1", "jumprelu", "gated", "matryoshka"] = "topk",
    k: Sequence[int] | int | None = None,
    prefixes: Sequence[int] | int | None = None,
    expansion: Sequence[int] | int = 8,
    seed: Sequence[int] | int = 0,
    l1_coefficient: Sequence[float] | float | None = None,
    target_l0: Sequence[float] | float | None = None,
    tied: bool = False,
    decoder_init: Literal["random", "orthogonal"] = "random",
    encoder_init: Literal["transposed", "random", "orthogonal"] = "transposed",
    bias_init: Literal["mean", "geometric_median"] = "mean",
    normalise: bool = True,
    whiten: str | Path | None = None,
    k_aux: int | None = None,
    dead_after: int | None = None,
    resample: int | None = None,
    batch_tokens: int = 2048,
    lr: float | None = None,
    k_start: int | None = None,
    ema: float | None = None,
    clip: float | None = 1.0,
    dtype: Literal["bfloat16", "float32"] | None = None,
    shard_optimiser: bool = False,
    model: str | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    repeats: int | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: Sequence[float] | float | None = None,
    quantize: Literal["nf4", "int8", "fp8"] | None = None,
    name: str | None = None,
    output_dir: str | Path = "saes",
    checkpoint_minutes: float = 10.0,
    checkpoint_tokens: int | None = None,
    log: Literal["none", "tensorboard", "wandb"] = "none",
    device: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Watch = unwatched,
) -> Iterator[TrainingRow]:
    """Train sparse autoencoders; yields a row whenever curves get one, the last of each run with what it has trained.

    Data: `captures`, activations on disk as `open_source` takes them, or `model` with `prompts` (a list or a file) and
    `repeats`, which makes activations on the way and stores none (`lora`, `lora_strength` and `quantize` as for
    `load_model`). Of these `site` (names or patterns), `steps`,
    `stream`, `padding` and `outliers` choose tokens; the share `held_out` of the prompts is measured on at the end;
    `max_tokens` or `epochs` say how long it goes.

    Autoencoder: `arch` with `k` (and `prefixes`), `l1_coefficient` or `target_l0`, `expansion` features per dimension,
    `seed`; several of each train every combination side by side on the same batches. `decoder_init`, `encoder_init`,
    `bias_init`, `tied`, `normalise`, `whiten`, `k_aux`, `dead_after`, `resample`, `batch_tokens`, `lr`, `k_start`,
    `ema`, `clip`, `dtype` and `shard_optimiser` are as `flux-ir train-sae --help` says.

    One folder each below `output_dir`/`name`. It saves a checkpoint every `checkpoint_minutes`, and when `stop`, which
    is asked between two steps, says so, or when no more rows are asked for: the same call goes on from there, and ends
    with the same bytes. Nothing is trained before the first row is asked for.

    Raises FluxIRError for what a user can mend, the cheapest first.
    """
    return run_training(TrainSAESettings.of(locals()), stop=stop, progress=progress)


def run_training(
    settings: TrainSAESettings, *, stop: Callable[[], bool] = lambda: False, progress: Watch = unwatched
) -> Iterator[TrainingRow]:
    """`train_sae` with its settings in one object."""
    check_logger(settings.log)
    with joined() as ranks:
        watch = progress if ranks.is_first else unwatched
        device, why = _device(settings, ranks)
        data = open_data(settings, ranks)
        groups = sites_in_lockstep(data.sites, data.filters)
        # Everything that can be wrong with any run is found before the first begins.
        planned = [plan_run(settings, data, sites, device, ranks) for sites in groups]
        runs = [TrainingRun(one, settings, data, ranks, watch, stop) for one in planned]
        products = _products(device, settings.arch, planned[0].training.compute_dtype)
        watch(Note(f"{data.note()}; on {device} ({why}), {products}"))
        for run in runs:
            for row in run.work():
                yield row
                if row.stopped:
                    return


def plan_run(
    settings: TrainSAESettings, data: TrainingData, sites: list[SiteKey], device: torch.device, ranks: Ranks
) -> Planned:
    """What one run trains, and how. Raises FluxIRError for sizes that do not fit."""
    members = {name: config for site in sites for name, config in configs(settings, data, site).items()}
    total_tokens = settings.max_tokens or (settings.epochs or 1) * data.epoch_tokens(sites[0])
    total_steps = total_tokens // settings.batch_tokens
    if total_steps < 1 or data.epoch_tokens(sites[0]) < settings.batch_tokens:
        raise FluxIRError(
            f"there must be a batch of {settings.batch_tokens} tokens in the data: "
            f"an epoch has {data.epoch_tokens(sites[0])}, the run {total_tokens}",
            hint="pass a smaller --batch_tokens, or more data",
        )
    if settings.batch_tokens % ranks.world_size:
        raise FluxIRError(
            f"a batch is cut into equal shares: got {settings.batch_tokens} tokens, {ranks.world_size} processes",
            hint=f"make --batch_tokens a multiple of {ranks.world_size}",
        )
    tokens = total_steps * settings.batch_tokens
    # On a CPU only if asked for: it rounds the sums of bf16 products too, and so each process its share of a gradient.
    dtype = settings.dtype or ("bfloat16" if device.type == "cuda" and bfloat16_on(device).real else "float32")
    training = TrainSettings(
        total_steps=total_steps,
        batch_tokens=settings.batch_tokens,
        dead_after_tokens=settings.dead_after or max(1, min(MOST_DEAD_AFTER, tokens // DEAD_AFTER_PART)),
        learning_rate=settings.lr,
        k_start=settings.k_start,
        clip=settings.clip,
        ema_decay=settings.ema,
        resample_steps=settings.resample,
        compute_dtype=getattr(torch, dtype),
        shard_optimiser=settings.shard_optimiser,
    )
    _check_memory(members, training, device, ranks)
    return Planned(folder_of(settings, data), members, sites, training, device, run_id(members))


def _check_memory(
    members: Mapping[str, SAEConfig], training: TrainSettings, device: torch.device, ranks: Ranks
) -> None:
    """Raises FluxIRError if weights, gradients and moments alone are more than there is, before any of it is made."""
    elements = {
        name: (1 if config.tied else 2) * config.d_in * config.d_sae + config.d_in + config.d_sae
        for name, config in members.items()
    }
    moments = 2 / (ranks.world_size if training.shard_optimiser else 1)
    # Bytes of an element: float32 weight, gradient, moments and, with EMA, average; its bf16 copy.
    each = 4 * (2 + moments + (training.ema_decay is not None)) + (training.compute_dtype != torch.float32) * 2
    # Weights are drawn on the CPU, from random numbers that are as large.
    needed = {"cpu": 8 * max(elements.values())} | {str(device): int(each * sum(elements.values()))}
    for memory, size in needed.items():
        free = free_memory(memory)
        if free is not None and size > free:
            largest = max(members.values(), key=lambda config: config.d_sae)
            raise FluxIRError(
                f"it does not fit: {counted(len(members), 'autoencoder')} of up to {largest.d_sae} features for "
                f"activations {largest.d_in} wide take {in_units(size)} of memory on {memory} (weights, gradients and "
                f"the optimiser's moments), and {in_units(free)} are free",
                hint="lower --expansion, or train fewer at a time",
            )


def _products(device: torch.device, architecture: Architecture, dtype: torch.dtype) -> str:
    """The precision of the products, and a hint where a lower one would be faster."""
    on_reference = architecture in HAS_K and path_for(torch.empty(0, device=device)) == "reference"
    if on_reference and dtype != torch.float32:
        return f"products in float32: without FLUX_IR_TRITON=1 those of {architecture} are never rounded on a GPU"
    bfloat16_is_faster = dtype == torch.float32 and device.type == "cpu" and bfloat16_on(device).real
    advice = " (this CPU trains several times as fast with --dtype bfloat16)" if bfloat16_is_faster else ""
    return f"products in {str(dtype).removeprefix('torch.')}{advice}"


def configs(settings: TrainSAESettings, data: TrainingData, site: SiteKey) -> dict[str, SAEConfig]:
    """The autoencoders of a site, by the name of their folder: every combination of the lists."""
    sparsities: Sequence[float | None] = settings.k or (32,)
    if settings.arch not in HAS_K:
        sparsities = (settings.target_l0 if settings.arch == "jumprelu" else settings.l1_coefficient) or (None,)
    by_name = {}
    for sparsity, expansion, seed in product(dict.fromkeys(sparsities), settings.expansion, settings.seed):
        config = SAEConfig(
            architecture=settings.arch,
            d_in=data.widths[site],
            d_sae=expansion * data.widths[site],
            k=int(sparsity or 1) if settings.arch in HAS_K else 1,
            k_aux=settings.k_aux,
            prefixes=() if settings.prefixes is None else (*settings.prefixes, expansion * data.widths[site]),
            l1_coefficient=sparsity if settings.arch in ("l1", "gated") else None,
            target_l0=sparsity if settings.arch == "jumprelu" else None,
            tied=settings.tied,
            decoder_init=settings.decoder_init,
            encoder_init=settings.encoder_init,
            bias_init=settings.bias_init,
            whitened=settings.whiten is not None,
            seed=seed,
            site=None if site is None else str(site),
            model=data.model,
            steps=None if site is None else tuple(data.steps),
        )
        by_name[member_name(config, expansion, sparsity)] = config
    return by_name


def member_name(config: SAEConfig, expansion: int, sparsity: float | None) -> str:
    """The folder of one autoencoder: `single.6.img_topk_k16_x8_s0`."""
    letter = {"l1": "l", "gated": "l", "jumprelu": "t"}.get(config.architecture, "k")
    given = [] if sparsity is None else [f"{letter}{sparsity:g}"]
    return "_".join([config.site or "array", config.architecture, *given, f"x{expansion}", f"s{config.seed}"])


def folder_of(settings: TrainSAESettings, data: TrainingData) -> Path:
    """The folder that the folders of all autoencoders lie in. Raises FluxIRError for a name that leads elsewhere."""
    name = settings.name or data.name
    if name in (".", "..") or Path(name).name != name:
        raise FluxIRError(f"--name is the name of one folder: got {name!r}", hint="put the rest into --output_dir")
    return settings.output_dir / name


def run_id(members: dict[str, SAEConfig]) -> str:
    """A name for the run that trains these, the same every time."""
    digest = hashlib.sha256(json.dumps(sorted(members)).encode()).hexdigest()[:8]
    first = next(iter(members))
    return f"{first}-{digest}" if len(members) == 1 else f"{first}+{len(members) - 1}-{digest}"


def _device(settings: TrainSAESettings, ranks: Ranks) -> tuple[torch.device, str]:
    """The device of this process, and why: of several processes, each takes the GPU of its number."""
    if ranks.world_size == 1:
        placement = plan(torch.cuda.device_count(), device=settings.device)
        return torch.device(placement.transformer), placement.reason
    device = ranks.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, f"one of {ranks.world_size} processes"
