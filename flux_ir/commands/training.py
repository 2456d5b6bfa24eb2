"""The heavy half of the command `train-sae`: questions first, then a run for each kind of tokens, then a table.

Sites that have the same tokens (all image sites, say) are one run: their autoencoders train side by side on one batch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from rich.text import Text

from flux_ir.commands.cli.parse import INTERRUPTED
from flux_ir.commands.logging_to import check_logger
from flux_ir.commands.report import Report, counted, in_units, peak_memory
from flux_ir.commands.room import free_memory
from flux_ir.commands.train_sae import SPARSE, TrainSAEOptions
from flux_ir.commands.training_data import TrainingData, open_data
from flux_ir.commands.training_run import Planned, Result, Run
from flux_ir.distributed import Ranks, joined
from flux_ir.errors import FluxIRError
from flux_ir.models.compute_dtype import bfloat16_on
from flux_ir.models.placement import plan
from flux_ir.sae.config import SAEConfig
from flux_ir.sae.data import sites_in_lockstep
from flux_ir.sae.filters import SiteKey
from flux_ir.sae.trainer import TrainSettings

MOST_DEAD_AFTER = 10_000_000
DEAD_SHARE = 20  # a feature is dead after at most this part of the run


def train_saes(options: TrainSAEOptions) -> int:
    """Train what the options ask for, and print what came of it; returns the exit code."""
    report = Report()
    check_logger(options.log)
    with joined() as ranks:
        device, why = _device(options, ranks)
        data = open_data(options, ranks)
        groups = sites_in_lockstep(data.sites, data.filters)
        # Everything that can be wrong with any run is found before the first begins.
        planned = [plan_run(options, data, sites, device, ranks) for sites in groups]
        runs = [Run(one, options, data, ranks, report) for one in planned]
        if ranks.is_first:
            products = _products(device, planned[0].settings.compute_dtype)
            report.note(f"{data.note()}; on {device} ({why}), {products}")
        results: list[Result] = []
        for run in runs:
            found = run.work()
            if found is None:
                return INTERRUPTED
            results += found
    if ranks.is_first:
        conclude(report, results, measured_on="held-out tokens" if data.split.threshold else "training tokens")
    return 0


def plan_run(
    options: TrainSAEOptions, data: TrainingData, sites: list[SiteKey], device: torch.device, ranks: Ranks
) -> Planned:
    """What one run trains, and how. Raises FluxIRError for sizes that do not fit."""
    members = {name: config for site in sites for name, config in configs(options, data, site).items()}
    total_tokens = options.max_tokens or (options.epochs or 1) * data.epoch_tokens(sites[0])
    total_steps = total_tokens // options.batch_tokens
    if total_steps < 1 or data.epoch_tokens(sites[0]) < options.batch_tokens:
        raise FluxIRError(
            f"there must be a batch of {options.batch_tokens} tokens in the data: "
            f"an epoch has {data.epoch_tokens(sites[0])}, the run {total_tokens}",
            hint="pass a smaller --batch_tokens, or more data",
        )
    if options.batch_tokens % ranks.world_size:
        raise FluxIRError(
            f"a batch is cut into equal shares: got {options.batch_tokens} tokens, {ranks.world_size} processes",
            hint=f"make --batch_tokens a multiple of {ranks.world_size}",
        )
    tokens = total_steps * options.batch_tokens
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" and bfloat16_on(device).real else "float32")
    settings = TrainSettings(
        total_steps=total_steps,
        batch_tokens=options.batch_tokens,
        dead_after_tokens=options.dead_after or max(1, min(MOST_DEAD_AFTER, tokens // DEAD_SHARE)),
        learning_rate=options.lr,
        k_start=options.k_start,
        clip=options.clip,
        ema_decay=options.ema,
        resample_steps=options.resample,
        compute_dtype=getattr(torch, dtype),
        shard_optimiser=options.shard_optimiser,
    )
    _check_memory(members, settings, device, ranks)
    return Planned(folder_of(options, data), members, sites, settings, device, run_id(members))


def _check_memory(
    members: Mapping[str, SAEConfig], settings: TrainSettings, device: torch.device, ranks: Ranks
) -> None:
    """Raises FluxIRError if weights, gradients and moments alone are more than there is, before any of it is made."""
    elements = {
        name: (1 if config.tied else 2) * config.d_in * config.d_sae + config.d_in + config.d_sae
        for name, config in members.items()
    }
    moments = 2 / (ranks.world_size if settings.shard_optimiser else 1)
    each = 4 * (2 + moments + (settings.ema_decay is not None)) + (settings.compute_dtype != torch.float32) * 2
    # Weights are drawn on the CPU, from random numbers that are as large.
    needed = {"cpu": 8 * max(elements.values())} | {str(device): int(each * sum(elements.values()))}
    for where, size in needed.items():
        free = free_memory(where)
        if free is not None and size > free:
            largest = max(members.values(), key=lambda config: config.d_sae)
            raise FluxIRError(
                f"it does not fit: {counted(len(members), 'autoencoder')} of up to {largest.d_sae} features for "
                f"activations {largest.d_in} wide take {in_units(size)} of memory on {where} (weights, gradients and "
                f"the optimiser's moments), and {in_units(free)} are free",
                hint="lower --expansion, or train fewer at a time",
            )


def _products(device: torch.device, dtype: torch.dtype) -> str:
    """What precision products have, and where they could have a quicker one."""
    quicker = dtype == torch.float32 and device.type == "cpu" and bfloat16_on(device).real
    advice = " (this CPU trains several times as fast with --dtype bfloat16)" if quicker else ""
    return f"products in {str(dtype).removeprefix('torch.')}{advice}"


def configs(options: TrainSAEOptions, data: TrainingData, site: SiteKey) -> dict[str, SAEConfig]:
    """The autoencoders of a site, by the name of their folder: every combination of the lists."""
    sparsities: Sequence[float | None] = options.k or (32,)
    if options.arch not in SPARSE:
        sparsities = (options.target_l0 if options.arch == "jumprelu" else options.l1_coefficient) or (None,)
    made = {}
    for sparsity, expansion, seed in product(dict.fromkeys(sparsities), options.expansion, options.seed):
        config = SAEConfig(
            architecture=options.arch,
            d_in=data.widths[site],
            d_sae=expansion * data.widths[site],
            k=int(sparsity or 1) if options.arch in SPARSE else 1,
            k_aux=options.k_aux,
            l1_coefficient=sparsity if options.arch in ("l1", "gated") else None,
            target_l0=sparsity if options.arch == "jumprelu" else None,
            tied=options.tied,
            decoder_init=options.decoder_init,
            encoder_init=options.encoder_init,
            bias_init=options.bias_init,
            seed=seed,
            site=None if site is None else str(site),
            model=data.model,
            steps=None if site is None else tuple(data.steps),
        )
        made[member_name(config, expansion, sparsity)] = config
    return made


def member_name(config: SAEConfig, expansion: int, sparsity: float | None) -> str:
    """The folder of one autoencoder: `single.6.img_topk_k16_x8_s0`."""
    letter = {"l1": "l", "gated": "l", "jumprelu": "t"}.get(config.architecture, "k")
    asked = [] if sparsity is None else [f"{letter}{sparsity:g}"]
    return "_".join([config.site or "array", config.architecture, *asked, f"x{expansion}", f"s{config.seed}"])


def folder_of(options: TrainSAEOptions, data: TrainingData) -> Path:
    """The folder that the folders of all autoencoders lie in. Raises FluxIRError for a name that leads elsewhere."""
    name = options.name or data.name
    if name in (".", "..") or Path(name).name != name:
        raise FluxIRError(f"--name is the name of one folder: got {name!r}", hint="put the rest into --output_dir")
    return options.output_dir / name


def run_id(members: dict[str, SAEConfig]) -> str:
    """A name for the run that trains these, the same every time."""
    digest = hashlib.sha256(json.dumps(sorted(members)).encode()).hexdigest()[:8]
    first = next(iter(members))
    return f"{first}-{digest}" if len(members) == 1 else f"{first}+{len(members) - 1}-{digest}"


def conclude(report: Report, results: list[Result], *, measured_on: str) -> None:
    """One line per autoencoder, then times, memory and folders."""
    head = ("autoencoder", "features", "FVU", "L0", "dead")
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        without = result.cells_without_outliers()
        rows += [result.cells()] if without is None else [result.cells(), without]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    report.results.print(Text(f"measured on {measured_on}", style="bold"))
    for name, *cells in rows:
        told = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        report.results.print(Text(f"{name:<{widths[0]}}  {told}"))
    report.table("training", {result.folder.name: result.folder for result in results}, peak_memory())


def _device(options: TrainSAEOptions, ranks: Ranks) -> tuple[torch.device, str]:
    """The device of this process, and why: of several processes, each takes the GPU of its number."""
    if ranks.world_size == 1:
        placement = plan(torch.cuda.device_count(), device=options.device)
        return torch.device(placement.transformer), placement.reason
    device = ranks.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, f"one of {ranks.world_size} processes"
