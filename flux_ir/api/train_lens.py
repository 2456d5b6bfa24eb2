"""A tuned lens from a collection: fitted block by block, judged on held-out prompts, with a table and a chart."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from flux_ir.activations.blocks import TokenSource
from flux_ir.activations.shard_source import ShardSource
from flux_ir.activations.source import open_source
from flux_ir.api.lens import lens_weights
from flux_ir.api.model_settings import ModelSettings, as_captured
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.collection import weights_digest
from flux_ir.collecting.embeddings import embedding_name
from flux_ir.errors import FluxIRError
from flux_ir.files import read_json, versions, write_json
from flux_ir.lens.measures import json_number
from flux_ir.lens.readout import image_outputs
from flux_ir.lens.tuned import LENS_FILE, TunedLens, image_sites
from flux_ir.lens.tuned_fit import FitData, Fitted, SiteErrors, fit_map, judge_mean, judge_site, split_prompts
from flux_ir.models.checkpoints.load import stream_flux
from flux_ir.sae.evaluation.plots import number_grid
from flux_ir.sites import Site

INPUT = "input"
"""What a map from the network's input, img_in of the noisy latent, is called among the sites."""
MEAN = "mean velocity"


class TrainedLens(NamedTuple):
    """What `train_lens` found, and where it lies."""

    folder: Path
    lens: Path
    """The maps: `read_lens` and `flux-ir lens --tuned_lens` take this file, or the folder."""
    result: Mapping[str, Any]
    """What is in evaluation.json: errors by row and step."""


def train_lens(
    captures: str | Path,
    *,
    held_out: float = 0.2,
    name: str | None = None,
    device: str | None = None,
    checkpoint: str | Path | None = None,
    output_dir: str | Path = "lenses",
    progress: Watch = unwatched,
) -> TrainedLens:
    """Fit a tuned lens to a collection of block outputs: an affine map per block and step, by ridge regression.

    `captures` is a collection of flux-ir collect that has the image tokens of all blocks to be read and of the last
    one; the share `held_out` of its prompts is only judged on. The folder `output_dir`/`name`, named as the collection
    by default, gets the lens, evaluation.json and two charts: errors by block and step, of the lens and of readings
    that know less, and what a map is worth at other steps. Computed in float32, sums in float64; no block is run.

    Raises FluxIRError for what a user can mend.
    """
    if not 0 < held_out < 1:
        raise FluxIRError(f"--held_out must be between 0 and 1: got {held_out}", hint="pass 0.2 for a fifth")
    source = open_source(captures)
    is_collection = isinstance(source, ShardSource) and (Path(captures) / "collection.json").is_file()
    if not isinstance(source, ShardSource) or source.model is None or not is_collection:
        raise FluxIRError(
            f"a lens is fitted to what flux-ir collect made of a model: {captures} is something else",
            hint="flux-ir collect --sites 'double.*.img,single.*.img'",
        )
    settings = as_captured(ModelSettings(model=source.model, device=device, checkpoint=checkpoint), source)
    machine = settings.settle_machine(recorded=torch.float32)
    made = read_json(Path(captures) / "collection.json")["settings"]
    suite = settings.suite(machine, progress, autoencoder=bool(made.get("save_images")))
    if weights_digest(suite.source, autoencoder=bool(made.get("save_images"))) != made["weights"]:
        raise FluxIRError(
            f"{captures} was collected with other weights of {source.model}", hint="name those with --checkpoint"
        )
    sites, last = fitted_sites(source, suite.spec.flux.depth_single_blocks, captures)
    sampling = source.sampling(0)
    data = FitData(
        source,
        split_prompts([one.prompt for one in source.generations], held_out),
        pooled_of(Path(captures), source),
        sampling.timesteps,
        sampling.guidance,
        last,
    )
    with phase(progress, "load"):
        model = stream_flux(
            suite.spec, suite.source.transformer, machine.placement.transformer, torch.float32, loras=suite.source.loras
        )
    steps, fitted, judged = list(source.steps), {}, {}
    for site in follow(progress, "block", iter([None, *sites]), total=len(sites) + 1):
        fitted[site] = {step: fit_map(data, model, site, step) for step in steps}
        judged[site] = judge_site(data, model, site, steps, {step: one.added for step, one in fitted[site].items()})
        fitted[site] = {step: one.on_cpu() for step, one in fitted[site].items()}  # a GPU holds those of one block
    parts = {part: data.parts.count(part) for part in ("fit", "choose", "held_out")}
    described = {
        "model": suite.spec.name,
        "weights": lens_weights(suite.source),
        "timesteps": list(sampling.timesteps),
        "guidance": sampling.guidance,
        "width": sampling.width,
        "height": sampling.height,
        "captures": source.identity,
        "held_out": held_out,
        "generations": parts,
        "versions": versions("torch"),
    }
    maps = {(site, step): fitted[site][step].added for site, step in product(sites, steps)}
    folder = Path(output_dir) / (Path(captures).resolve().name if name is None else name)
    TunedLens(maps, described).save(folder / LENS_FILE)
    result = evaluation(described, steps, fitted, judged, judge_mean(data, model, steps))
    write_json(folder / "evaluation.json", result)
    draw(folder, result)
    progress(Note(f"note: judged on {parts['held_out']} generations of other prompts"))
    return TrainedLens(folder, folder / LENS_FILE, result)


