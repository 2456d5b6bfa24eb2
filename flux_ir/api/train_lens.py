"""A fitted lens from a collection, tuned or Jacobian: judged on held-out prompts, with a table and charts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flux_ir.activations.blocks import TokenSource
from flux_ir.activations.shard_source import ShardSource
from flux_ir.activations.source import open_source
from flux_ir.api.arguments import check_words
from flux_ir.api.lens import lens_weights
from flux_ir.api.model_settings import Machine, ModelSettings, as_captured
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.collection import weights_digest
from flux_ir.collecting.embeddings import embedding_name
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, read_json, versions, write_json
from flux_ir.lens.fitted import FittedLens, image_sites
from flux_ir.lens.jacobian import Computed, JacobianLens, compute_jacobians
from flux_ir.lens.judge import LensData, judge_mean, plain, relative_errors, split_prompts
from flux_ir.lens.measures import json_number
from flux_ir.lens.readout import image_outputs
from flux_ir.lens.tuned import FittedMap, TunedLens, fit_map
from flux_ir.models.architecture import Transformer
from flux_ir.models.checkpoints.load import stream_flux
from flux_ir.models.suite import Suite
from flux_ir.plots.charts import BlockCurve, curves_by_block
from flux_ir.plots.grids import map_grid, number_grid
from flux_ir.sampling.generate import Inputs
from flux_ir.sampling.latents import TOKEN_PX, image_ids, text_ids
from flux_ir.sites import Site

LensKind = Literal["tuned", "jacobian"]
TOKENS_AT_ONCE = 512
"""Image tokens of one forward that keeps its graph; at least one picture."""
INPUT = "input"
"""What a map from the network's input, img_in of the noisy latent, is called among the sites."""
MEAN = "mean velocity"
READINGS = {
    "plain": "plain",
    "tuned": "tuned",
    "jacobian": "Jacobian, same token",
    "jacobian_summed": "Jacobian, summed",
}
"""The rows of evaluation.json that are there for every block, and what charts call them."""


class TrainedLens(NamedTuple):
    """What `train_lens` found, and where it lies."""

    folder: Path
    lens: Path
    """The lens: `read_lens` and `flux-ir lens --fitted_lens` take this file, or the folder."""
    result: Mapping[str, Any]
    """What is in evaluation.json: errors by row and step, of all kinds of lens that the folder holds."""


def train_lens(
    captures: str | Path,
    *,
    kind: LensKind = "tuned",
    gradients: int = 16,
    patch: Sequence[int] | None = None,
    held_out: float = 0.2,
    name: str | None = None,
    device: str | None = None,
    checkpoint: str | Path | None = None,
    output_dir: str | Path = "lenses",
    progress: Watch = unwatched,
) -> TrainedLens:
    """Fit a lens to a collection of block outputs, and judge it on held-out prompts.

    `kind` "tuned" fits an affine map per block and step by ridge regression; no block is run. "jacobian" averages the
    derivative of the velocity by each block's output over `gradients` generations, each with a prompt of its own, from
    their stored states: the whole network is run, and 192 gradients of every forward are taken (64 channels; two
    versions and a receptive field). `patch` is the one whose receptive fields are drawn: its row and column on the grid
    of image tokens, None that in the middle.

    `captures` is a collection of flux-ir collect that has the image tokens of all blocks to be read and of the last
    one; the share `held_out` of its prompts is only judged on. The folder `output_dir`/`name`, named as the collection
    by default, gets the lens, evaluation.json and charts, and may hold both kinds: errors by block and step, of the
    lenses and of readings that know less. Computed in float32, sums in float64.

    Raises FluxIRError for what a user can mend.
    """
    check_words(train_lens, {"kind": kind})
    if not 0 < held_out < 1:
        raise FluxIRError(f"--held_out must be between 0 and 1: got {held_out}", hint="pass 0.2 for a fifth")
    if gradients < 1:
        raise FluxIRError(f"--gradients must be 1 or more: got {gradients}", hint="16 generations, for example")
    begun = begin(captures, held_out, device, checkpoint, progress)
    folder = Path(output_dir) / (Path(captures).resolve().name if name is None else name)
    earlier = earlier_result(folder, begun.described, kind)
    lens: FittedLens
    if kind == "tuned":
        lens, found = fit_tuned(begun, progress)
    else:
        lens, found = fit_jacobian(begun, gradients, token_at(begun, patch), folder, progress)
    path = lens.save(folder)
    result = {**earlier, **found}
    write_json(folder / "evaluation.json", result)
    draw(folder, result)
    judged = begun.described["generations"]["held_out"]
    progress(Note(f"note: judged on {judged} generations of other prompts"))
    return TrainedLens(folder, path, result)


