"""Baselines for one autoencoder: made from the tokens it was trained on, judged on those it was not."""

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import Flux
from flux_ir.sae.data.held_out import EvaluationData
from flux_ir.sae.evaluation.baselines import ITDA, PCA, Baseline, Covariance, Neurons, RandomDictionary
from flux_ir.sae.evaluation.metrics import Evaluation, evaluate
from flux_ir.sites import Site

ITDA_TOKENS = 8  # per atom: most tokens are explained by others
ITDA_BYTES = 2 * 2**30
DRAW_SEED = 0


class BaselineFits:
    """Makes baselines from the training tokens of one subject. The covariance is computed once."""

    def __init__(self, subject: EvaluationData, *, fit_tokens: int, batch_tokens: int, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self.fit_tokens, self.batch_tokens = fit_tokens, batch_tokens

    @cached_property
    def covariance(self) -> Covariance:
        """The covariance of the training tokens."""
        covariance = Covariance(self.subject.source.d(self.subject.site), self.device)
        for batch in self.subject.tokens("training", self.batch_tokens, self.fit_tokens):
            covariance.add(batch.values.to(self.device))
        return covariance

    @property
    def mean(self) -> Tensor:
        """The mean of the training tokens, float32 [d]."""
        return self.covariance.mean.float()

    def pca(self, k: int) -> Baseline:
        """The k leading components; no more than there are dimensions."""
        return PCA.of(self.covariance, min(k, len(self.covariance.mean)))

    def random(self, d_sae: int, k: int) -> Baseline:
        """`d_sae` random directions, k of them at a time."""
        return RandomDictionary.draw(self.mean, d_sae, k, torch.Generator().manual_seed(DRAW_SEED))

    def itda(self, d_sae: int, k: int) -> Baseline:
        """At most `d_sae` of the training tokens, k of them at a time."""
        room = ITDA_BYTES // (4 * len(self.mean))
        most = min(ITDA_TOKENS * d_sae, room, self.fit_tokens)
        parts = [batch.values.float() for batch in self.subject.tokens("training", self.batch_tokens, most)]
        tokens = torch.cat(parts)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(DRAW_SEED))
        return ITDA.fit(tokens[order].to(self.device), self.mean, d_sae, k)


def evaluate_neurons(
    model: Flux,
    subject: EvaluationData,
    k: int,
    *,
    fit_tokens: int,
    batch_tokens: int,
    max_tokens: int | None,
    device: torch.device,
) -> tuple[Neurons, Evaluation]:
    """The neurons behind the subject's site, k of them at a time, and how much of what they all write these give back.

    What they have to give back is the feed-forward branch and not the block's output, which holds much more.

    Raises FluxIRError if the captures do not have the neurons.
    """
    site = neurons_of(subject)
    of_neurons = replace(subject, site=site)
    total, count = torch.zeros(subject.source.d(site), dtype=torch.float64, device=device), 0
    for batch in of_neurons.tokens("training", batch_tokens, fit_tokens):
        total += batch.values.to(device).double().sum(0)
        count += len(batch.values)
    neurons = Neurons.of(model, site, min(k, len(total)), rest=(total / max(1, count)).float())
    tokens = of_neurons.tokens(subject.side, batch_tokens, max_tokens)
    found = evaluate(neurons, tokens, d_sae=neurons.config.d_sae, device=device, target=neurons.target)
    return neurons, found


def neurons_of(subject: EvaluationData) -> Site:
    """The site of the neurons in the block of the subject's site. Raises FluxIRError if it was not captured."""
    if subject.site is None:
        raise FluxIRError("a plain array has no neurons", hint="leave neurons out of --baselines")
    site = replace(subject.site, part="neurons")
    if site not in subject.source.sites and site.whole not in subject.source.sites:
        raise FluxIRError(
            f"the baseline of neurons needs {site}, which these captures do not have",
            hint=f"collect it as well, with --sites {subject.site},{site}, or leave neurons out of --baselines",
        )
    return site
