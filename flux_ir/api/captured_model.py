"""The autoencoder, the activations and the model behind a folder of features, for the stages that need them again."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flux_ir.api.progress import Note, Watch
from flux_ir.api.score_features import open_scoring
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.scoring import Scoring
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.compute_dtype import DtypeWord, choose_dtype
from flux_ir.models.placement import Placement
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model is run again, from which files, and how."""

    name: str | None
    """None: the one that was captured."""
    dtype: DtypeWord
    checkpoint: str | Path | None
    ae_checkpoint: str | Path | None
    device: str | None


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
    choice: ModelChoice,
    placement: Placement,
    *,
    without: str,
    autoencoder: bool = True,
    text: bool = True,
    progress: Watch,
) -> Suite:
    """The model whose activations were captured, or the one that is chosen; nothing is loaded yet.

    Raises FluxIRError where neither says which one it is: `without` is the flag that does without a model.
    """
    name = choice.name or folder.settings.model
    if name is None:
        raise FluxIRError("the captures do not say which model they are of", hint=f"name it with --model, or {without}")
    source = locate_model(
        get_spec(name),
        choice.checkpoint,
        choice.ae_checkpoint,
        autoencoder=autoencoder,
        text=text,
        announce=lambda line: progress(Note(line)),
    )
    return Suite(get_spec(name), source, placement, choose_dtype(choice.dtype, placement.devices).dtype)
