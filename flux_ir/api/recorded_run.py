"""A run that is gone through again: how it was made, what it kept of its states, and whether these weights made it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.blocks import SampledSource, Sampling, loras_of, quantize_of
from flux_ir.activations.source import open_source
from flux_ir.api.lens import CaptureResult, capture_file
from flux_ir.api.model_settings import as_captured
from flux_ir.api.steer import SteerSettings
from flux_ir.collecting.collection import weights_digest
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import read_json
from flux_ir.models.checkpoints.paths import CACHE, HUB, PACKAGE
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.sites import nearest_names


class Recorded(NamedTuple):
    """The run whose picture is asked about."""

    sampling: Sampling
    model: str | None
    states: dict[int, Tensor]
    """What its steps began with, as far as that was kept: [1, tokens, channels]."""
    weights: tuple[str, bool] | None
    """The digest of the model's weights, and whether those of its autoencoder are in it; None: not known."""
    files: dict[str, Path]
    """Weights that the user named when the run was made, by part: transformer, autoencoder."""
    loras: Sequence[Mapping[str, Any]] = ()
    """LoRAs that it was made with: path, sha256 and strength of each."""
    quantize: Method | None = None
    """How the blocks of its model were quantised."""


def recorded_run(run: str | Path | CaptureResult, generation: str | None) -> Recorded:
    """The run of this name: what `capture` returned, a path, an id below `output`, or one `generation` of a collection.

    Raises FluxIRError for one that cannot be run again.
    """
    where = run
    if isinstance(run, CaptureResult) or run == "latest" or not Path(run).exists():
        where = capture_file(run, Path("output"))
    assert not isinstance(where, CaptureResult)
    source = open_source(where)
    if not isinstance(source, SampledSource):
        raise FluxIRError(f"{where} holds arrays: no run made them", hint="name a run's folder or a collection")
    number = _generation(generation, [one.id for one in source.generations], where)
    sampling = source.sampling(number)
    states = {step: source.state(number, step) for step in source.steps}
    return Recorded(
        sampling,
        source.model,
        {step: state[None] for step, state in states.items() if state is not None},
        _collected_with(Path(where)),
        _named_files(source.generations[number].path),
        loras_of(source),
        quantize_of(source),
    )


def _generation(given: str | None, ids: Sequence[str], path: str | Path) -> int:
    """Which generation of a source is meant: by its id, or by its number from 0."""
    if given is None:
        if len(ids) == 1:
            return 0
        raise FluxIRError(
            f"{path} holds {len(ids)} generations", hint=f"name one: --generation {ids[0]}, or its number from 0"
        )
    if given in ids:
        return ids.index(given)
    if given.isdecimal() and int(given) < len(ids):
        return int(given)
    raise FluxIRError(
        f"{path} has no generation {given}",
        hint=f"they are numbered 0 to {len(ids) - 1}, and the nearest ids are {nearest_names(given, ids)}",
    )


def _collected_with(path: Path) -> tuple[str, bool] | None:
    """What a collection says of the weights it was made with; None where it does not, or is none."""
    described = path / "collection.json"
    settings = read_json(described).get("settings", {}) if described.is_file() else {}
    return (settings["weights"], bool(settings.get("save_images"))) if "weights" in settings else None


def _named_files(capture: Path | None) -> dict[str, Path]:
    """The weights that the user named for a capture, as the metadata beside it says."""
    if capture is None:
        return {}
    beside = capture.with_name(capture.name.replace("capture_", "metadata_", 1)).with_suffix(".json")
    files = read_json(beside).get("files", {}) if capture.suffix == ".pt" and beside.is_file() else {}
    named = {part: said for part, said in files.items() if said["origin"] not in (PACKAGE, CACHE, HUB)}
    return {part: Path(named[part]["path"]) for part in ("transformer", "autoencoder") if part in named}


def as_recorded(settings: SteerSettings, recorded: Recorded) -> SteerSettings:
    """The same settings for the picture of this run. Raises FluxIRError for a run of another model."""
    model, run = settings.model, recorded.sampling
    name = model.spec.name if isinstance(model, Suite) else model
    if recorded.model is not None and recorded.model != name:
        raise FluxIRError(f"the run is one of {recorded.model}: got {name}", hint="leave --model out")
    picture = replace(
        settings,
        prompt=run.prompt,
        seed=run.seed,
        width=run.width,
        height=run.height,
        num_steps=len(run.timesteps) - 1,
        guidance=run.guidance,
    )
    if isinstance(model, Suite):
        return picture
    again = replace(
        picture,
        checkpoint=settings.checkpoint or recorded.files.get("transformer"),
        ae_checkpoint=settings.ae_checkpoint or recorded.files.get("autoencoder"),
        # A run in float32 is gone through in float32, whatever the device has: its states keep every digit.
        dtype="float32" if run.dtype == torch.float32 and settings.dtype == "auto" else settings.dtype,
    )
    return as_captured(again, recorded)


def check_run(recorded: Recorded, suite: Suite, timesteps: Sequence[float]) -> None:
    """Raises FluxIRError for a run that these weights, or this schedule, did not make."""
    made_with = [(lora["sha256"], lora["strength"]) for lora in recorded.loras]
    if made_with != [(lora.sha256, lora.strength) for lora in suite.source.loras]:
        raise FluxIRError(
            f"the run was made with {counted(len(made_with), 'LoRA')}, and others, or other strengths, are loaded now",
            hint="leave --lora out for those of the run",
        )
    if recorded.quantize != suite.source.quantize:
        raise FluxIRError(
            f"the run was made with --quantize {recorded.quantize}: got {suite.source.quantize}",
            hint="leave --quantize out for that of the run, and load a model likewise",
        )
    if recorded.weights is not None:
        digest, with_autoencoder = recorded.weights
        if weights_digest(suite.source, autoencoder=with_autoencoder) != digest:
            raise FluxIRError(
                f"the run was made with other weights of {suite.spec.name}",
                hint="name those with --checkpoint and --ae_checkpoint",
            )
    if list(recorded.sampling.timesteps) != list(timesteps):
        raise FluxIRError(
            "the run has another schedule than this program gives its size and number of steps",
            hint="capture it again",
        )