def fitted_sites(source: TokenSource, single_blocks: int, captures: str | Path) -> tuple[list[Site], Site]:
    """The blocks of a collection, by their image tokens, and the last one. Raises FluxIRError without that one."""
    sites, last = image_sites(image_outputs(source.sites)), Site("single", single_blocks - 1, "img")
    if last not in sites:
        raise FluxIRError(
            f"a lens is fitted to what the last block puts out, and {captures} does not hold {last}",
            hint="collect all blocks: --sites 'double.*.img,single.*.img'",
        )
    return sites, last


def pooled_of(captures: Path, source: TokenSource) -> torch.Tensor:
    """The pooled text of every generation, from the embeddings a collection keeps: [generations, pooled]."""
    known: dict[str, torch.Tensor] = {}
    for one in source.generations:
        if one.prompt not in known:
            file = captures / embedding_name(one.prompt)
            try:
                with safe_open(file, framework="pt") as opened:
                    known[one.prompt] = opened.get_tensor("y")[0].float()
            except (OSError, SafetensorError) as error:
                raise FluxIRError(
                    f"the embedding of a prompt cannot be read: {file}", hint="run flux-ir collect again: it repairs it"
                ) from error
    return torch.stack([known[one.prompt] for one in source.generations])


# ---- What was found


def evaluation(
    described: Mapping[str, Any],
    steps: Sequence[int],
    fitted: Mapping[Site | None, Mapping[int, Fitted]],
    judged: Mapping[Site | None, SiteErrors],
    mean: Sequence[float],
) -> dict[str, Any]:
    """The content of evaluation.json: relative errors of the velocity by row, in the order of `steps`."""

    def numbers(values: Sequence[float]) -> list[float | str | None]:
        return [json_number(value) for value in values]

    blocks = {str(site): errors for site, errors in judged.items() if site is not None}
    return {
        "settings": dict(described),
        "steps": list(steps),
        "error": "sum |v_hat - v|^2 / sum |v - mean v|^2 over image tokens of held-out prompts",
        "plain": {site: numbers(errors.plain) for site, errors in blocks.items()},
        "tuned": {site: numbers(errors.tuned) for site, errors in blocks.items()},
        INPUT: numbers(judged[None].tuned),
        MEAN: numbers(mean),
        "transfer": {site: [numbers(row) for row in errors.transfer] for site, errors in blocks.items()},
        "ridge": {
            INPUT if site is None else str(site): [of_steps[step].strength for step in steps]
            for site, of_steps in fitted.items()
        },
    }


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Every reading that was judged, with its errors by step: baselines, then each block plain and tuned."""
    rows = [(MEAN, result[MEAN]), (f"{INPUT}, tuned", result[INPUT])]
    for site in result["plain"]:
        rows += [(f"{site}, plain", result["plain"][site]), (f"{site}, tuned", result["tuned"][site])]
    return rows


def transfer_of(result: Mapping[str, Any]) -> list[list[float]]:
    """[step fitted at][step judged at]: the median over all blocks but the last, which has no map."""
    tables = torch.tensor([result["transfer"][site] for site in list(result["transfer"])[:-1]], dtype=torch.float64)
    return tables.quantile(0.5, dim=0).tolist()


def draw(folder: Path, result: Mapping[str, Any]) -> None:
    """errors.png: all rows by step; transfer.png: maps of one step at another, if there are several."""
    rows, steps = rows_of(result), [f"step {step}" for step in result["steps"]]
    generations = result["settings"]["generations"]["held_out"]
    number_grid(
        folder / "errors.png",
        [name for name, _ in rows],
        steps,
        [values for _, values in rows],
        "Error of the velocity, by block and lens",
        subtitle=f"relative to its variance, {generations} held-out generations: 0 exact, 1 a constant",
        low=0.0,
        high=1.0,
    )
    if len(steps) > 1 and len(result["transfer"]) > 1:
        number_grid(
            folder / "transfer.png",
            [f"fitted at {step}" for step in steps],
            [f"judged at {step}" for step in steps],
            transfer_of(result),
            "Maps of one step used at another",
            subtitle="error of the velocity, median over blocks",
            low=0.0,
            high=1.0,
        )
