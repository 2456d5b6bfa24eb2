"""The captures that edits are picked on: how they were sampled, what their patches and words are known to be.

`score_steering` picks directions with them, and counts on scenes of other captions.
"""

from functools import cached_property
from pathlib import Path

import torch

from flux_ir.activations.blocks import SampledSource, Sampling, TokenSource
from flux_ir.activations.source import open_source
from flux_ir.api.evaluate_sae import load_for
from flux_ir.api.known_labels import labels_of
from flux_ir.api.progress import Watch
from flux_ir.demo.captions import part_of
from flux_ir.demo.scenes import Scene, parse_caption
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.held_out import evaluation_data_of
from flux_ir.sites import Site
from flux_ir.studies.candidates import Subject, is_text
from flux_ir.studies.caption_words import caption_labels
from flux_ir.studies.causal import PICK, REPORT
from flux_ir.studies.concepts import limited
from flux_ir.studies.labels import Labels


class SteeringCaptures:
    """Captures of flux-tiny's world. What the judge finds in their pictures stays in the folder `judged`."""

    def __init__(self, path: str | Path, judged: Path, max_tokens: int, progress: Watch) -> None:
        self.path, self.judged, self.max_tokens, self.progress = path, judged, max_tokens, progress
        self.source = open_source(path)
        self._labels: dict[bool, Labels] = {}

    @cached_property
    def sampling(self) -> Sampling:
        """How the captures were sampled: edits are made in the same way."""
        if self.source.model is None or not isinstance(self.source, SampledSource):
            raise FluxIRError(
                "edits are made as the captures were: these do not say how they were sampled",
                hint="collect with flux-ir collect --save_images",
            )
        first = self.source.sampling(0)
        steps = len(first.timesteps) - 1
        if list(self.source.steps) != list(range(steps)):
            raise FluxIRError(
                f"a mean difference is of every step: these captures have {', '.join(map(str, self.source.steps))} of "
                f"{steps} steps",
                hint=f"collect with --steps {','.join(map(str, range(steps)))}",
            )
        fresh = [one.prompt for one in self.source.generations if part_of(one.prompt) == REPORT]
        if fresh:
            raise FluxIRError(
                f"the captures must share no caption with the scenes that are counted: got {fresh[0]!r}",
                hint=f"python -m flux_ir.demo.captions --part {PICK} prints captions to pick with",
            )
        return first

    def subject(self, folder: Path, device: torch.device) -> Subject:
        """The autoencoder of a folder, at its site. Raises FluxIRError for one of whole single blocks."""
        loaded = load_for(folder, self.source, None, self.progress)
        site = Site.parse(str(loaded.config.site))
        if site.stream is None and site.kind != "t5":  # of a whole single block patch 0 is not token 0
            raise FluxIRError(
                f"regions are of image tokens, or of words: {folder} is of {site}",
                hint="use an autoencoder of double.3.img, single.3.img, double.0.txt or t5.1, for example",
            )
        source = self.of_site(site)
        data = evaluation_data_of(loaded, source, held_out=0.0)
        sae = loaded.folded().requires_grad_(False).to(device)
        return Subject(folder, sae, site, data.filters.steps_of(source.steps))

    def of_site(self, site: Site) -> TokenSource:
        """The tokens of a site: layers of the text encoders are opened by their names."""
        return open_source(f"{self.path}/{site}") if site.per_prompt else self.source

    def labels(self, site: Site) -> Labels:
        """What a site's tokens are held against: words, or patches. All sites of the one kind have as many tokens."""
        of_words = is_text(site)
        if of_words not in self._labels:
            self._labels[of_words] = self._of_words(site) if of_words else self._of_patches(site)
        return self._labels[of_words]

    def _of_patches(self, site: Site) -> Labels:
        return labels_of(self.source, "captures", None, self.judged, self.max_tokens, site, self.progress)

    def _of_words(self, site: Site) -> Labels:
        scenes = [_scene(one.prompt) for one in self.source.generations]
        tokens = self.of_site(site).tokens(site)
        return limited(caption_labels(scenes, tokens), self.max_tokens // tokens, seed=0)


def _scene(prompt: str) -> Scene:
    try:
        return parse_caption(prompt)
    except ValueError as error:
        raise FluxIRError(
            f"the words of these captures are known of captions of flux-tiny's world alone: got {prompt!r}",
            hint=f"python -m flux_ir.demo.captions --part {PICK} prints such captions",
        ) from error
