"""`flux-ir lens`: decode an existing capture again, without sampling."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.front import launch
from flux_ir.options import REQUIRED, Options, option


@dataclass(frozen=True)
class LensOptions(Options):
    """Decode what each block of an existing capture would have drawn, without sampling again.

    Pictures, lens.json and the contact sheet of the run are written anew; everything else stays as it is.
    """

    generation_id: str = option(REQUIRED, help="the run: the name of its folder below --output_dir")
    lens: Literal["euler", "x0", "both"] = option(
        "euler", help="euler: the state the sampler would go to; x0: the clean image the block believes in"
    )
    decode_batch: int | None = option(
        None, help="pictures decoded at once", minimum=1, default_text="as many as fit a fixed number of pixels"
    )
    device: str | None = option(
        None, help="cpu, cuda or cuda:N", default_text="the first GPU, or the CPU where there is none"
    )
    checkpoint: Path | None = option(
        None,
        help="the transformer's weights: a .safetensors file or a diffusers folder",
        default_text="those the capture was made with",
    )
    ae_checkpoint: Path | None = option(
        None, help="the autoencoder's weights, likewise", default_text="those the capture was made with"
    )
    output_dir: Path = option(Path("output"), help="where the run's folder is")


def run(options: LensOptions) -> None:
    """Decode as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.commands.reading import read_again

    read_again(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return launch(LensOptions, run, argv, prog="flux-ir lens")


if __name__ == "__main__":
    sys.exit(main())
