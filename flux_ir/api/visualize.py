"""From the decoded pictures of runs to a film, a contact sheet or a page. No torch here: it begins at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flux_ir.api.arguments import check_words
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import decoded_runs
from flux_ir.explorer.page import write_explorer
from flux_ir.layout import Lens, RunFolder, find_run
from flux_ir.visualize.animate import write_gif, write_mp4
from flux_ir.visualize.film import Film
from flux_ir.visualize.frames import (
    Choice,
    Frame,
    choose_cells,
    find_cells,
    in_ranges,
    make_frames,
    run_facts,
)
from flux_ir.visualize.pages import write_pages
from flux_ir.visualize.palette import film_palette, thumbnail_side
from flux_ir.visualize.pictures import PictureReader

EXPLORER_PAGE = "explorer.html"
MOST_GIF_FPS = 50
LONGEST_STEPS_IN_NAME = 60

READINGS: dict[Lens, str] = {
    "euler": "the state each block would go to (euler)",
    "x0": "the image each block believes in (x0)",
    "tuned": "the image each block believes in, through a tuned lens (tuned)",
    "jacobian": "the image each block points at, by the mean Jacobian of its own tokens (jacobian)",
    "jacobian_summed": "the image each block points at, by the mean Jacobian summed over tokens (jacobian_summed)",
}


class ShownRuns(NamedTuple):
    """What is shown: one run, or two side by side, each with its metadata."""

    folders: list[RunFolder]
    facts: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class VisualizationSettings:
    """What is shown and how; see `create_visualization`."""

    generation_id: str
    compare: str | None = None
    lens: Lens = "euler"
    block_type: Literal["double", "single"] | None = None
    max_blocks: int | None = None
    steps: tuple[int, ...] | None = None
    skip_broken: bool = False
    output_format: Literal["gif", "mp4", "png", "html"] = "gif"
    fps: float = 2.0
    order: Literal["depth", "steps"] = "depth"
    font_size: int = 24
    output_dir: Path = Path("output")


class Visualization(NamedTuple):
    """What was drawn."""

    generation_id: str
    files: dict[str, Path]
    """What was written, by what it is: "film", "page", or "page 1, 400 x 300 px" and so on for sheets."""
    frames: int
    """How many a film has; 0 for anything else."""
    size_px: tuple[int, int]
    """Width and height of a film's frames."""
    seconds: float
    left_out: dict[Path, str]
    """Pictures that were passed over with `skip_broken`, and why."""


def create_visualization(
    generation_id: str = "latest",
    *,
    compare: str | None = None,
    lens: Lens = "euler",
    block_type: Literal["double", "single"] | None = None,
    max_blocks: int | None = None,
    steps: Iterable[int] | None = None,
    skip_broken: bool = False,
    output_format: Literal["gif", "mp4", "png", "html"] = "gif",
    fps: float = 2.0,
    order: Literal["depth", "steps"] = "depth",
    font_size: int = 24,
    output_dir: str | Path = "output",
    progress: Watch = unwatched,
) -> Visualization:
    """Make a film, contact sheets or a page of what each block would have drawn, in the folder of the run.

    The run is `output_dir`/`generation_id`, or the newest there; `compare` is a second one, shown beside it. `lens`,
    `block_type`, `max_blocks` and `steps` choose the pictures, which were decoded before; `order` depth shows all
    blocks of a step, then the next step, and steps one block through all steps. `skip_broken` goes on without
    pictures that are missing or broken.

    Raises FluxIRError for a run that is not there, for pictures that are missing or broken, and for steps that were
    not decoded.
    """
    settings = VisualizationSettings(
        generation_id=generation_id,
        compare=compare,
        lens=lens,
        block_type=block_type,
        max_blocks=max_blocks,
        steps=None if steps is None else tuple(steps),
        skip_broken=skip_broken,
        output_format=output_format,
        fps=fps,
        order=order,
        font_size=font_size,
        output_dir=Path(output_dir),
    )
    return draw(settings, progress)


def explore(
    generation_ids: str | Sequence[str] | None = None,
    *,
    output_dir: str | Path = "output",
    single_file: bool = False,
    progress: Watch = unwatched,
) -> Path:
    """Write explorer.html beside the runs: every decoded picture in a grid of blocks by steps; gives its path.

    `generation_ids` is one or several; None shows every run with decoded pictures. With `single_file` all pictures are
    inside the page. Raises FluxIRError for a run that is not there or has no decoded pictures.
    """
    folder = Path(output_dir)
    given = [generation_ids] if isinstance(generation_ids, str) else generation_ids
    ids = decoded_runs(folder) if given is None else list(given)
    more = ", ..." if len(ids) > 4 else ""
    progress(Note(f"thumbnails of {len(ids)} {'run' if len(ids) == 1 else 'runs'}: {', '.join(ids[:4])}{more}"))
    return write_explorer(folder, ids, folder / EXPLORER_PAGE, single_file=single_file)


