"""The features of two folders side by side: which are the same, which have moved, and how alike the activations are.

Next: `comparison_files`, the settings and the table.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array

from flux_ir.activations.source import open_source
from flux_ir.api.comparison_files import (
    PICTURE,
    RESULT,
    CompareBy,
    CompareLevel,
    CompareSettings,
    Comparison,
    Findings,
    check_same_other,
    comparison_digest,
    content_of,
    result_folder,
    write_content,
)
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError, counted
from flux_ir.features.compare import (
    MOST_ROWS,
    Alignment,
    Change,
    Common,
    activations_of,
    align,
    common_generations,
    image_scores,
    no_common_generations,
    paired_change,
    paired_steps,
    site_of,
)
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.matching import (
    Pairs,
    Tested,
    assign,
    compare_with_null,
    correlations,
    cosines,
    images_permuted,
    random_directions,
)
from flux_ir.features.significance import q_values
from flux_ir.files import read_json
from flux_ir.sae.files.formats import load_any, weights_file
from flux_ir.sites import Stream

NULL_SCORES, MOST_DRAWS = 10_000, 100
"""The null is drawn until it has at least so many pairs, but not more often than that."""


def compare_features(
    features: str | Path,
    other: str | Path,
    *,
    by: CompareBy = "auto",
    level: CompareLevel = "image",
    stream: Stream | None = None,
    candidates: int = 16,
    min_likeness: float = 0.5,
    min_images: int = 10,
    max_images: int = 20_000,
    permutations: int = 10_000,
    fdr: float = 0.05,
    cka_tokens: int = 20_000,
    seed: int = 0,
    name: str | None = None,
    progress: Watch = unwatched,
) -> Comparison:
    """Match the features of two scored folders, one to one, and say which are the same and which have moved.

    `by` activations: correlation of S over the same generations (`level` image), or of every token of them. `by`
    decoder: cosine of the directions, of one width. Auto: activations, if both folders have generations of one prompt,
    seed and size. The assignment has the largest sum of likenesses; above 4,096 features, among the `candidates` most
    alike of each. A pair is matched if it is at least `min_likeness` alike, and more so than pairs of the null (images
    permuted; random directions) at the rate `fdr`: both are asked, since over many images even a small likeness is
    beyond chance. Features active on fewer than `min_images` images are left out.

    Where the generations are the same, pairs are also tested for a change of frequency and of mean activation, by
    `permutations`, and CKA of the activations themselves is measured on about `cka_tokens` tokens (0: not at all).

    Written to compare/`name` in the first folder, by default called as the second. A comparison with another folder
    that happens to have this name is not written over. Raises FluxIRError for what a user can mend.
    """
    settings = CompareSettings(
        by=by,
        level=level,
        stream=stream,
        candidates=candidates,
        min_likeness=min_likeness,
        min_images=min_images,
        max_images=max_images,
        permutations=permutations,
        fdr=fdr,
        cka_tokens=cka_tokens,
        seed=seed,
    )
    a, b = open_features(features), open_features(other)
    for folder in (a, b):
        folder.check_done("score")
    where = result_folder(a, b, name)
    if (where / RESULT).is_file():
        previous = read_json(where / RESULT)
        if previous.get("digest") == comparison_digest(a, b, settings) and (where / PICTURE).is_file():
            progress(Note(f"the comparison in {where} is complete"))
            return Comparison(where / RESULT, previous)
        check_same_other(where, previous, b)
    run = _Comparing(a, b, settings, progress)
    return write_content(where, content_of(run.folders, run.streams, settings, run.findings()))


class _Comparing:
    """One run of a comparison. What is compared, and by what, is settled before anything is computed."""

    def __init__(self, a: FeatureFolder, b: FeatureFolder, settings: CompareSettings, progress: Watch) -> None:
        self.folders, self.settings, self.progress = (a, b), settings, progress
        self.streams = (_stream(a, settings.stream), _stream(b, settings.stream))
        self.common = common_generations(a, b)
        self.by = self._compared_by()
        self.common = self._thinned(self.common)
        self.decoders = self._decoders()

    def findings(self) -> Findings:
        """Which features are the same, which of these have moved, and how alike the activations are."""
        same = len(self.common.a) > 1
        scores = [
            image_scores(*each) if same else None
            for each in zip(self.folders, self.streams, self.common[:2], strict=True)
        ]
        usable = [self._usable(side, score) for side, score in enumerate(scores)]
        pairs, tested = self._match(usable, scores)
        matched = (tested.q <= self.settings.fdr) & (pairs.score >= self.settings.min_likeness)
        return Findings(
            by=self.by,
            generations=len(self.common.a),
            usable=usable,
            pairs=pairs,
            tested=tested,
            null_draws=self._null_draws(len(usable[0])),
            matched=matched,
            changes=self._changes(pairs, matched, scores) if same else {},
            alignments=self._alignments(),
        )

    # ---- What is compared

    def _compared_by(self) -> Literal["activations", "decoder"]:
        """Whether by activations or by directions. Raises FluxIRError where neither is possible."""
        (a, b), same = self.folders, len(self.common.a) > 1
        widths = a.settings.d_in, b.settings.d_in
        by = self.settings.by
        if by == "auto":
            by = "activations" if same or widths[0] != widths[1] else "decoder"
        if by == "activations" and not same:
            error = no_common_generations(a, b)
            if widths[0] != widths[1]:  # then directions cannot be compared either
                raise FluxIRError(error.message, hint="collect the same prompts with the same --seed and size")
            raise error
        if by == "decoder" and widths[0] != widths[1]:
            raise FluxIRError(
                f"directions are compared where activations are of one width: {a.path} has {widths[0]} and {b.path} "
                f"has {widths[1]}",
                hint="compare what they do on the same generations, with --by activations",
            )
        return by

    def _thinned(self, common: Common) -> Common:
        """As many of the common generations as may be compared: fewer where every token of them is a row."""
        n, most = len(common.a), self.settings.max_images
        if self.by == "activations" and self.settings.level == "token":
            (a, _), pairs = self.folders, paired_steps(*self.folders)
            most = min(most, max(2, MOST_ROWS // (max(1, len(pairs)) * a.settings.tokens[self.streams[0]])))
        for folder in self.folders:
            if n and (left := folder.settings.images - n):
                self.progress(Note(f"note: {counted(left, 'generation')} of {folder.path} are not in the other folder"))
        if n > most:
            self.progress(Note(f"note: {most} of {n} generations are compared, evenly spaced"))
        return common.thinned(most)

    def _decoders(self) -> list[torch.Tensor] | None:
        """W_dec of both. None where an autoencoder is gone that only the unit of mean activations needs."""
        decoders = []
        for folder in self.folders:
            if not folder.sae.is_dir() and self.by == "activations":
                self.progress(
                    Note(f"note: {folder.sae} is gone: mean activations are in the units of each autoencoder")
                )
                return None
            weights = hashlib.sha256(weights_file(folder.sae).read_bytes()).hexdigest()
            if weights != folder.settings.weights:
                raise FluxIRError(
                    f"the autoencoder {folder.sae} must be the one that was scored: {folder.path} is of other weights",
                    hint="score it again, into another folder",
                )
            decoders.append(load_any(folder.sae).W_dec.detach())
        return decoders

    def _usable(self, side: int, scores: csr_array | None) -> NDArray[np.int64]:
        """The numbers of the features that are active on enough images to be compared."""
        images = self.folders[side].table(self.streams[side]).images if scores is None else _active(scores)
        usable = np.flatnonzero(images >= self.settings.min_images)
        if not len(usable):
            raise FluxIRError(
                f"features are compared that are active on {self.settings.min_images} images or more: "
                f"{self.folders[side].path} has none",
                hint="lower --min_images, or collect more generations",
            )
        return usable

    def _null_draws(self, features: int) -> int:
        return min(-(-NULL_SCORES // features), MOST_DRAWS)

    # ---- Which are the same

    def _match(self, usable: Sequence[NDArray[np.int64]], scores: Sequence[csr_array | None]) -> tuple[Pairs, Tested]:
        rows, columns, most = len(usable[0]), len(usable[1]), self.settings.candidates
        seeds = [self.settings.seed + 1 + draw for draw in range(self._null_draws(rows))]
        nulls: Iterable[Pairs]
        if self.by == "activations":
            with phase(self.progress, "read"):
                tokens = self.settings.level == "token"
                every = activations_of(*self.folders, self.streams, self.common, tokens=tokens)
                both = every._replace(a=every.a[:, usable[0]], b=csr_array(every.b[:, usable[1]]))
            with phase(self.progress, "match"):
                pairs = assign(correlations(both), rows, columns, most)
            nulls = (assign(correlations(images_permuted(both, seed)), rows, columns, most) for seed in seeds)
        else:
            assert self.decoders is not None
            w_a, w_b = (w[torch.from_numpy(use)] for w, use in zip(self.decoders, usable, strict=True))
            with phase(self.progress, "match"):
                pairs = assign(cosines(w_a, w_b), rows, columns, most)
            draws = random_directions(w_b, seeds)
            nulls = (assign(cosines(w_a, drawn), rows, columns, most) for drawn in draws)
        counts = np.zeros(rows, np.int64)  # a direction's likeness does not depend on how often it is active
        if self.by == "activations" and scores[0] is not None:
            counts = _active(scores[0])[usable[0]]
        tested = compare_with_null(pairs, list(follow(self.progress, "null", nulls, len(seeds))), counts)
        return pairs._replace(row=usable[0][pairs.row], column=usable[1][pairs.column]), tested

    # ---- Which have moved

    def _changes(
        self, pairs: Pairs, matched: NDArray[np.bool_], scores: Sequence[csr_array | None]
    ) -> dict[str, Change]:
        """How the share of images that each pair is active on changes, and its mean activation (a length in raw space).

        Only what is matched is tested.
        """
        sides: dict[str, list[csc_array]] = {"frequency": [], "mean": []}
        with phase(self.progress, "changes"):
            for side, numbers in enumerate((pairs.row, pairs.column)):
                folder, stream, score = self.folders[side], self.streams[side], scores[side]
                assert score is not None
                active = score[:, numbers]
                active.data[:] = 1
                mean = image_scores(folder, stream, self.common[side], mean=True)[:, numbers]
                if self.decoders is not None:
                    mean = mean * self.decoders[side].norm(dim=1).double().numpy()[numbers]
                sides["frequency"].append(csc_array(active))
                sides["mean"].append(csc_array(mean))
            changes = {}
            for measure, (a, b) in sides.items():
                change = paired_change(
                    a, b, self.common.groups, permutations=self.settings.permutations, seed=self.settings.seed
                )
                changes[measure] = change._replace(q=q_values(np.where(matched, change.p, np.nan)))
            return changes

    # ---- How alike the activations are

    def _alignments(self) -> list[Alignment]:
        if not self.settings.cka_tokens or len(self.common.a) < 2:
            return []
        a, b = self.folders
        if (a.settings.captures, a.settings.site) == (b.settings.captures, b.settings.site):
            return []  # they are the same
        sources = []
        for folder in self.folders:
            try:
                sources.append(open_source(folder.captures))
            except FluxIRError as error:
                self.progress(Note(f"note: no CKA: {error.message}"))
                return []
            if sources[-1].identity != folder.settings.captures:
                self.progress(Note(f"note: no CKA: {folder.captures} is not what was scored in {folder.path}"))
                return []
        sites = site_of(a, self.streams[0]), site_of(b, self.streams[1])
        images = max(4, self.settings.cka_tokens // a.settings.tokens[self.streams[0]])
        alignments, pairs = [], paired_steps(a, b)
        if not pairs:
            self.progress(Note("note: no CKA: the two have no step in common"))
        for steps in follow(self.progress, "CKA", pairs, len(pairs)):
            common = self.common.thinned(images)
            one = align((sources[0], sources[1]), sites, common, steps, seed=self.settings.seed)
            if one is None:
                self.progress(Note("note: no CKA: the two have not the same tokens"))
                return []
            alignments.append(one)
        return alignments


def _stream(folder: FeatureFolder, asked: Stream | None) -> Stream:
    if asked is not None and asked not in folder.streams:
        raise FluxIRError(
            f"{folder.path} holds features of {' and '.join(folder.streams)} tokens: got --stream {asked}",
            hint=f"leave --stream out, or ask for {folder.streams[0]}",
        )
    return folder.streams[0] if asked is None else asked


def _active(scores: csr_array) -> NDArray[np.int64]:
    """On how many images each feature is active."""
    return np.bincount(scores.indices, minlength=scores.shape[1]).astype(np.int64)
