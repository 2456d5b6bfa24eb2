"""Makes flux-tiny, from nothing to the files in `flux_ir/models/assets/flux-tiny`: `python -m recipes.flux_tiny.train`.

Four stages, each with its own checkpoint in the run folder: the autoencoder, the text encoders, the flow model, the
export. Stop it whenever you like; the same command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from flux_ir.demo.drawing import SIDE_PX
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.registry import ASSETS
from recipes.flux_tiny.autoencoder import AE_PARAMS, AutoencoderConfig, measure_latents, train_autoencoder
from recipes.flux_tiny.checkpoints import Checkpoint
from recipes.flux_tiny.export import export
from recipes.flux_tiny.flow import (
    Bank,
    FlowConfig,
    TextToVelocity,
    bank_captions,
    encode_bank,
    start_model,
    train_flow,
)
from recipes.flux_tiny.text import Describer, TextConfig, build_clip, build_t5, build_tokenizer, train_text

console = Console(stderr=True)


@dataclass(frozen=True)
class Training:
    """One run folder and how its stages are trained."""

    run_dir: Path
    device: str
    autoencoder: AutoencoderConfig
    text: TextConfig
    flow: FlowConfig

    def checkpoint(self, stage: str) -> Checkpoint:
        """The checkpoint of one stage."""
        return Checkpoint(self.run_dir / f"{stage}.pt")


def follow(stage: str, total: int, numbers: Iterator[dict[str, float]], *, every: int = 50) -> None:
    """Draw the stage's progress; every so many steps write its numbers on a line of their own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(stage, total=total)
        for latest in numbers:
            done = int(latest.pop("step")) + 1
            progress.update(task, completed=done)
            if done % every == 0 or done == total:
                figures = "  ".join(f"{name} {value:.4f}" for name, value in latest.items())
                progress.console.print(f"{stage} {done}/{total}  {figures}", highlight=False)


def trained_autoencoder(training: Training) -> AutoEncoder:
    """The autoencoder of the run folder, its latents shifted and scaled to mean 0 and variance 1."""
    model = AutoEncoder(AE_PARAMS)
    model.load_state_dict(training.checkpoint("autoencoder").weights("model"))
    model.eval().requires_grad_(False)
    model.params = measure_latents(model, training.autoencoder.seed)
    return model


def trained_describer(training: Training) -> Describer:
    """The pre-trained text encoders of the run folder, with the heads that taught them."""
    tokenizer = build_tokenizer()
    describer = Describer(build_t5(tokenizer), build_clip(tokenizer))
    describer.load_state_dict(training.checkpoint("text").weights("model"))
    return describer


def trained_model(training: Training, *, averaged: bool = True) -> TextToVelocity:
    """The flow model and its text encoders as they stand: the moving average, or the weights themselves."""
    model = start_model(trained_describer(training), training.flow)
    model.load_state_dict(training.checkpoint("flow").weights("ema" if averaged else "model"))
    return model.eval().requires_grad_(False)


def load_bank(training: Training) -> Bank:
    """The encoded training scenes, computed once and kept in the run folder."""
    path = training.run_dir / f"bank_{training.flow.bank_scenes}.safetensors"
    if not path.exists():
        console.print(f"encoding {training.flow.bank_scenes} scenes into {path}")
        latents = encode_bank(trained_autoencoder(training).to(training.device), training.flow, training.device)
        with complete_file(path) as beside:
            save_file({"latents": latents}, beside)
    return Bank(load_file(path)["latents"], bank_captions(training.flow))


def train(training: Training) -> None:
    """All stages up to the export; a finished stage costs nothing."""
    ae = training.autoencoder
    follow("autoencoder", ae.steps, train_autoencoder(ae, training.checkpoint("autoencoder"), training.device))
    follow("text", training.text.steps, train_text(training.text, training.checkpoint("text")))
    model = start_model(trained_describer(training), training.flow)
    flow = train_flow(model, load_bank(training), SIDE_PX, training.flow, training.checkpoint("flow"), training.device)
    follow("flow", training.flow.steps, flow)


def parse(argv: list[str]) -> tuple[Training, Path, bool]:
    """The training, the folder to export to, and whether to export only."""
    parser = argparse.ArgumentParser(prog="python -m recipes.flux_tiny.train", description=__doc__)
    parser.add_argument("--run_dir", type=Path, default=Path("demo_runs/flux-tiny"), help="checkpoints go here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--flow_steps", type=int, default=FlowConfig.steps, help="optimiser steps of the flow model")
    parser.add_argument("--flow_batch", type=int, default=FlowConfig.batch, help="scenes per optimiser step")
    parser.add_argument("--export_dir", type=Path, default=ASSETS / "flux-tiny", help="where the finished model goes")
    parser.add_argument("--export_only", action="store_true", help="export the checkpoints as they stand")
    args = parser.parse_args(argv)
    flow = replace(FlowConfig(), steps=args.flow_steps, batch=args.flow_batch)
    training = Training(args.run_dir, args.device, AutoencoderConfig(), TextConfig(), flow)
    return training, args.export_dir, args.export_only


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, then export."""
    try:
        training, export_dir, export_only = parse(sys.argv[1:] if argv is None else argv)
        if not export_only:
            train(training)
        export(trained_autoencoder(training), trained_model(training), training.run_dir, export_dir)
    except FluxIRError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    console.print(f"flux-tiny is in {export_dir}; judge it with python -m recipes.flux_tiny.evaluate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
