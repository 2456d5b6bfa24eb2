"""From the decoded pictures of a run to a film, a contact sheet or a page: the working half of `visualize`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.commands.report import Report, host_memory
from flux_ir.commands.visualize import VisualizeOptions
from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder
from flux_ir.visualize.animate import write_gif, write_mp4
from flux_ir.visualize.film import Film
from flux_ir.visualize.frames import (
    Choice,
    Frame,
    choose_cells,
    find_cells,
    find_run,
    in_ranges,
    make_frames,
    run_facts,
)
from flux_ir.visualize.pages import write_pages
from flux_ir.visualize.palette import film_palette, thumbnail_side
from flux_ir.visualize.pictures import PictureReader

MOST_NAMED = 20  # pictures left out are named one by one up to here
LONGEST_STEPS_IN_NAME = 60

READINGS = {"euler": "the state each block would go to (euler)", "x0": "the image each block believes in (x0)"}


class Subject(NamedTuple):
    """What is shown: one run, or two side by side, each with its metadata."""

    folders: list[RunFolder]
    facts: list[dict[str, Any]]


def show(options: VisualizeOptions) -> None:
    """Make what the options ask for, and print where it is."""
    report = Report()
    subject = find_subject(options)
    target = subject.folders[0].path / file_name(options, subject.folders)
    if options.output_format == "html":
        with report.phase("page"):
            written = {"page": explore(options, subject, target)}
        report.table(f"generation {subject.folders[0].generation_id}", written, {})
        return
    reader = PictureReader(skip_broken=options.skip_broken)
    frames = find_frames(options, subject, report)
    if target.exists():
        report.note(f"note: {target} is replaced")
    if options.output_format == "png":
        written = draw_pages(options, subject, frames, reader, target, report)
    else:
        written = draw_film(options, subject, frames, reader, target, report)
    name_left_out(reader, report)
    report.table(f"generation {subject.folders[0].generation_id}", written, host_memory())


def find_subject(options: VisualizeOptions) -> Subject:
    """The runs to show. Raises FluxIRError if one does not exist, or if a run is compared with itself."""
    names = [options.generation_id] + ([] if options.compare is None else [options.compare])
    folders = [find_run(options.output_dir, name) for name in names]
    if len({folder.generation_id for folder in folders}) < len(folders):
        raise FluxIRError(
            f"--compare must be another generation: both are {folders[0].generation_id}", hint="leave --compare out"
        )
    return Subject(folders, [run_facts(folder) for folder in folders])


def find_frames(options: VisualizeOptions, subject: Subject, report: Report) -> list[Frame]:
    """The frames in the order to show them: of two runs, the cells that both have."""
    cells = [find_cells(folder, options.lens) for folder in subject.folders]
    common = sorted(set.intersection(*map(set, cells)))
    if not common:
        raise FluxIRError("the two generations must have a block and a step in common: they have none")
    if alone := len(set.union(*map(set, cells))) - len(common):
        report.note(f"note: {alone} pictures of blocks and steps that only one of the two has are not shown")
    choice = Choice(options.block_type, options.max_blocks, options.steps, options.order)
    return make_frames(subject.folders, options.lens, choose_cells(common, choice))


def file_name(options: VisualizeOptions, folders: Sequence[RunFolder]) -> str:
    """`visualization_{id}[_{type}].{format}`, with what else sets it apart from other films of the same run."""
    parts = ["visualization", folders[0].generation_id]
    if options.block_type is not None:
        parts.append(options.block_type)
    if options.lens != "euler":
        parts.append(options.lens)
    parts += [f"vs_{folder.generation_id}" for folder in folders[1:]]
    if options.order == "steps":
        parts.append("by_block")
    if options.steps is not None:
        steps = sorted(set(options.steps))
        named = in_ranges(steps)
        short = named if len(named) <= LONGEST_STEPS_IN_NAME else f"{len(steps)}_of_{steps[0]}-{steps[-1]}"
        parts.append(f"steps_{short}")
    return f"{'_'.join(parts)}.{options.output_format}"


def draw_film(
    options: VisualizeOptions,
    subject: Subject,
    frames: Sequence[Frame],
    reader: PictureReader,
    target: Path,
    report: Report,
) -> dict[str, Path]:
    """Write the film and print its length. What was written, by name."""
    labels = names_of(subject) if len(subject.folders) > 1 else []
    film = Film(frames, reader, font_size=options.font_size, labels=labels)
    if options.output_format == "gif":
        thumbnails = film.thumbnails(thumbnail_side(len(film) * len(film.panels)))
        palette = film_palette(report.follow("colours", thumbnails, total=len(film) * len(film.panels)))
        count = write_gif(report.follow("film", film, total=len(film)), palette, target, options.fps)
    else:
        count = write_mp4(report.follow("film", film, total=len(film)), target, options.fps)
    width, height = film.size_px
    report.results.print(f"{count} frames of {width} x {height} px, {count / options.fps:.2f} s")
    return {"film": target}


def draw_pages(
    options: VisualizeOptions,
    subject: Subject,
    frames: Sequence[Frame],
    reader: PictureReader,
    target: Path,
    report: Report,
) -> dict[str, Path]:
    """Write the contact sheet, in pages if it is large. What was written, by name."""
    letters = [f"{letter}: " for letter in "AB"] if len(subject.folders) > 1 else [""]
    prompts = [str(facts.get("prompt", "")) for facts in subject.facts]
    titles = prompts[:1] if len(set(prompts)) == 1 else map("".join, zip(letters, prompts, strict=True))
    makers = [
        f"{letter}{facts.get('model', 'model unknown')}, seed {facts.get('seed', 'unknown')}, {folder.generation_id}"
        for letter, facts, folder in zip(letters, subject.facts, subject.folders, strict=True)
    ]
    subtitle = f"{'; '.join(makers)}; {READINGS[options.lens]}"
    written: dict[str, Path] = {}
    with report.phase("sheet"):
        for path, width, height in write_pages("; ".join(titles), subtitle, frames, reader, target):
            written[f"page {len(written) + 1}, {width} x {height} px"] = path
    return written


def explore(options: VisualizeOptions, subject: Subject, target: Path) -> Path:
    """Write the explorer's page of these runs alone."""
    from flux_ir.explorer.page import write_explorer

    return write_explorer(options.output_dir, [folder.generation_id for folder in subject.folders], target)


def names_of(subject: Subject) -> list[str]:
    """What to call runs that stand side by side: by model, seed and prompt where they differ, else by their id."""
    names = []
    for folder, facts in zip(subject.folders, subject.facts, strict=True):
        telling = [
            key for key in ("model", "seed", "prompt") if len({str(other.get(key)) for other in subject.facts}) > 1
        ]
        words = [f"seed {facts[key]}" if key == "seed" else str(facts[key]) for key in telling if key in facts]
        names.append(", ".join(words) or folder.generation_id)
    return names


def name_left_out(reader: PictureReader, report: Report) -> None:
    """Say which pictures were left out, and why."""
    for path, reason in list(reader.left_out.items())[:MOST_NAMED]:
        report.note(f"left out: {path}: {reason}")
    if (more := len(reader.left_out) - MOST_NAMED) > 0:
        report.note(f"left out: {more} more")
