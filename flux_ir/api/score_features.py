"""What every feature of an autoencoder does: scores, token maps and a table, in a folder that later stages read."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flux_ir.activations.remote import as_url
from flux_ir.activations.source import open_source
from flux_ir.api.evaluate_sae import load_for
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.distributed import Ranks, joined, wait_for_all
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.scores import make_parts, make_table, missing_parts
from flux_ir.features.scoring import (
    Scoring,
    begin_folder,
    measure_sample,
    notes_of,
    read_sample,
    settings_of,
    write_sample,
)
from flux_ir.sae.data.held_out import evaluation_data_of
from flux_ir.sae.files.formats import weights_file
from flux_ir.sites import Site


def score_features(
    sae: str | Path,
    captures: str | Path,
    *,
    site: str | Site | None = None,
    steps: Sequence[int] | None = None,
    pictures: str | Path | None = None,
    name: str | None = None,
    output_dir: str | Path = "features",
    device: str | None = None,
    progress: Watch = unwatched,
) -> FeatureFolder:
    """Score every feature of an autoencoder on every token of the activations; a run that was stopped is resumed.

    `sae` is the folder of an autoencoder, of whichever program; `captures` is what `open_source` takes, and `site` is
    for an autoencoder that does not say its own. All generations are scored, at `steps`: those the autoencoder was
    trained on by default. `pictures` is the folder that CLIP's activations were collected from. The result is the
    folder `output_dir`/`name`, by default of the autoencoder's name. Under torchrun all processes call this alike and
    share the work.

    Raises FluxIRError for what a user can mend.
    """
    with joined() as ranks:
        watch = progress if ranks.is_first else unwatched
        path = folder_path(Path(sae), name, output_dir)
        scoring = open_scoring(Path(sae), captures, site=site, steps=steps, device=ranks.device(device), progress=watch)
        if ranks.is_first:
            with phase(watch, "begin"):
                begun = begin_folder(
                    path, scoring, Path(sae), str(captures), None if pictures is None else Path(pictures)
                )
                if read_sample(begun) is None:
                    write_sample(begun, measure_sample(scoring))
        wait_for_all(ranks)
        return score(scoring, open_features(path), ranks, watch)


def score(scoring: Scoring, folder: FeatureFolder, ranks: Ranks, progress: Watch) -> FeatureFolder:
    """Compute the parts that are missing, shared by all processes; the first one then makes the table."""
    done = folder.is_done("score", {})
    wait_for_all(ranks)  # a barrier: all must have looked before one writes a missing part
    if done:
        progress(Note(f"the scores in {folder.path} are complete"))
        return folder
    for note in notes_of(folder):
        progress(Note(f"note: {note}"))
    sample = read_sample(folder)
    assert sample is not None  # `score_features` has written it
    for stream in folder.streams:
        missing = [part for part in missing_parts(folder, stream) if part % ranks.world_size == ranks.rank]
        parts = make_parts(scoring, folder, sample, stream, missing)
        for _ in follow(progress, f"score {stream}", parts, total=len(missing)):
            pass
    wait_for_all(ranks)
    if ranks.is_first:
        with phase(progress, "table"):
            norms = scoring.sae.W_dec.detach().cpu().double().norm(dim=1).numpy()
            folder = make_table(folder, sample, norms)
        for stream, counts in folder.described["counts"].items():
            if not counts["alive"]:
                progress(Note(f"note: all {folder.settings.d_sae} features are dead on these {stream} tokens"))
    wait_for_all(ranks)
    return open_features(folder.path)


def open_scoring(
    sae: Path,
    captures: str | Path,
    *,
    site: str | Site | None,
    steps: Sequence[int] | None,
    device: torch.device,
    progress: Watch,
) -> Scoring:
    """The autoencoder and its activations, checked against each other; steps that the captures lack are noted.

    `steps` None are those the autoencoder was trained on, as far as the captures have them.
    """
    source = open_source(captures)
    loaded = load_for(sae, source, None if site is None else str(site), progress)
    if steps is not None:
        if not steps or not set(steps) <= set(source.steps):
            raise FluxIRError(
                f"--steps must be among those captured, {', '.join(map(str, source.steps))}: got "
                f"{', '.join(map(str, steps)) or 'none'}",
                hint="leave it out for those the autoencoder was trained on",
            )
        chosen = sorted(set(steps))
        loaded.config = replace(loaded.config, steps=tuple(chosen))
        filters = dict(loaded.metadata.get("filters") or {}) | {"steps": chosen}
        loaded.metadata = loaded.metadata | {"filters": filters}
    subject = evaluation_data_of(loaded, source, held_out=0.0)
    steps = subject.filters.steps_of(source.steps)
    absent = sorted(set(loaded.config.steps or ()) - set(steps))
    if absent:
        progress(Note(f"note: the captures lack the steps {', '.join(map(str, absent))} that {sae} was trained on"))
    with weights_file(sae).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    stream_site = subject.filters.half(subject.site)
    settings = settings_of(loaded, weights, source, stream_site, steps)
    return Scoring(loaded.folded().requires_grad_(False).to(device), source, stream_site, settings)


def folder_path(sae: Path, name: str | None, output_dir: str | Path) -> Path:
    """Where the features of an autoencoder go. Raises FluxIRError for a name that leads elsewhere."""
    name = sae.resolve().name if name is None else name
    if name in ("", ".", "..") or Path(name).name != name:
        raise FluxIRError(f"--name is the name of one folder: got {name!r}", hint="put the rest into --output_dir")
    if as_url(output_dir) is not None:
        raise FluxIRError(f"features are written to this machine: got {output_dir}", hint="name a folder")
    return Path(output_dir) / name
