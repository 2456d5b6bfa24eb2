"""Pictures that show what each feature responds to: the strongest, weaker ones, random ones, and silent look-alikes."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.distributed import Ranks, joined, wait_for_all
from flux_ir.features.examples import FILE, FIRST_PASS, SECOND_PASS, ExampleSettings, Pass, Search
from flux_ir.features.folder import FeatureFolder, open_features, read_tensors, write_tensors
from flux_ir.sites import Stream

PARTIAL = "partial"
"""The folder in which processes exchange what they found; deleted when the stage is complete."""


def find_examples(
    features: str | Path | FeatureFolder,
    *,
    top: int = 24,
    quantiles: int = 5,
    per_quantile: int = 8,
    random: int = 8,
    silent: int = 8,
    seed: int = 0,
    progress: Watch = unwatched,
) -> FeatureFolder:
    """Find, for every feature, the images that show what it responds to, unless they are there for these settings.

    `features` is the folder that `score_features` left. It finds the `top` strongest images, `per_quantile` of
    each of `quantiles` equal shares of the images a feature fires on, `random` of all of these, and `silent` ones that
    look alike but on which it does not fire; no two images of a row have one prompt. `seed` is that of the draws. Under
    torchrun all processes call this alike and share the work.

    Raises FluxIRError for a folder that is not scored, and numbers below 1.
    """
    settings = ExampleSettings(
        top=top, quantiles=quantiles, per_quantile=per_quantile, random=random, silent=silent, seed=seed
    )
    with joined() as ranks:
        watch = progress if ranks.is_first else unwatched
        scored = open_features(features)
        scored.check_done("score")
        if scored.is_done("examples", asdict(settings), after=["score"]):
            watch(Note(f"the examples in {scored.path} are complete"))
            return scored
        arrays: dict[str, NDArray[Any]] = {}
        for stream in scored.streams:
            arrays |= _search(scored, stream, settings, ranks, watch).arrays()
        if ranks.is_first:
            write_tensors(scored.path / FILE, arrays, {"settings": scored.settings.digest})
            scored.mark_done("examples", asdict(settings), after=["score"])
            shutil.rmtree(scored.path / PARTIAL, ignore_errors=True)
        wait_for_all(ranks)
        return open_features(scored.path)


def _search(folder: FeatureFolder, stream: Stream, settings: ExampleSettings, ranks: Ranks, progress: Watch) -> Search:
    """Both passes over this process's parts; what the others found is put in after each."""
    search, own = Search(folder, stream, settings), range(ranks.rank, folder.parts, ranks.world_size)
    for number in follow(progress, f"examples {stream}, 1 of 2", own, total=len(own)):
        search.first(folder.part(stream, number))
    _exchange(search, f"{stream}-first", FIRST_PASS, ranks)
    search.between_passes()
    for number in follow(progress, f"examples {stream}, 2 of 2", own, total=len(own)):
        search.second(folder.part(stream, number))
    _exchange(search, f"{stream}-second", SECOND_PASS, ranks)
    return search


def _exchange(search: Search, name: str, after: Pass, ranks: Ranks) -> None:
    """An all-reduce through files: afterwards each process has what all of them found."""
    if ranks.world_size == 1:
        return
    folder = search.folder.path / PARTIAL
    write_tensors(folder / f"{name}-{ranks.rank}.safetensors", search.state(after))
    wait_for_all(ranks)
    for rank in range(ranks.world_size):
        if rank != ranks.rank:
            search.merge(read_tensors(folder / f"{name}-{rank}.safetensors")[0], after)
    wait_for_all(ranks)
