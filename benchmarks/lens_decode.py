"""Decoding a capture: our lens against the original's way, which decodes one picture at a time and saves it in line."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from capturing import Sampling, Setting, settings
from measure import Target, arguments, interleaved, machine, parse, print_report

from flux_ir.layout import RunFolder
from flux_ir.lens.decode import LensDecoder
from flux_ir.lens.readout import read_step
from flux_ir.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import get_spec
from flux_ir.recording.reader import Capture, load_capture
from flux_ir.sampling.generate import to_pixels
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import unpack

TARGET = Target("least", 1.5)
PUBLISHED = get_spec("flux-schnell").autoencoder


class Case(NamedTuple):
    """An autoencoder, and the capture whose blocks it decodes."""

    name: str
    autoencoder: AutoEncoderParams
    setting: Setting
    target: Target | None = None


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--full", action="store_true", help="also the published autoencoder, on a GPU")
    options = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(case, Path(folder) / str(i), options) for i, case in enumerate(cases(full=options.full))]
    columns = ["autoencoder", "pictures", "one by one [pictures/s]", "ours [pictures/s]", "ratio", "target"]
    print_report("Lens: pictures per second", columns, rows, machine(options.device))


def cases(*, full: bool) -> list[Case]:
    """What is decoded: flux-tiny's pictures, and larger ones with an autoencoder of half the published width."""
    tiny = settings()["tiny"]
    half = replace(PUBLISHED, ch=PUBLISHED.ch // 2)
    every = [
        Case("flux-tiny's", get_spec("flux-tiny").autoencoder, tiny, TARGET),
        Case("half the published width", half, tiny._replace(side_px=256, steps=1)),
    ]
    if full:
        every += [Case("published size", PUBLISHED, tiny._replace(side_px=side, steps=4)) for side in (256, 1024)]
    return every


def row(case: Case, folder: Path, options: argparse.Namespace) -> list[str]:
    """One capture decoded both ways in turns."""
    sampling = Sampling(case.setting, options.device)
    sampling.captured(folder / "capture.pt")
    capture = load_capture(folder / "capture.pt")
    torch.manual_seed(0)
    autoencoder = AutoEncoder(case.autoencoder).to(options.device).eval().requires_grad_(False)
    ours, theirs = (RunFolder(folder, name) for name in ("00000000", "11111111"))
    ways: dict[str, Callable[[], object]] = {
        "one by one": lambda: one_by_one(capture, sampling.model, autoencoder, theirs),
        "ours": lambda: all_pictures(capture, sampling.model, autoencoder, ours),
    }
    seconds = interleaved(ways, options.repetitions, device=options.device)
    ratio = seconds["one by one"] / seconds["ours"]
    count = len(LensDecoder(capture, sampling.model, autoencoder, ours, ["euler"]))
    return [
        f"{case.name}, {case.setting.side_px} px",
        str(count),
        f"{count / seconds['one by one']:.2f}",
        f"{count / seconds['ours']:.2f}",
        f"{ratio:.2f}",
        case.target.verdict(ratio) if case.target else "none",
    ]


def all_pictures(capture: Capture, model: Flux, autoencoder: AutoEncoder, folder: RunFolder) -> None:
    """Ours, with everything that the command does: comparing every picture with a final one as well."""
    side = capture.metadata["height"]
    final = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    for _ in LensDecoder(capture, model, autoencoder, folder, ["euler"], final_picture=final).pictures():
        pass


@torch.no_grad()
def one_by_one(capture: Capture, model: Flux, autoencoder: AutoEncoder, folder: RunFolder) -> None:
    """The original's way: read, decode and save one block's picture, then the next."""
    side = capture.metadata["height"]
    device = autoencoder.decoder.conv_in.weight.device
    for step in capture.steps:
        for reading in read_step(model, capture, step):
            latent = unpack(reading.euler.float(), side, side).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                picture = autoencoder.decode(latent)
            path = folder.decoded_image("euler", step, reading.site.kind, reading.site.block)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg_bytes(to_pixels(picture)))


if __name__ == "__main__":
    main()