# ---- What is fitted to


@dataclass(frozen=True)
class Begun:
    """A collection and the model that it was made with."""

    captures: Path
    suite: Suite
    machine: Machine
    data: LensData
    sites: Sequence[Site]
    steps: Sequence[int]
    described: Mapping[str, Any]
    """The settings of every lens that is fitted to it."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.described["height"] // TOKEN_PX, self.described["width"] // TOKEN_PX


def begin(
    captures: str | Path, held_out: float, device: str | None, checkpoint: str | Path | None, progress: Watch
) -> Begun:
    """Opens the collection and finds its weights. Raises FluxIRError where a lens cannot be fitted to it."""
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
    parts = split_prompts([one.prompt for one in source.generations], held_out)
    pooled = pooled_of(Path(captures), source)
    data = LensData(source, parts, pooled, sampling.timesteps, sampling.guidance, last)
    described = {
        "model": suite.spec.name,
        "weights": lens_weights(suite.source),
        "timesteps": list(sampling.timesteps),
        "guidance": sampling.guidance,
        "width": sampling.width,
        "height": sampling.height,
        "captures": source.identity,
        "held_out": held_out,
        "generations": {part: parts.count(part) for part in ("fit", "choose", "held_out")},
        "versions": versions("torch"),
    }
    return Begun(Path(captures), suite, machine, data, sites, list(source.steps), described)


def fitted_sites(source: TokenSource, single_blocks: int, captures: str | Path) -> tuple[list[Site], Site]:
    """The blocks of a collection, by their image tokens, and the last one. Raises FluxIRError without that one."""
    sites, last = image_sites(image_outputs(source.sites)), Site("single", single_blocks - 1, "img")
    if last not in sites:
        raise FluxIRError(
            f"a lens is fitted to what the last block puts out, and {captures} does not hold {last}",
            hint="collect all blocks: --sites 'double.*.img,single.*.img'",
        )
    return sites, last


def text_of(captures: Path, prompt: str, part: Literal["txt", "y"]) -> torch.Tensor:
    """What T5 (`txt`) or CLIP (`y`) made of a prompt, from the embeddings that a collection keeps: float32 [1, ...]."""
    file = captures / embedding_name(prompt)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(part).float()
    except (OSError, SafetensorError) as error:
        raise FluxIRError(
            f"the embedding of a prompt cannot be read: {file}", hint="run flux-ir collect again: it repairs it"
        ) from error


def pooled_of(captures: Path, source: TokenSource) -> torch.Tensor:
    """The pooled text of every generation: [generations, pooled]."""
    prompts = [one.prompt for one in source.generations]
    known = {prompt: text_of(captures, prompt, "y") for prompt in dict.fromkeys(prompts)}
    return torch.cat([known[prompt] for prompt in prompts])


def earlier_result(folder: Path, described: Mapping[str, Any], kind: LensKind) -> dict[str, Any]:
    """What evaluation.json says of the other kind. Raises FluxIRError if that was fitted to something else."""
    other = JacobianLens if kind == "tuned" else TunedLens
    if not (folder / other.file_name).exists() or not (folder / "evaluation.json").exists():
        return {}
    result = read_json(folder / "evaluation.json")
    for key, value in described.items():
        if key != "versions" and result["settings"].get(key) != value:
            raise FluxIRError(
                f"{folder} holds a {other.kind} lens of another {key}: {result['settings'].get(key)}, here {value}",
                hint="name another folder with --name, so that both lenses in a folder are judged on the same",
            )
    return result


# ---- The two kinds


def fit_tuned(begun: Begun, progress: Watch) -> tuple[TunedLens, dict[str, Any]]:
    """The maps of all blocks, and what was found: errors of every map at every step."""
    data, steps = begun.data, begun.steps
    model = layers_around_the_blocks(begun, progress)
    fitted: dict[Site | None, dict[int, FittedMap]] = {}
    errors: dict[Site | None, list[list[float]]] = {}  # by step judged at: plain, then the map of every step
    for site in follow(progress, "block", iter([None, *begun.sites]), total=len(begun.sites) + 1):
        maps = [fit_map(data, model, site, step) for step in steps]
        readings = [plain(model), *(one.through(model) for one in maps)]
        errors[site] = [relative_errors(data, model, site, step, readings) for step in steps]
        # A GPU holds the maps of one block.
        fitted[site] = {step: one.on_cpu() for step, one in zip(steps, maps, strict=True)}
    places = product(begun.sites, steps)
    lens = TunedLens(begun.described, {(site, step): fitted[site][step].added for site, step in places})
    own = {site: [row[1 + number] for number, row in enumerate(rows)] for site, rows in errors.items()}
    found = {
        **judged_rows(begun, {site: [row[0] for row in errors[site]] for site in begun.sites}, model),
        "tuned": {str(site): numbers(own[site]) for site in begun.sites},
        INPUT: numbers(own[None]),
        "transfer": {
            str(site): [numbers([row[1 + at] for row in errors[site]]) for at in range(len(steps))]
            for site in begun.sites
        },
        "ridge": {
            INPUT if site is None else str(site): [of_steps[step].strength for step in steps]
            for site, of_steps in fitted.items()
        },
    }
    return lens, found


def fit_jacobian(
    begun: Begun, gradients: int, token: int, folder: Path, progress: Watch
) -> tuple[JacobianLens, dict[str, Any]]:
    """The linearisations of all blocks, and what was found. The folder gets the receptive fields of a token."""
    data, images = begun.data, generations_for_gradients(begun.data, gradients)
    generator = torch.Generator().manual_seed(0)
    computed: dict[int, Computed] = {}
    with begun.suite.transformer() as model:
        for step in follow(progress, "gradients", iter(begun.steps), total=len(begun.steps)):
            batches = states_of(begun, images, step, model)
            computed[step] = compute_jacobians(data, model, begun.sites, step, batches, token, generator)
        maps = {(site, step): computed[step].maps[site] for site, step in product(begun.sites, begun.steps)}
        lens = JacobianLens({**begun.described, "gradients": len(images)}, maps)
        errors: dict[Site, list[list[float]]] = {}
        for site in follow(progress, "block", iter(begun.sites), total=len(begun.sites)):
            errors[site] = []
            for step in begun.steps:
                one = maps[site, step].on(model.img_in.weight.device)
                readings = [plain(model), one.through("same"), one.through("summed")]
                errors[site].append(relative_errors(data, model, site, step, readings))
        found = judged_rows(begun, {site: [row[0] for row in rows] for site, rows in errors.items()}, model)
    for number, name in enumerate(("jacobian", "jacobian_summed"), start=1):
        found[name] = {str(site): numbers([row[number] for row in rows]) for site, rows in errors.items()}
    found["jacobian_standard_error"] = {
        version: {
            str(site): [computed[step].relative_errors[site][version] for step in begun.steps] for site in begun.sites
        }
        for version in ("same", "summed")
    }
    found["gradients"] = len(images)
    write_fields(folder, begun, computed, token)
    return lens, found


def layers_around_the_blocks(begun: Begun, progress: Watch) -> Transformer:
    """The transformer in float32, none of whose blocks is read: 23.8 GB for FLUX.1."""
    source, placement = begun.suite.source, begun.machine.placement
    with phase(progress, "load"):
        return stream_flux(
            begun.suite.spec, source.transformer, placement.transformer, torch.float32, loras=source.loras
        )


def generations_for_gradients(data: LensData, count: int) -> list[int]:
    """Training generations to take gradients of: of different prompts, evenly spaced; fewer if there are fewer."""
    first_of: dict[str, int] = {}
    for number, (one, part) in enumerate(zip(data.source.generations, data.parts, strict=True)):
        if part != "held_out":
            first_of.setdefault(one.prompt, number)
    images = list(first_of.values())
    count = min(count, len(images))
    return [images[number * len(images) // count] for number in range(count)]


def states_of(begun: Begun, images: Sequence[int], step: int, model: Transformer) -> Iterator[Inputs]:
    """What the transformer is called with at a step of these generations, some at a time, from their stored states.

    Raises FluxIRError for a collection that keeps only some tokens.
    """
    source, (rows, columns) = begun.data.source, begun.grid
    at_once = max(1, TOKENS_AT_ONCE // (rows * columns))
    for first in range(0, len(images), at_once):
        some = images[first : first + at_once]
        states = [source.state(image, step) for image in some]
        if any(state is None for state in states):
            raise FluxIRError(
                f"gradients need the whole state of a step, and {begun.captures} keeps only some tokens",
                hint="collect again with all image tokens",
            )
        prompts = [source.generations[image].prompt for image in some]
        txt = torch.cat([text_of(begun.captures, prompt, "txt") for prompt in prompts])
        device = model.img_in.weight.device
        yield Inputs(
            img=torch.stack([state for state in states if state is not None]).float().to(device),
            img_ids=image_ids(len(some), begun.described["height"], begun.described["width"]).to(device),
            txt=txt.to(device),
            txt_ids=text_ids(*txt.shape[:2]).to(device),
            y=begun.data.pooled[some].to(device),
        )


def token_at(begun: Begun, patch: Sequence[int] | None) -> int:
    """The number of the image token at a row and column, None in the middle. Raises FluxIRError outside the grid."""
    rows, columns = begun.grid
    patch = (rows // 2, columns // 2) if patch is None else tuple(patch)
    if len(patch) != 2:
        raise FluxIRError(
            f"--patch is a row and a column: got {patch}", hint=f"{rows // 2},{columns // 2} is in the middle"
        )
    row, column = patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise FluxIRError(
            f"--patch must be a row below {rows} and a column below {columns}: got {row},{column}",
            hint=f"{rows // 2},{columns // 2} is in the middle",
        )
    return row * columns + column


# ---- What was found


def numbers(values: Sequence[float]) -> list[float | str | None]:
    """As JSON has them."""
    return [json_number(value) for value in values]


def judged_rows(begun: Begun, of_plain: Mapping[Site, Sequence[float]], model: Transformer) -> dict[str, Any]:
    """What evaluation.json says whatever kind of lens was fitted: relative errors by row, in the order of `steps`."""
    return {
        "settings": dict(begun.described),
        "steps": list(begun.steps),
        "error": "sum |v_hat - v|^2 / sum |v - mean v|^2 over image tokens of held-out prompts",
        "plain": {str(site): numbers(errors) for site, errors in of_plain.items()},
        MEAN: numbers(judge_mean(begun.data, model, begun.steps)),
    }


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Every reading that was judged, with its errors by step: baselines, then each block through each lens."""
    rows = [(MEAN, result[MEAN])]
    if INPUT in result:
        rows.append((f"{INPUT}, tuned", result[INPUT]))
    for site in result["plain"]:
        rows += [(f"{site}, {words}", result[name][site]) for name, words in READINGS.items() if name in result]
    return rows


