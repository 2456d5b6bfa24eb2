"""Both models' lens pictures of one generation, as two run folders that the explorer shows side by side.

They hold no capture: each block is read while it runs. `difference.json` beside the pictures says how far the block's
output is from that of the other run.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux_ir.api.model_comparison import RUNS, ComparisonFolder, Generated, side
from flux_ir.api.model_settings import SettledPicture
from flux_ir.api.visualize import VisualizationSettings
from flux_ir.api.visualize import draw as draw_sheets
from flux_ir.features.contents import digest_of
from flux_ir.files import complete_file, write_json
from flux_ir.layout import RunFolder
from flux_ir.lens.decode import batch_size, read_picture
from flux_ir.lens.measures import cka_of, cosine, json_number, psnr_db, relative_distance
from flux_ir.models.architecture import Transformer, block_names
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.denoise import Step, clean_estimate, per_sample
from flux_ir.sampling.generate import decode
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.shapes import Conditioning, ImgTokens, PackedLatent, Velocity
from flux_ir.studies.likeness import Likeness, Table
from flux_ir.studies.paired_runs import REFERENCE

MOST_LENS_STEPS = 8
"""Steps whose blocks are decoded, evenly spaced over the schedule."""


class ComparedRuns:
    """Reads the blocks of the reference and of the run called `follows` as they come, and leaves a folder for each."""

    def __init__(
        self,
        folder: ComparisonFolder,
        one: Generated,
        follows: str,
        networks: Sequence[Transformer],
        described: Sequence[Mapping[str, Any]],
        guidances: Sequence[float],
        text: TextEmbedding,
        picture: SettledPicture,
    ) -> None:
        self._one, self._follows, self._networks, self._picture = one, follows, networks, picture
        self._described, self._guidances, self._text = described, guidances, text
        self._folders = run_folders(folder, one)
        steps = np.linspace(0, picture.num_steps - 1, min(picture.num_steps, MOST_LENS_STEPS))
        self._steps = sorted(set(steps.round().astype(int).tolist()))
        self._number = 0
        self._vecs: list[Conditioning] = []
        self._velocities: list[dict[str, Velocity]] = [{}, {}]
        self._rows: list[dict[str, list[dict[str, Any]]]] = [{}, {}]

    @torch.no_grad()
    def take(self, run: str, block: str, first: ImgTokens, other: ImgTokens) -> None:
        """The image tokens that a block put out in both."""
        if run != self._follows or self._number not in self._steps:
            return
        if not self._vecs:
            state = first[:, :1]
            y, time_ = self._text.y.to(state), per_sample(self._picture.timesteps[self._number], state)
            self._vecs = [
                network.conditioning(time_, y, None if network.guidance_in is None else per_sample(guidance, state))
                for network, guidance in zip(self._networks, self._guidances, strict=True)
            ]
        for network, vec, kept, img in zip(self._networks, self._vecs, self._velocities, (first, other), strict=True):
            kept[block] = network.read_out(img, vec)

    def draw(self, autoencoder: AutoEncoder, done: Mapping[str, Step]) -> None:
        """The pictures of a step that has been taken."""
        steps = done[REFERENCE], done[self._follows]
        for folder, step, kept, rows in zip(self._folders, steps, self._velocities, self._rows, strict=True):
            clean = {block: clean_estimate(step.before, velocity, step.t_curr) for block, velocity in kept.items()}
            self._write(autoencoder, folder, step.number, clean)
            for block, velocity in kept.items():
                row = {
                    "step": step.number,
                    "cosine": json_number(cosine(velocity, step.velocity)),
                    "relative_distance": json_number(relative_distance(velocity, step.velocity)),
                }
                rows.setdefault(block, []).append(row)
            kept.clear()
        self._vecs = []
        self._number += 1

    def _write(self, autoencoder: AutoEncoder, folder: RunFolder, step: int, clean: Mapping[str, PackedLatent]) -> None:
        (width, height), names = self._picture.grid, list(clean)
        together = batch_size(height, width, autoencoder.decoder.conv_in.weight.device)
        for start in range(0, len(names), together):
            some = names[start : start + together]
            pixels = self._decoded(autoencoder, torch.cat([clean[name] for name in some]))
            for row, name in enumerate(some):
                kind, number = name.split("_blocks.")
                with complete_file(folder.decoded_image("x0", step, kind, int(number))) as beside:
                    beside.write_bytes(jpeg_bytes(pixels, row))

    def _decoded(self, autoencoder: AutoEncoder, latents: PackedLatent) -> torch.Tensor:
        (width, height) = self._picture.grid
        return decode(autoencoder, latents, height, width, self._networks[0].dtype)

    def finish(self, autoencoder: AutoEncoder, last: Mapping[str, Step], table: Table) -> None:
        """The finished pictures, the numbers, and a sheet of both side by side; no folder of the two is left half."""
        latents = [last[name].after for name in (REFERENCE, self._follows)]
        for number, (folder, latent) in enumerate(zip(self._folders, latents, strict=True)):
            pixels, timestamp = self._decoded(autoencoder, latent), time.strftime("%Y%m%d_%H%M%S")
            name = side(self._described[number])
            with complete_file(folder.image()) as beside:
                beside.write_bytes(jpeg_bytes(pixels, model=name, prompt=self._one.prompt))
            metadata = {
                "generation_id": folder.generation_id,
                "model": name,
                "prompt": self._one.prompt,
                "width": self._picture.grid.width,
                "height": self._picture.grid.height,
                "num_steps": self._picture.num_steps,
                "timesteps": self._picture.timesteps,
                "seed": self._one.seed,
                "guidance": self._guidances[number],
                "timestamp": timestamp,
                "compared": self._follows,
            }
            write_json(folder.metadata_file(timestamp, f"{number}_{self._described[number]['model']}"), metadata)
            write_json(folder.lens_json, self._lens_report(folder, self._rows[number]))
        likeness = {
            block: {
                step: table.values[self._follows]["img"][block.replace("_blocks", "")][step] for step in self._steps
            }
            for block in block_names(self._networks[0].params)
        }
        write_differences(self._folders, self._follows, likeness)
        draw_side_by_side(self._folders)

    def _lens_report(self, folder: RunFolder, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """As `lens.decode.lens_report`, with the likeness of each picture to the finished one, both as saved."""
        finished = read_picture(folder.image())
        for block, of_block in rows.items():
            kind, number = block.split("_blocks.")
            for row in of_block:
                picture = read_picture(folder.decoded_image("x0", row["step"], kind, int(number)))
                row["psnr_x0_db"] = json_number(psnr_db(picture, finished))
        return {
            "generation_id": folder.generation_id,
            "reference": {"velocity": "the last block of the same step", "picture": folder.image().name},
            "sites": {block.replace("_blocks", ""): list(of_block) for block, of_block in rows.items()},
        }


def run_folders(folder: ComparisonFolder, one: Generated) -> list[RunFolder]:
    """The folders of both runs of a generation, by ids that follow from the comparison."""
    ids = [digest_of([folder.digest, list(one), number])[:8] for number in (0, 1)]
    return [RunFolder(folder.path / RUNS, name) for name in ids]


def write_differences(folders: Sequence[RunFolder], mode: str, likeness: Mapping[str, Mapping[int, Likeness]]) -> None:
    """difference.json of both runs: by block a list over steps of how far it is from the other run's."""
    sites = {
        block.replace("_blocks", ""): [
            {
                "step": step,
                "distance": json_number(one.distance),
                "cosine": json_number(one.cosine),
                "cka": None if one.hsic is None else json_number(cka_of([one.hsic])),
            }
            for step, one in of_block.items()
        ]
        for block, of_block in likeness.items()
    }
    for folder, other in zip(folders, reversed(folders), strict=True):
        write_json(folder.difference_json, {"other": other.generation_id, "mode": mode, "sites": sites})


def draw_side_by_side(folders: Sequence[RunFolder]) -> None:
    """A contact sheet of both, A and B, in the folder of the first."""
    first, other = folders
    draw_sheets(
        VisualizationSettings(
            generation_id=first.generation_id,
            compare=other.generation_id,
            lens="x0",
            output_format="png",
            output_dir=first.output_dir,
        )
    )


def copied_run(source: Path, target: RunFolder) -> bool:
    """What the explorer shows of a run, without its capture. False where nothing of it was decoded."""
    inside = source / target.intermediates.name
    if not any(inside.glob("decoded*/step_*/*.jpg")) or not any(inside.glob("metadata_*.json")):
        return False
    shutil.copytree(source, target.path, ignore=shutil.ignore_patterns("*.pt", "*.html"), dirs_exist_ok=True)
    return True
