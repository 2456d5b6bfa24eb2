"""The labelled pictures of a collection at one site and step: their tokens, their features, and their answers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.blocks import NoisySource, TokenRun, TokenSource
from flux_ir.errors import FluxIRError, counted
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.filters import Filters
from flux_ir.sites import Site
from flux_ir.studies.auroc import Codes, Ranked
from flux_ir.studies.labels import Comparison, Labels, Question, split

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class Part:
    """The labelled pictures of a source at one site and step. Of a single block stored whole, the image half.

    Raises FluxIRError for labels of other patches than the source has.
    """

    source: TokenSource
    labels: Labels
    site: Site | None
    step: int

    def __post_init__(self) -> None:
        if self.site is not None and self.site.kind == "single" and self.site.stream is None:
            object.__setattr__(self, "site", replace(self.site, stream="img"))
        if self.has_patches and self.tokens_per_image > self.labels.tokens.shape[2]:
            raise FluxIRError(
                f"labels and activations must be of the same patches: {self.site} has {self.tokens_per_image} tokens a "
                f"picture, the labels {self.labels.tokens.shape[2]}",
                hint="name the pictures that belong to these captures",
            )

    @property
    def has_patches(self) -> bool:
        """Whether the tokens are patches of the picture: not those of the text, and not the one of CLIP."""
        return self.site is not None and self.site.stream == "img" and len(self.labels.tokens) > 0

    @property
    def images(self) -> int:
        return len(self.labels.images)

    @property
    def tokens_per_image(self) -> int:
        return self.source.tokens(self.site)

    def comparisons(self) -> list[Comparison]:
        """Those that can be made here."""
        return [one for one in self.labels.comparisons() if self.has_patches or not one.question.of_tokens]

    def flags(self, comparison: Comparison, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Who is positive and who counts: bool [images * tokens], or [images].

        With `order` picture i gets the label map of picture order[i].
        """
        bits = self._bits(comparison.question) if order is None else self._bits(comparison.question)[order]
        positive, counted = split(bits, comparison.negatives)
        return positive.reshape(-1), counted.reshape(-1)

    def counts(self, comparison: Comparison) -> tuple[int, int]:
        """How many are positive, and how many negative."""
        positive, counted = self.flags(comparison)
        return int(positive.sum()), int(counted.sum() - positive.sum())

    def groups(self, comparison: Comparison) -> np.ndarray:
        """The number of the prompt of each token, or picture: int64."""
        groups = self.labels.groups
        return np.repeat(groups, self.tokens_per_image) if comparison.question.of_tokens else groups

    def reads(self) -> Iterator[tuple[range, range, np.ndarray]]:
        """What to read together: which labelled pictures, in which generations, and where among these they are."""
        images = self.labels.images
        for whole in self.source.runs:
            for start in range(whole.start, whole.stop, _IMAGES_AT_ONCE):
                stop = min(start + _IMAGES_AT_ONCE, whole.stop)
                first, last = (int(place) for place in np.searchsorted(images, [start, stop]))
                if last > first:
                    read = range(int(images[first]), int(images[last - 1]) + 1)
                    yield range(first, last), read, images[first:last] - read.start

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        """Some pictures after another: their numbers among the labelled ones, and their tokens [images, tokens, d]."""
        for rows, run, kept in self._runs():
            yield rows, run.floats()[torch.from_numpy(kept)].float()

    @cached_property
    def used(self) -> Tensor | None:
        """Which tokens are no padding of the text: bool [images, tokens]. None: all.

        Raises FluxIRError for a picture whose text is all padding: there is nothing to read.
        """
        if self.site is None or self.site.stream != "txt":
            return None
        parts = list[Tensor]()
        for _, run, kept in self._runs():
            used, chosen = Filters().used(run), torch.from_numpy(kept)
            parts.append(torch.ones(len(kept), self.tokens_per_image).bool() if used is None else used[chosen])
        found = torch.cat(parts)
        if bool(found.all()):
            return None
        if empty := int((~found.any(1)).sum()):
            raise FluxIRError(
                f"every text must have a token that is no padding: {counted(empty, 'generation')} of {self.site} "
                "have none",
                hint="give the labels of generations with a prompt",
            )
        return found

    def values(self) -> Tensor:
        """All tokens of the labelled pictures, as stored: [images * tokens, d]."""
        return torch.cat([run.floats()[torch.from_numpy(kept)].flatten(0, 1) for _, run, kept in self._runs()])

    @property
    def has_noisy(self) -> bool:
        """Whether the source kept what each patch began the step with."""
        return self.has_patches and isinstance(self.source, NoisySource)

    @property
    def noisy_width(self) -> int | None:
        """How many numbers each of them has; None: they were not kept."""
        if not self.has_noisy or not isinstance(self.source, NoisySource):
            return None
        first = int(self.labels.images[0])
        return self.source.noisy(range(first, first + 1), self.step).shape[-1]

    def noisy(self) -> Tensor:
        """The noisy latents that each token began the step with: [images * tokens, channels]."""
        if not isinstance(self.source, NoisySource):
            raise ValueError("this source kept no noisy latents")
        parts = [self.source.noisy(read, self.step)[torch.from_numpy(kept)] for _, read, kept in self.reads()]
        return torch.cat(parts).flatten(0, 1)

    def codes(self, sae: SparseAutoencoder) -> Codes:
        """The features of every token, those that are not zero. Padding of the text has none: it is of no prompt."""
        device, parts = sae.W_dec.device, list[tuple[np.ndarray, ...]]()
        for rows, run, kept in self._runs():
            values, used = run.floats()[torch.from_numpy(kept)].float(), Filters().used(run)
            with torch.no_grad():
                found = sae.encode_sparse(values.to(device))
            active = found.values > 0
            if used is not None:
                active &= used[torch.from_numpy(kept)].reshape(-1, 1).to(device)
            token, column = torch.nonzero(active, as_tuple=True)
            columns = (
                (token + rows.start * self.tokens_per_image).to(torch.int32),
                found.indices[token, column].to(torch.int32),
                found.values[token, column].float(),
            )
            parts.append(tuple(one.cpu().numpy() for one in columns))
        token_, feature, value = (np.concatenate(one) for one in zip(*parts, strict=True))
        return Codes(token_, feature, value, self.images * self.tokens_per_image, sae.config.d_sae)

    def _bits(self, question: Question) -> np.ndarray:
        bits = self.labels.of(question)
        if not question.of_tokens or self._positions is None:
            return bits
        return np.take_along_axis(bits, self._positions, axis=1)

    @cached_property
    def _positions(self) -> np.ndarray | None:
        """Which patches were kept of each picture: int64 [images, tokens]; None: all of them."""
        if not self.has_patches or self.tokens_per_image == self.labels.tokens.shape[2]:
            return None
        parts = [run.positions[torch.from_numpy(kept)].numpy() for _, run, kept in self._runs()]
        return np.concatenate(parts).astype(np.int64)

    def _runs(self) -> Iterator[tuple[range, TokenRun, np.ndarray]]:
        """Tokens read together, as `reads` says."""
        for rows, read, kept in self.reads():
            yield rows, self.source.read_run(read, self.site, self.step), kept


