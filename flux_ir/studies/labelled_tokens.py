"""The labelled pictures of a collection at one site and step: tokens, features, answers, and the block's neurons."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.blocks import NoisySource, SampledSource, TokenRun, TokenSource
from flux_ir.collecting.embeddings import embed_prompts
from flux_ir.errors import FluxIRError, counted
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Intervention
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.filters import Filters
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import noise_for, prepare
from flux_ir.shapes import Tokens
from flux_ir.sites import Site
from flux_ir.studies.auroc import Codes, RankedCodes
from flux_ir.studies.labels import Labels, Question, Task, split

_IMAGES_AT_ONCE = 64  # that are read together
_BATCH = 16  # pictures of one forward of the model


@dataclass(frozen=True)
class LabelledTokens:
    """The labelled pictures of a source at one site and step; of a single block stored whole, its image half.

    Raises FluxIRError for labels of other patches than the source has.
    """

    source: TokenSource
    labels: Labels
    site: Site | None
    step: int

    def __post_init__(self) -> None:
        if self.site is not None and self.site.stream is None and not self.site.per_prompt:
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

    def tasks(self) -> list[Task]:
        """The tasks that these tokens can be held against: those about tokens need patches."""
        return [one for one in self.labels.tasks() if self.has_patches or not one.question.of_tokens]

    def flags(self, task: Task, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Which are positive, and which count: bool [images * tokens], or [images].

        With `order` picture i gets the label map of picture order[i].
        """
        bits = self._bits(task.question) if order is None else self._bits(task.question)[order]
        positive, counted = split(bits, task.negatives)
        return positive.reshape(-1), counted.reshape(-1)

    def counts(self, task: Task) -> tuple[int, int]:
        """How many are positive, and how many negative."""
        positive, counted = self.flags(task)
        return int(positive.sum()), int(counted.sum() - positive.sum())

    def groups(self, task: Task) -> np.ndarray:
        """The number of the prompt of each token, or picture: int64."""
        groups = self.labels.groups
        return np.repeat(groups, self.tokens_per_image) if task.question.of_tokens else groups

    def reads(self) -> Iterator[tuple[range, range, np.ndarray]]:
        """What to read together: labelled pictures, the generations to read, and the index of each picture in these."""
        images = self.labels.images
        for whole in self.source.runs:
            for start in range(whole.start, whole.stop, _IMAGES_AT_ONCE):
                stop = min(start + _IMAGES_AT_ONCE, whole.stop)
                first, last = (int(index) for index in np.searchsorted(images, [start, stop]))
                if last > first:
                    read = range(int(images[first]), int(images[last - 1]) + 1)
                    yield range(first, last), read, images[first:last] - read.start

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        """The pictures in order, some at a time: their range, and their tokens [images, tokens, d] in float32."""
        for rows, run, kept in self._runs():
            yield rows, run.floats()[torch.from_numpy(kept)].float()

    @cached_property
    def used(self) -> Tensor | None:
        """Which tokens are not padding of a text: bool [images, tokens]. None: all.

        A text encoder's own layers have padding too, and no stream, so this goes by what the tokens say of themselves.
        Raises FluxIRError for a picture whose text is all padding: there is nothing to read.
        """
        if self.site is not None and self.site.stream == "img":
            return None
        parts = list[Tensor]()
        for _, run, kept in self._runs():
            used, chosen = Filters().used(run), torch.from_numpy(kept)
            parts.append(torch.ones(len(kept), self.tokens_per_image).bool() if used is None else used[chosen])
        kept_tokens = torch.cat(parts)
        if bool(kept_tokens.all()):
            return None
        if empty := int((~kept_tokens.any(1)).sum()):
            raise FluxIRError(
                f"every text must have a token that is no padding: {counted(empty, 'generation')} of {self.site} "
                "have none",
                hint="give the labels of generations with a prompt",
            )
        return kept_tokens

    def values(self) -> Tensor:
        """All tokens of the labelled pictures, as stored: [images * tokens, d]."""
        return torch.cat([run.floats()[torch.from_numpy(kept)].flatten(0, 1) for _, run, kept in self._runs()])

    @property
    def has_noisy(self) -> bool:
        """Whether the source kept the noisy latent of each patch before the step."""
        return self.has_patches and isinstance(self.source, NoisySource)

    @property
    def noisy_width(self) -> int | None:
        """Channels of such a latent; None if they were not kept."""
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
        """The non-zero features of every token. Padding of a text has none: it belongs to no prompt."""
        device, parts = sae.W_dec.device, list[tuple[np.ndarray, ...]]()
        for rows, run, kept in self._runs():
            values, used = run.floats()[torch.from_numpy(kept)].float(), Filters().used(run)
            with torch.no_grad():
                encoded = sae.encode_sparse(values.to(device))
            active = encoded.values > 0
            if used is not None:
                active &= used[torch.from_numpy(kept)].reshape(-1, 1).to(device)
            token, column = torch.nonzero(active, as_tuple=True)
            columns = (
                (token + rows.start * self.tokens_per_image).to(torch.int32),
                encoded.indices[token, column].to(torch.int32),
                encoded.values[token, column].float(),
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
    """The features of labelled tokens, sorted for AUROC: those of every token, and the largest of each picture."""

    def __init__(self, part: LabelledTokens, sae: SparseAutoencoder) -> None:
        self.part = part
        self.codes = part.codes(sae)
        self.pooled = self.codes.pooled(part.tokens_per_image)

    @cached_property
    def _ranked(self) -> tuple[RankedCodes, RankedCodes]:
        return RankedCodes(self.codes), RankedCodes(self.pooled)

    def aurocs(self, task: Task, order: np.ndarray | None = None) -> np.ndarray:
        """AUROC of every feature; with `order` under other label maps, as `LabelledTokens.flags` says."""
        return self._of(task).auroc(*self.part.flags(task, order))

    def auroc_of(self, task: Task, feature: int, order: np.ndarray | None = None) -> float:
        """AUROC of one feature."""
        return self._of(task).auroc_of(feature, *self.part.flags(task, order))

    def scores(self, task: Task, feature: int) -> np.ndarray:
        """One feature of every token, or picture: float32."""
        return (self.codes if task.question.of_tokens else self.pooled).column(feature)

    def _of(self, task: Task) -> RankedCodes:
        return self._ranked[0] if task.question.of_tokens else self._ranked[1]


# ---- Feed-forward neurons of the same tokens


def neurons_site(part: LabelledTokens) -> Site | None:
    """The feed-forward neurons of the same block; None for a plain array, which has no block."""
    return None if part.site is None else replace(part.site, part="neurons")


def has_neurons(part: LabelledTokens) -> bool:
    """Whether the collection kept the neurons."""
    site = neurons_site(part)
    return site is not None and bool({site, site.whole} & set(part.source.sites))


def stored_neurons(part: LabelledTokens) -> Tensor:
    """The neurons of every token as the collection kept them: [images * tokens, neurons]."""
    return replace(part, site=neurons_site(part)).values()


def run_neurons(part: LabelledTokens, suite: Suite) -> Tensor:
    """The neurons of every token, from one forward of the model on the noisy latents that the collection kept.

    Raises FluxIRError if it kept none, or not those of all patches.
    """
    site, source = neurons_site(part), part.source
    if site is None or not isinstance(source, NoisySource) or not isinstance(source, SampledSource):
        raise FluxIRError(
            "neurons are computed from the noisy latents of a collection of flux-ir collect: these captures have none",
            hint="leave --run_model out",
        )
    first = source.sampling(0)
    with suite.text_encoders() as encoders:
        prompts = list(dict.fromkeys(part.labels.prompts))
        embedded = dict(zip(prompts, embed_prompts(encoders, prompts), strict=True))
    found: list[Tensor] = []

    def keep(value: Tokens, step: int) -> Tokens:
        found.append(value.to("cpu", torch.bfloat16))
        return value

    device, dtype, step = suite.placement.transformer, suite.dtype, part.step
    noise = noise_for([0], first.height, first.width, device, dtype)  # only its shape is used
    with suite.transformer() as model, Intervention(model, {site: keep}), torch.no_grad():
        for rows, read, kept in part.reads():
            latents = source.noisy(read, step)[torch.from_numpy(kept)]
            for batch in torch.split(torch.arange(len(rows)), _BATCH):
                texts = zip(*(embedded[part.labels.prompts[rows[int(i)]]].text for i in batch), strict=True)
                of_batch = noise.expand(len(batch), -1, -1, -1)
                inputs = prepare(of_batch, TextEmbedding(*map(torch.cat, texts)), first.height, first.width)
                img = latents[batch].to(device, dtype)
                if img.shape != inputs.img.shape:
                    raise FluxIRError(
                        f"neurons are computed from the latents of all {inputs.img.shape[1]} patches: the collection "
                        f"kept {img.shape[1]} of a picture",
                        hint="leave --run_model out, or collect without --tokens_per_image",
                    )
                time, guidance = per_sample(first.timesteps[step], img), per_sample(first.guidance, img)
                model(img, inputs.img_ids, inputs.txt, inputs.txt_ids, time, inputs.y, guidance)
    return torch.cat(found).flatten(0, 1)
