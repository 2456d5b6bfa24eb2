"""The known labels of a collection's pictures, as `score_concepts` and `probe` read them.

Both keep what they have computed in files named by a digest of all it depends on, so that a run that was stopped goes
on, and what does not depend on the one autoencoder is computed once for all.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flux_ir.activations.blocks import TokenSource
from flux_ir.api.progress import Note, Watch, follow
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import read_json, write_json
from flux_ir.sae.data.filters import SiteKey
from flux_ir.studies.concepts import limited
from flux_ir.studies.judged import Judged, judge_collection
from flux_ir.studies.label_files import LabelFile
from flux_ir.studies.labels import Labels, known_answers

PARTS, JUDGED = "parts", "judged"
"""Folders beside the results: what was computed, and what the judge saw."""
MAX_TOKENS = 2**19
"""Tokens that are read of a collection, at most: whole prompts are drawn until there are as many."""


def labels_of(
    source: TokenSource,
    name: str,
    file: LabelFile | None,
    judged_folder: Path,
    max_tokens: int,
    site: SiteKey,
    progress: Watch,
) -> Labels:
    """The labels of a collection's pictures: from a file, or by the judge, whose findings stay in `judged_folder`.

    Pictures are left out until their tokens at the site are at most `max_tokens`. What is left out is noted.
    """
    count = len(source.generations)
    judged: Judged | None = None
    if file is not None:
        labels = file.labels(source, lambda images: follow(progress, f"masks of {name}", images, total=count))
    else:
        judged = judge_collection(
            source, judged_folder, lambda paths: follow(progress, f"look at {name}", paths, total=count)
        )
        labels = known_answers(judged)
    for reason, left_out in labels.dropped.items():
        if left_out:
            progress(Note(f"{counted(left_out, 'picture')} of {count} of {name} left out: {reason}"))
    some = limited(labels, max_tokens // source.tokens(site), seed=0)
    if len(set(some.prompts)) < 2:
        raise FluxIRError(
            f"labelled pictures of two prompts or more are needed: {name} has "
            f"{counted(len(some.images), 'picture')} of {counted(len(set(some.prompts)), 'prompt')}, of "
            f"{counted(count, 'generation')}",
            hint="collect more prompts, or raise --max_tokens",
        )
    if some is not labels:
        text = f"note: {len(some.images)} of {len(labels.images)} pictures of {name} are used"
        progress(Note(f"{text}, as many as have {max_tokens} tokens"))
        if judged is not None:  # `limited` drops the counts by shape, which are of all pictures
            used = judged.chosen(np.isin(judged.images, some.images))
            some = replace(some, by_shape=known_answers(used).by_shape)
    return some


def kept_result(output_dir: Path, name: str, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """The result of `compute`, read from the file of an earlier run with the same `key`, or computed and kept.

    The file is `parts/{name}_{digest of the key}.json`; `key` is all that the result depends on.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = output_dir / PARTS / f"{name}_{digest}.json"
    if path.is_file():
        return read_json(path, required=("found",))["found"]
    found = compute()
    write_json(path, {"key": key, "found": found})
    return found