class FeatureBoard:
    """The features of an autoencoder on a part, ready for questions: by token, and the largest of each picture."""

    def __init__(self, part: Part, sae: SparseAutoencoder) -> None:
        self.part = part
        self.codes = part.codes(sae)
        self.pooled = self.codes.pooled(part.tokens_per_image)

    @cached_property
    def _ranked(self) -> tuple[Ranked, Ranked]:
        return Ranked(self.codes), Ranked(self.pooled)

    def aurocs(self, comparison: Comparison, order: np.ndarray | None = None) -> np.ndarray:
        """AUROC of every feature; with `order` under other label maps, as `Part.flags` says."""
        return self._of(comparison).auroc(*self.part.flags(comparison, order))

    def auroc_of(self, comparison: Comparison, feature: int, order: np.ndarray | None = None) -> float:
        """AUROC of one feature."""
        return self._of(comparison).auroc_of(feature, *self.part.flags(comparison, order))

    def scores(self, comparison: Comparison, feature: int) -> np.ndarray:
        """One feature of every token, or picture: float32."""
        return (self.codes if comparison.question.of_tokens else self.pooled).column(feature)

    def _of(self, comparison: Comparison) -> Ranked:
        return self._ranked[0] if comparison.question.of_tokens else self._ranked[1]
