"""The autoencoder, the activations and the model behind a folder of features, for the stages that need them again."""

from dataclasses import replace

import torch

from flux_ir.activations.source import open_source
from flux_ir.api.model_settings import Machine, ModelSettings, as_captured
from flux_ir.api.progress import Watch
from flux_ir.api.score_features import open_scoring
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.scoring import Scoring
from flux_ir.models.suite import Suite


def scoring_of(folder: FeatureFolder, device: torch.device, progress: Watch) -> Scoring:
    """The autoencoder and the activations that a folder was scored with, opened again.

    Raises FluxIRError where one of the two is no longer what was scored: later numbers would be of other features.
    """
    scoring = open_scoring(
        folder.sae,
        folder.captures,
        site=folder.settings.site,
        steps=folder.steps,
        device=device,
        progress=progress,
    )
    if scoring.settings.digest != folder.settings.digest:
        raise FluxIRError(
            f"{folder.captures} or {folder.sae} has changed since {folder.path} was scored",
            hint="score again into another folder: flux-ir score-features --name",
        )
    return scoring


def captured_model(
    folder: FeatureFolder,
    settings: ModelSettings,
    machine: Machine,
    *,
    without: str,
    autoencoder: bool = True,
    text: bool = True,
    progress: Watch,
) -> Suite:
    """The model whose activations were captured, or the one that is chosen; nothing is loaded yet.

    Raises FluxIRError where neither says which one it is: `without` is the flag that does without a model.
    """
    name = settings.model or folder.settings.model
    if name is None:
        raise FluxIRError("the captures do not say which model they are of", hint=f"name it with --model, or {without}")
    settings = as_captured(replace(settings, model=name), open_source(folder.captures))
    return settings.suite(machine, progress, text=text, autoencoder=autoencoder)