def transfer_of(result: Mapping[str, Any]) -> list[list[float]] | None:
    """[step fitted at][step judged at]: the median over all blocks but the last, which has no map.

    None without a tuned lens, or where there is one step or block.
    """
    if len(result["steps"]) < 2 or len(result.get("transfer", {})) < 2:
        return None
    tables = torch.tensor([result["transfer"][site] for site in list(result["transfer"])[:-1]], dtype=torch.float64)
    return tables.quantile(0.5, dim=0).tolist()


def draw(folder: Path, result: Mapping[str, Any]) -> None:
    """errors.png: all rows by step; curves.png: by block; transfer.png: maps of one step at another, if there are."""
    rows, steps = rows_of(result), [f"step {step}" for step in result["steps"]]
    generations = result["settings"]["generations"]["held_out"]
    subtitle = f"relative to its variance, {generations} held-out generations: 0 exact, 1 a constant"
    title = "Error of the velocity, by block and lens"
    errors = [values for _, values in rows]
    number_grid(
        folder / "errors.png", [name for name, _ in rows], steps, errors, title, subtitle=subtitle, low=0, high=1
    )
    curves = [
        BlockCurve(words, [result[name][site] for site in result["plain"]])
        for name, words in READINGS.items()
        if name in result
    ]
    levels = {MEAN: result[MEAN]} | ({"map from the input": result[INPUT]} if INPUT in result else {})
    curves_by_block(
        folder / "curves.png", list(result["plain"]), steps, curves, title, subtitle=subtitle, levels=levels
    )
    if (transfer := transfer_of(result)) is not None:
        number_grid(
            folder / "transfer.png",
            [f"fitted at {step}" for step in steps],
            [f"judged at {step}" for step in steps],
            transfer,
            "Maps of one step used at another",
            subtitle="error of the velocity, median over blocks",
            low=0.0,
            high=1.0,
        )


def write_fields(folder: Path, begun: Begun, computed: Mapping[int, Computed], token: int) -> None:
    """receptive_fields.safetensors and .png: what each block's tokens do to the velocity of one patch."""
    rows, columns = begun.grid
    fields = {
        (site, step): computed[step].fields[site].float().reshape(rows, columns)
        for site, step in product(begun.sites, begun.steps)
    }
    row, column = divmod(token, columns)
    with complete_file(folder / "receptive_fields.safetensors") as beside:
        tensors = {f"{site}/step_{step}": field.contiguous() for (site, step), field in fields.items()}
        save_file(tensors, beside, metadata={"row": str(row), "column": str(column)})
    map_grid(
        folder / "receptive_fields.png",
        [str(site) for site in begun.sites],
        [f"step {step}" for step in begun.steps],
        [[fields[site, step].numpy() for step in begun.steps] for site in begun.sites],
        f"Receptive field of the patch at row {row}, column {column}",
        subtitle="|d velocity / d block output|; below: the patch's own share of the squares",
        marked=(row, column),
    )
