"""Readings as pictures: decoded in batches, written by a pool of threads while the next batch is decoded.

Beside the pictures stand the numbers of `measures`, collected into one `lens.json` per run.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.layout import Lens, RunFolder
from flux_ir.lens.measures import cosine, json_number, psnr_db, relative_distance
from flux_ir.lens.readout import Reading, VelocityReader, read_step, readable_sites
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.recording.reader import Capture
from flux_ir.sampling.generate import decode
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.shapes import PackedLatent, Pixels
from flux_ir.sites import Site
from flux_ir.threads import in_order

ROUNDING_DRIFT = 0.01
"""The most that rounding alone makes of `LensDecoder.drift` (bf16 on another device, with much to spare)."""
OTHER_WEIGHTS_DRIFT = 0.25
"""Beyond it the capture is damaged, or was made with other weights: nothing is decoded unless that is asked for."""
WRITER_THREADS = 2  # JPEG encoding of one batch keeps pace with decoding the next
WAITING_PICTURES = 64  # no more than this many pictures wait to be written
# Handed to the decoder at once, where no batch size is asked for: per thread on a CPU, in all on a GPU.
BATCH_PIXELS = {"cpu": 8 * 128 * 128, "cuda": 8 * 1024 * 1024}


class PictureKey(NamedTuple):
    """Which picture is meant: what one block would have drawn at one step, through one lens."""

    lens: Lens
    step: int
    site: Site


class Decoded(NamedTuple):
    """One picture on disk, and its likeness to the final one [dB], both as saved (None: equal, or no final picture)."""

    key: PictureKey
    path: Path
    psnr_db: float | None


class StepNumbers(NamedTuple):
    """How far one block's velocity is from the final velocity of the same step (None where that was not captured)."""

    step: int
    site: Site
    cosine: float | None
    relative_distance: float | None


def batch_size(height: int, width: int, device: torch.device) -> int:
    """Pictures decoded at once: as many as fit a fixed number of pixels, at least one."""
    pixels = BATCH_PIXELS["cuda"] if device.type == "cuda" else BATCH_PIXELS["cpu"] * torch.get_num_threads()
    return max(1, pixels // (height * width))


def read_picture(file: Path | BytesIO) -> Pixels:
    """A saved picture as pixels [1, height, width, 3]."""
    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))[None]


def compare_step(readings: Sequence[Reading], last_site: Site, *, fitted: bool = False) -> list[StepNumbers]:
    """Distances of the readings of one step from the sampler's: the plain one at `last_site` (or its image half), if it
    is among them. `fitted`: those of the velocities that were read through a fitted lens.
    """
    final = next((r.velocity for r in readings if r.site.whole == last_site), None)
    read = [(r, r.fitted_velocity if fitted else r.velocity) for r in readings]
    if final is None:
        return [StepNumbers(r.step, r.site, None, None) for r in readings]
    return [
        StepNumbers(r.step, r.site, cosine(velocity, final), relative_distance(velocity, final))
        for r, velocity in read
        if velocity is not None
    ]


