"""From captures to plain arrays, a generation at a time."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from flux_ir.activations.exported import METADATA_KEY, SETTINGS, GenerationFacts
from flux_ir.activations.shards import site_key
from flux_ir.activations.source import TokenBlock, TokenSource, open_source
from flux_ir.api.arguments import check_words
from flux_ir.api.progress import Watch, follow, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, read_json, write_json
from flux_ir.sites import Site, SiteNames, Stream, match_sites, site_names


class Exported(NamedTuple):
    """What an export has written."""

    folder: Path
    generations: int


def export(
    captures: str | Path,
    output_dir: str | Path,
    *,
    format: Literal["safetensors", "npy"] = "safetensors",  # noqa: A002 (the word of the flag)
    sites: SiteNames | None = None,
    steps: Iterable[int] | None = None,
    progress: Watch = unwatched,
) -> Exported:
    """Write the activations in `captures` as plain arrays [tokens, d] into a folder, a generation at a time.

    `captures` is a collection (or its URL), a capture, or a folder of these; `sites` and `steps` say which part of it
    (None: all). `output_dir` is a new folder, or that of the same export, which is written anew.

    Raises FluxIRError for captures that cannot be read, sites and steps that are not in them, and a folder with other
    things in it.
    """
    check_words(export, {"format": format})
    source, folder = open_source(captures), Path(output_dir)
    chosen_sites, chosen_steps = choose_sites(captures, source, sites), choose_steps(captures, source, steps)
    check_ids(source)
    check_folder(folder, settings_of(source, format, chosen_sites, chosen_steps))
    total = len(source.generations)
    for blocks in follow(progress, "export", generations(source, chosen_sites, chosen_steps), total):
        write_generation(folder, format, source, blocks)
    return Exported(folder, total)


def choose_sites(captures: str | Path, source: TokenSource, names: SiteNames | None) -> list[Site]:
    """The sites to write: the chosen ones of those there are and their halves."""
    if not source.sites:
        raise FluxIRError(f"what is exported has sites, and {captures} has none", hint="it can be trained on as it is")
    if names is None:
        return list(source.sites)
    streams: tuple[Stream, ...] = ("img", "txt")
    whole = [site for site in source.sites if site.stream is None and not site.per_prompt]
    halves = [Site(site.kind, site.block, stream, site.part) for site in whole for stream in streams]
    return match_sites(site_names(names), sorted({*source.sites, *halves}))


def choose_steps(captures: str | Path, source: TokenSource, steps: Iterable[int] | None) -> list[int]:
    """The steps to write. Raises FluxIRError for one that is not there."""
    if steps is None:
        return list(source.steps)
    chosen = sorted(set(steps))
    if missing := [step for step in chosen if step not in source.steps]:
        raise FluxIRError(
            f"--steps must be among those captured: got {', '.join(map(str, missing))}",
            hint=f"{captures} holds the steps {', '.join(map(str, source.steps))}",
        )
    return chosen


def check_ids(source: TokenSource) -> None:
    """Raises FluxIRError unless every id can be the name of a file of its own."""
    seen: set[str] = set()
    for generation in source.generations:
        name = generation.id
        if name in seen or name != Path(name).name or name.startswith(".") or f"{name}.json" == SETTINGS:
            why = "there twice" if name in seen else "no name of a file"
            raise FluxIRError(
                f"every generation needs an id to name its file with: {name!r} of {generation.path} is {why}",
                hint="export the captures from folders of their own",
            )
        seen.add(name)


def settings_of(source: TokenSource, file_format: str, sites: Sequence[Site], steps: Sequence[int]) -> dict[str, Any]:
    """What all files of one export have in common."""
    return {
        "format": file_format,
        "model": source.model,
        "sites": [str(site) for site in sites],
        "steps": list(steps),
    }


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or finds it to be of the same export. Raises FluxIRError for any other."""
    path = folder / SETTINGS
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise FluxIRError(f"{folder} has other things in it", hint="name a new folder with --output_dir")
        write_json(path, settings)
        return
    try:
        earlier = read_json(path, hint="name a new folder with --output_dir")
        differences = [name for name in settings if earlier[name] != settings[name]]
    except (KeyError, TypeError) as error:
        raise FluxIRError(
            f"{path} is not of an export: {error!r}", hint="name a new folder with --output_dir"
        ) from error
    if differences:
        name = differences[0]
        raise FluxIRError(
            f"{folder} was exported with other {name}: {_listed(earlier[name])}, now {_listed(settings[name])}",
            hint="name a new folder with --output_dir",
        )


def generations(source: TokenSource, sites: Sequence[Site], steps: Sequence[int]) -> Iterator[list[TokenBlock]]:
    """All blocks of one generation after the other."""
    for number in range(len(source.generations)):
        yield [source.read(number, site, step) for site in sites for step in steps]


def write_generation(folder: Path, file_format: str, source: TokenSource, blocks: Sequence[TokenBlock]) -> None:
    """Write one generation, complete or not at all."""
    facts = facts_of(source, blocks)
    if file_format == "safetensors":
        # Copied: two halves of one block share memory, which safetensors refuses to save.
        tensors = {name_of(block): block.floats().clone(memory_format=torch.contiguous_format) for block in blocks}
        write(folder / f"{facts.id}.safetensors", save(tensors, {METADATA_KEY: facts.to_json()}))
        return
    for block in blocks:
        write(folder / name_of(block) / f"{facts.id}.npy", npy_bytes(block.floats()))
    write(folder / f"{facts.id}.json", f"{facts.to_json()}\n".encode())  # last: now it is complete


def facts_of(source: TokenSource, blocks: Sequence[TokenBlock]) -> GenerationFacts:
    """What stands beside the numbers of one generation."""
    first = blocks[0]
    img = next((block.positions[block.txt_tokens :] for block in blocks if _has_image_tokens(block)), None)
    all_kept = img is None or torch.equal(img, torch.arange(len(img), dtype=img.dtype))
    return GenerationFacts(
        id=first.generation,
        prompt=first.prompt,
        model=source.model,
        txt_tokens=max(block.txt_tokens for block in blocks),
        used_txt=first.used_txt,
        img_positions=None if img is None or all_kept else img.tolist(),
    )


def name_of(block: TokenBlock) -> str:
    """The name of a block's array."""
    assert block.site is not None  # `choose_sites` refuses arrays without sites
    return site_key(block.site, block.step)


def npy_bytes(values: torch.Tensor) -> bytes:
    """An array as the content of an .npy file; bfloat16, of which NumPy knows nothing, as float32."""
    file = io.BytesIO()
    values = values.float() if values.dtype == torch.bfloat16 else values
    np.save(file, np.ascontiguousarray(values.numpy()))
    return file.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all."""
    with complete_file(path) as beside:
        beside.write_bytes(content)


def _has_image_tokens(block: TokenBlock) -> bool:
    return len(block.positions) > block.txt_tokens


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
