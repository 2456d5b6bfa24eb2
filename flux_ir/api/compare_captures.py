"""Recorded runs of two models, of the same prompts and noise: how far apart every block is. No model is run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from flux_ir.activations.blocks import DrawnSource, SampledSource, Sampling, TokenSource, loras_of, quantize_of
from flux_ir.activations.source import open_source
from flux_ir.api.compared_runs import copied_run, draw_side_by_side, run_folders, write_differences
from flux_ir.api.model_comparison import SEED, STATE, ComparedModels, ComparisonFolder, Generated, check_blocks
from flux_ir.api.progress import Note, Watch, follow, phase
from flux_ir.errors import FluxIRError, counted
from flux_ir.features.contents import digest_of
from flux_ir.files import versions
from flux_ir.layout import is_run_folder
from flux_ir.lens.decode import read_picture
from flux_ir.lens.measures import json_number, psnr_db, relative_distance
from flux_ir.models.registry import get_spec, model_names
from flux_ir.sites import Site
from flux_ir.studies.likeness import Table, measure

STREAMS: tuple[Literal["img", "txt"], ...] = ("img", "txt")
SAME_NOISE = 0.01
"""The largest relative distance of noise that was only rounded to two dtypes."""


class Recorded(NamedTuple):
    """Captures of one model."""

    path: Path
    source: TokenSource
    samplings: Sequence[Sampling]

    def facts(self) -> dict[str, Any]:
        """What is known of the model."""
        return {
            "model": self.source.model,
            "captures": self.source.identity,
            "loras": loras_of(self.source),
            "quantize": quantize_of(self.source),
            "guidance": self.samplings[0].guidance if self._is_told_guidance() else None,
        }

    def _is_told_guidance(self) -> bool:
        return self.source.model not in model_names() or get_spec(str(self.source.model)).flux.guidance_embed

    def sites(self, stream: Literal["img", "txt"]) -> dict[str, Site]:
        """Outputs of blocks, by the block: `double.3`."""
        return {
            f"{site.kind}.{site.block}": Site(site.kind, site.block, stream)
            for site in self.source.sites
            if site.part is None and not site.per_prompt and site.stream in (stream, None)
        }


class Pair(NamedTuple):
    """The generation of one prompt and noise in both, and another noise of it in the first, if there is one."""

    shown: Generated
    first: int
    other: int
    yardstick: int | None


def compare_captures(
    captures: str | Path,
    other_captures: str | Path,
    *,
    cka_tokens: int,
    name: str | None,
    output_dir: Path,
    progress: Watch,
) -> ComparedModels:
    """What two runs, folders of runs or collections hold of the same prompts and noise, block by block and step.

    Where the first has a prompt from several seeds, another one of these is the yardstick.
    """
    first, other = open_recorded(captures), open_recorded(other_captures)
    check_models(first, other)
    pairs, steps = paired(first, other, progress)
    identity = {
        "first": first.facts(),
        "other": other.facts(),
        "modes": ["free"],
        "cka_tokens": cka_tokens,
        "captured_steps": steps,
        "versions": versions("torch"),
    }
    names = [str(one.source.model or "unknown") for one in (first, other)]
    folder = ComparisonFolder(output_dir / (name or f"{'-'.join(names)}-{digest_of([identity])[:8]}"), identity)
    folder.check()
    for pair in follow(progress, "compare", pairs, total=len(pairs)):
        if not folder.file(pair.shown).is_file():
            table = measured(first, other, pair, steps, cka_tokens)
            if pair == pairs[0]:
                keep_runs(folder, pair, first, other, table, steps)
            folder.keep(pair.shown, table, pictures(first, other, pair))
    with phase(progress, "files"):
        return folder.finish([pair.shown for pair in pairs], steps)


def open_recorded(path: str | Path) -> Recorded:
    """The captures at a path. Raises FluxIRError for what does not say how it was made."""
    source = open_source(path)
    if not isinstance(source, SampledSource) or not source.sites:
        raise FluxIRError(
            f"{path} does not say which prompts and noise it is of, so it cannot be compared",
            hint="name a run's folder, a folder of runs, or a collection",
        )
    return Recorded(Path(path), source, [source.sampling(number) for number in range(len(source.generations))])


def check_models(first: Recorded, other: Recorded) -> None:
    """Raises FluxIRError where blocks do not match in number or width, or no block was captured on both sides."""
    known = [one.source.model for one in (first, other) if one.source.model in model_names()]
    if len(known) == 2:
        check_blocks(known[0], get_spec(known[0]).flux, known[1], get_spec(known[1]).flux)
    common = {row: site for row, site in first.sites("img").items() if row in other.sites("img")}
    if not common:
        raise FluxIRError(
            f"{first.path} and {other.path} must hold image outputs of the same blocks: they have none in common",
            hint="capture both with the same --sites, such as double.*.img,single.*.img",
        )
    for row, site in common.items():
        widths = first.source.d(site), other.source.d(site)
        if widths[0] != widths[1]:
            raise FluxIRError(
                f"models are compared block by block: {row} of {first.path} has width {widths[0]}, and of "
                f"{other.path} {widths[1]}",
                hint="compare models of one family",
            )


def paired(first: Recorded, other: Recorded, progress: Watch) -> tuple[list[Pair], list[int]]:
    """The generations of the same prompt and noise, and the steps that both have. Raises FluxIRError for none."""

    def noise(sampling: Sampling) -> tuple[str, int, int, int]:
        return sampling.prompt, sampling.seed, sampling.width, sampling.height

    def told(sampling: Sampling) -> str:
        return f"{sampling.prompt!r} from seed {sampling.seed} at {sampling.width} x {sampling.height} px"

    there = {noise(sampling): number for number, sampling in enumerate(other.samplings)}
    common = [number for number, sampling in enumerate(first.samplings) if noise(sampling) in there]
    if not common:
        raise FluxIRError(
            f"{first.path} and {other.path} must share prompts and noise: the first has {told(first.samplings[0])}, "
            f"the other {told(other.samplings[0])}",
            hint="capture both with the same --prompt, --seed and size",
        )
    a, b = first.samplings[common[0]], other.samplings[there[noise(first.samplings[common[0]])]]
    steps = sorted(set(first.source.steps) & set(other.source.steps))
    if a.timesteps != b.timesteps or not steps:
        raise FluxIRError(
            f"{first.path} and {other.path} must have steps at the same flow times: the first has "
            f"{len(a.timesteps) - 1} of them, captured {_listed(first)}, the other {len(b.timesteps) - 1}, captured "
            f"{_listed(other)}",
            hint="capture both with the same --num_steps and --steps, and models whose schedules are alike",
        )
    if left := len(first.samplings) + len(other.samplings) - 2 * len(common):
        progress(Note(f"note: {counted(left, 'generation')} of one side alone are left out"))
    pairs = []
    for number in common:
        sampling = first.samplings[number]
        others = [
            candidate
            for candidate, one in enumerate(first.samplings)
            if one.prompt == sampling.prompt and one.seed != sampling.seed and noise(one)[2:] == noise(sampling)[2:]
        ]
        yardstick = min(others, default=None, key=lambda candidate: (candidate < number, candidate))
        seed = None if yardstick is None else first.samplings[yardstick].seed
        shown = Generated(sampling.prompt, sampling.seed, seed)
        pairs.append(Pair(shown, number, there[noise(sampling)], yardstick))
    check_noise(first, other, pairs[0])
    return pairs, steps


def _listed(one: Recorded) -> str:
    return ", ".join(map(str, one.source.steps)) or "none"


def check_noise(first: Recorded, other: Recorded, pair: Pair) -> None:
    """Raises FluxIRError where the first states are kept and are not the same noise."""
    states = [
        one.source.state(number, 0) if isinstance(one.source, SampledSource) and 0 in one.source.steps else None
        for one, number in ((first, pair.first), (other, pair.other))
    ]
    if states[0] is not None and states[1] is not None:
        distance = relative_distance(states[1], states[0])
        if distance > SAME_NOISE:
            raise FluxIRError(
                f"{first.path} and {other.path} begin with other noise, though their seeds are alike: the first states "
                f"are {distance:.1%} apart",
                hint="capture both again on one kind of device",
            )


def measured(first: Recorded, other: Recorded, pair: Pair, steps: Sequence[int], cka_tokens: int) -> Table:
    """Every block of one generation at every step, one at a time."""
    table, sides = Table(), [("free", other, pair.other)]
    if pair.yardstick is not None:
        sides.append((SEED, first, pair.yardstick))
    for run, captures, number in sides:
        for stream in STREAMS:
            mine, theirs = first.sites(stream), captures.sites(stream)
            for row in (row for row in mine if row in theirs):
                for step in steps:
                    a = first.source.read(pair.first, mine[row], step)
                    b = captures.source.read(number, theirs[row], step)
                    if stream == "txt" and len(a.values) != len(b.values):
                        break  # texts that were padded to two lengths
                    if not torch.equal(a.positions, b.positions):
                        raise FluxIRError(
                            f"{first.path} and {captures.path} must hold the same tokens: those of {row} differ",
                            hint="collect both with the same --tokens_per_image and --seed, or all tokens",
                        )
                    table.add(run, stream, row, measure(a.floats(), b.floats(), cka_tokens))
        for step in steps:
            states = [
                one.source.state(place, step) if isinstance(one.source, SampledSource) else None
                for one, place in ((first, pair.first), (captures, number))
            ]
            if states[0] is not None and states[1] is not None:
                table.add(run, "img", STATE, measure(states[0].float(), states[1].float(), cka_tokens))
    return table


def pictures(first: Recorded, other: Recorded, pair: Pair) -> dict[str, Any]:
    """How alike the finished pictures are, as they were saved, where both are there."""
    found: dict[str, Any] = {}
    reference = picture_path(first, pair.first)
    for run, captures, number in (("free", other, pair.other), (SEED, first, pair.yardstick)):
        path = None if number is None else picture_path(captures, number)
        if reference is not None and path is not None:
            likeness = psnr_db(read_picture(path), read_picture(reference))
            found[run] = {"psnr_db": json_number(likeness), "equal": likeness is None, "latent_distance": None}
    return found


def picture_path(recorded: Recorded, number: int) -> Path | None:
    """The picture of a generation, if it was kept."""
    source = recorded.source
    path = source.drawn(number).picture if isinstance(source, DrawnSource) else None
    return path if path is not None and path.is_file() else None


def keep_runs(
    folder: ComparisonFolder, pair: Pair, first: Recorded, other: Recorded, table: Table, steps: Sequence[int]
) -> None:
    """Copies of both runs for the explorer, without their captures, where both lie in run folders with pictures."""
    files = [one.source.generations[number].path for one, number in ((first, pair.first), (other, pair.other))]
    runs = [path.parents[1] for path in files if path is not None and is_run_folder(path.parents[1])]
    folders = run_folders(folder, pair.shown)
    if len(runs) < 2 or not all(copied_run(run, target) for run, target in zip(runs, folders, strict=True)):
        return
    rows = first.sites("img")
    likeness: Mapping[str, Any] = {
        row: dict(zip(steps, table.values["free"]["img"][row], strict=True))
        for row in rows
        if row in table.values["free"]["img"]
    }
    write_differences(folders, "free", likeness)
    if all(any(one.decoded_images("x0")) for one in folders):
        draw_side_by_side(folders)