class LensDecoder:
    """Decodes one capture into the pictures of a run folder. Iterate `pictures()`; `numbers` fills as it goes."""

    def __init__(
        self,
        capture: Capture,
        model: Transformer,
        autoencoder: AutoEncoder,
        folder: RunFolder,
        lenses: Sequence[Lens],
        *,
        final_picture: Pixels | None = None,
        batch: int | None = None,
        other_weights: bool = False,
        fitted: VelocityReader | None = None,
    ) -> None:
        """`other_weights`: the model may be another than the capture was made with, as the user wishes.

        `fitted` is what a lens that is neither euler nor x0 reads through.
        """
        self.capture, self.model, self.autoencoder, self.folder = capture, model, autoencoder, folder
        self.lenses = tuple(lenses)
        self.height, self.width = capture.metadata["height"], capture.metadata["width"]
        self.final_picture, self.other_weights = final_picture, other_weights
        device = autoencoder.decoder.conv_in.weight.device
        self.batch = batch or batch_size(self.height, self.width, device)
        self.last_site = Site.parse(f"single.{model.params.depth_single_blocks - 1}")
        self.fitted = fitted
        self.numbers: list[StepNumbers] = []
        self.fitted_numbers: list[StepNumbers] = []

    @cached_property
    def drift(self) -> float:
        """How far, at worst and relative to it, the sampler's next state is from the one read at the last block.

        Other weights than the capture was made with show here; the right ones leave nothing, or rounding on another
        device. 0 where neighbouring steps or the last block were not captured; infinite for values that are not finite.
        """
        read = [site for site in readable_sites(self.capture) if site.whole == self.last_site]
        pairs = [step for step in self.capture.steps if read and step + 1 in self.capture.steps]
        drifts = []
        for step in pairs:
            (last,) = read_step(self.model, self.capture, step, read)
            drifts.append(relative_distance(last.euler.cpu(), self.capture.context(step + 1).img))
        return max((drift if math.isfinite(drift) else math.inf for drift in drifts), default=0.0)

    def __len__(self) -> int:
        """How many pictures there will be."""
        return len(self.capture.steps) * len(readable_sites(self.capture)) * len(self.lenses)

    def pictures(self) -> Iterator[Decoded]:
        """Every picture once it is on disk, in the order of steps and depth.

        Raises FluxIRError, before anything is written, for a capture that these weights cannot have made.
        """
        if self.drift > OTHER_WEIGHTS_DRIFT and not self.other_weights:
            raise FluxIRError(
                f"{self.capture.path} is damaged, or was made with other weights: read at the last block, the next "
                f"state is {self.drift:.1%} off the sampler's",
                hint="capture again; with --checkpoint it is read by the weights you name, whatever they give",
            )
        jobs = ((key, pixels, row) for keys, pixels in self._batches() for row, key in enumerate(keys))
        written = in_order(
            lambda job: self._write(*job), jobs, WRITER_THREADS, most=WAITING_PICTURES, eager=True, torch_threads=None
        )
        with closing(written):
            yield from written

    def _batches(self) -> Iterator[tuple[list[PictureKey], Pixels]]:
        keys: list[PictureKey] = []
        latents: list[PackedLatent] = []
        for key, latent in self._latents():
            keys.append(key)
            latents.append(latent)
            if len(keys) == self.batch:
                yield keys, self._decode(torch.cat(latents))
                keys, latents = [], []
        if keys:
            yield keys, self._decode(torch.cat(latents))

    def _latents(self) -> Iterator[tuple[PictureKey, PackedLatent]]:
        for step in self.capture.steps:
            readings = list(read_step(self.model, self.capture, step, fitted=self.fitted))
            self.numbers += compare_step(readings, self.last_site)
            if self.fitted is not None:
                self.fitted_numbers += compare_step(readings, self.last_site, fitted=True)
            for reading in readings:
                for lens in self.lenses:
                    yield PictureKey(lens, step, reading.site), reading.latent(lens)

    def _decode(self, latents: PackedLatent) -> Pixels:
        return decode(self.autoencoder, latents, self.height, self.width, self.model.dtype)

    def _write(self, key: PictureKey, pixels: Pixels, index: int) -> Decoded:
        path = self.folder.decoded_image(key.lens, key.step, key.site.kind, key.site.block)
        encoded = jpeg_bytes(pixels, index)
        with complete_file(path) as beside:
            beside.write_bytes(encoded)
        # Both as JPEG: the last block of the last step is the final picture, and must come out equal to it.
        likeness = None if self.final_picture is None else psnr_db(read_picture(BytesIO(encoded)), self.final_picture)
        return Decoded(key, path, likeness)


def lens_report(
    decoder: LensDecoder, pictures: Iterable[Decoded], earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `lens.json`: per site a list over steps of what is known there.

    `earlier` is the content of a previous reading of the same capture; what this one did not compute is kept from it.
    """
    sites: dict[str, dict[int, dict[str, float | int | str | None]]] = {}
    for old_site, rows in (earlier or {}).get("sites", {}).items():
        sites[old_site] = {row["step"]: dict(row) for row in rows}
    for number in decoder.numbers:
        row = sites.setdefault(str(number.site), {}).setdefault(number.step, {"step": number.step})
        row |= {"cosine": json_number(number.cosine), "relative_distance": json_number(number.relative_distance)}
    for number in decoder.fitted_numbers:
        row = sites[str(number.site)][number.step]
        for lens in decoder.lenses:
            row |= {
                f"{lens}_cosine": json_number(number.cosine),
                f"{lens}_relative_distance": json_number(number.relative_distance),
            }
    for picture in pictures:
        row = sites[str(picture.key.site)][picture.key.step]
        row[f"psnr_{picture.key.lens}_db"] = json_number(picture.psnr_db)
    return {
        "generation_id": decoder.folder.generation_id,
        "reference": {
            "velocity": f"{decoder.last_site} of the same step",
            "picture": None if decoder.final_picture is None else decoder.folder.image().name,
        },
        "sites": {site: [rows[step] for step in sorted(rows)] for site, rows in sites.items()},
    }