def draw(settings: VisualizationSettings, progress: Watch = unwatched) -> Visualization:
    """What `create_visualization` does, with its settings in one object."""
    check_words(VisualizationSettings, vars(settings))
    if settings.fps <= 0:
        raise FluxIRError(f"--fps must be above 0: got {settings.fps}", hint="pass 2 for two pictures per second")
    if settings.output_format == "gif" and settings.fps > MOST_GIF_FPS:
        raise FluxIRError(
            f"a GIF shows at most {MOST_GIF_FPS} pictures per second: got --fps {settings.fps}",
            hint="viewers slow down faster ones; use --output_format mp4",
        )
    runs = find_shown_runs(settings)
    target = runs.folders[0].path / file_name(settings, runs.folders)
    nothing = Visualization(runs.folders[0].generation_id, {}, 0, (0, 0), 0.0, {})
    if settings.output_format == "html":
        with phase(progress, "page"):
            ids = [folder.generation_id for folder in runs.folders]
            return nothing._replace(files={"page": write_explorer(settings.output_dir, ids, target)})
    reader = PictureReader(skip_broken=settings.skip_broken)
    frames = find_frames(settings, runs, progress)
    if target.exists():
        progress(Note(f"note: {target} is replaced"))
    draw_as = draw_pages if settings.output_format == "png" else draw_film
    return draw_as(nothing, settings, runs, frames, reader, target, progress)._replace(left_out=reader.left_out)


def find_shown_runs(settings: VisualizationSettings) -> ShownRuns:
    """The runs to show. Raises FluxIRError if one does not exist, or if a run is compared with itself."""
    names = [settings.generation_id] + ([] if settings.compare is None else [settings.compare])
    folders = [find_run(settings.output_dir, name) for name in names]
    if len({folder.generation_id for folder in folders}) < len(folders):
        raise FluxIRError(
            f"--compare must be another generation: both are {folders[0].generation_id}", hint="leave --compare out"
        )
    return ShownRuns(folders, [run_facts(folder) for folder in folders])


def find_frames(settings: VisualizationSettings, runs: ShownRuns, progress: Watch) -> list[Frame]:
    """The frames in the order to show them: of two runs, the cells that both have."""
    cells = [find_cells(folder, settings.lens) for folder in runs.folders]
    common = sorted(set.intersection(*map(set, cells)))
    if not common:
        raise FluxIRError("the two generations must have a block and a step in common: they have none")
    if alone := len(set.union(*map(set, cells))) - len(common):
        progress(Note(f"note: {alone} pictures of blocks and steps that only one of the two has are not shown"))
    choice = Choice(settings.block_type, settings.max_blocks, settings.steps, settings.order)
    return make_frames(runs.folders, settings.lens, choose_cells(common, choice))


def file_name(settings: VisualizationSettings, folders: Sequence[RunFolder]) -> str:
    """`visualization_{id}[_{type}].{format}`, with what else sets it apart from other films of the same run."""
    parts = ["visualization", folders[0].generation_id]
    if settings.block_type is not None:
        parts.append(settings.block_type)
    if settings.lens != "euler":
        parts.append(settings.lens)
    parts += [f"vs_{folder.generation_id}" for folder in folders[1:]]
    if settings.order == "steps":
        parts.append("by_block")
    if settings.steps is not None:
        steps = sorted(set(settings.steps))
        named = in_ranges(steps)
        short = named if len(named) <= LONGEST_STEPS_IN_NAME else f"{len(steps)}_of_{steps[0]}-{steps[-1]}"
        parts.append(f"steps_{short}")
    return f"{'_'.join(parts)}.{settings.output_format}"


def draw_film(
    begun: Visualization,
    settings: VisualizationSettings,
    runs: ShownRuns,
    frames: Sequence[Frame],
    reader: PictureReader,
    target: Path,
    progress: Watch,
) -> Visualization:
    """Write the film."""
    labels = names_of(runs) if len(runs.folders) > 1 else []
    film = Film(frames, reader, font_size=settings.font_size, labels=labels)
    if settings.output_format == "gif":
        thumbnails = film.thumbnails(thumbnail_side(len(film) * len(film.panels)))
        palette = film_palette(follow(progress, "colours", thumbnails, total=len(film) * len(film.panels)))
        count = write_gif(follow(progress, "film", film, total=len(film)), palette, target, settings.fps)
    else:
        count = write_mp4(follow(progress, "film", film, total=len(film)), target, settings.fps)
    width, height = film.size_px
    seconds = count / settings.fps
    return begun._replace(files={"film": target}, frames=count, size_px=(width, height), seconds=seconds)


def draw_pages(
    begun: Visualization,
    settings: VisualizationSettings,
    runs: ShownRuns,
    frames: Sequence[Frame],
    reader: PictureReader,
    target: Path,
    progress: Watch,
) -> Visualization:
    """Write the contact sheet, in pages if it is large."""
    letters = [f"{letter}: " for letter in "AB"] if len(runs.folders) > 1 else [""]
    prompts = [str(facts.get("prompt", "")) for facts in runs.facts]
    titles = prompts[:1] if len(set(prompts)) == 1 else map("".join, zip(letters, prompts, strict=True))
    makers = [
        f"{letter}{facts.get('model', 'model unknown')}, seed {facts.get('seed', 'unknown')}, {folder.generation_id}"
        for letter, facts, folder in zip(letters, runs.facts, runs.folders, strict=True)
    ]
    subtitle = f"{'; '.join(makers)}; {READINGS[settings.lens]}"
    written: dict[str, Path] = {}
    with phase(progress, "sheet"):
        for path, width, height in write_pages("; ".join(titles), subtitle, frames, reader, target):
            written[f"page {len(written) + 1}, {width} x {height} px"] = path
    return begun._replace(files=written)


def names_of(runs: ShownRuns) -> list[str]:
    """What to call runs that stand side by side: by model, seed and prompt where they differ, else by their id."""
    names = []
    for folder, facts in zip(runs.folders, runs.facts, strict=True):
        telling = [key for key in ("model", "seed", "prompt") if len({str(other.get(key)) for other in runs.facts}) > 1]
        words = [f"seed {facts[key]}" if key == "seed" else str(facts[key]) for key in telling if key in facts]
        names.append(", ".join(words) or folder.generation_id)
    return names
