"""`flux-ir capture` (and `capture_sample.py`): sample a picture, record every block, show what each would draw."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.front import launch
from flux_ir.options import Options, option

PICTURE, KEEP, READ, WHERE = "the picture", "what is recorded", "what is shown", "model and machine"


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Sample one picture, record what every block puts out at every step, and decode each block as if it were the last.

    Everything goes into a folder of its own below --output_dir, named by the generation id printed at the start.
    """

    prompt: str = option("a beautiful landscape", help="what to draw", group=PICTURE, free_text=True)
    model: str = option("flux-schnell", help="flux-schnell, flux-dev, flux-dev-krea or flux-tiny", group=PICTURE)
    width: int | None = option(
        None,
        help="width of the picture",
        unit="px",
        group=PICTURE,
        multiple_of=16,
        minimum=16,
        default_text="256, or 128 for flux-tiny",
    )
    height: int | None = option(
        None,
        help="height of the picture",
        unit="px",
        group=PICTURE,
        multiple_of=16,
        minimum=16,
        default_text="256, or 128 for flux-tiny",
    )
    seed: int | None = option(
        None,
        help="seed of the noise: the same seed gives the same picture",
        group=PICTURE,
        minimum=0,
        maximum=2**63 - 1,
        default_text="drawn at random and recorded",
    )
    num_steps: int | None = option(
        None,
        help="Euler steps",
        group=PICTURE,
        minimum=1,
        default_text="the model's own: 4 for flux-schnell, 8 for flux-tiny, else 50",
    )
    guidance: float = option(2.5, help="guidance strength, for the guidance-distilled dev family", group=PICTURE)
    add_sampling_metadata: bool = option(True, help="write the prompt into the picture's EXIF data", group=PICTURE)

    sites: tuple[str, ...] | None = option(
        None,
        help="which sites to record, as shell patterns such as double.*.img or single.3?",
        group=KEEP,
        default_text="every block's output",
    )
    steps: tuple[int, ...] | None = option(
        None, help="which steps to record, counted from 0", group=KEEP, minimum=0, default_text="every step"
    )

    should_decode_intermediates: bool = option(True, help="decode what each block would have drawn", group=READ)
    lens: Literal["euler", "x0", "both"] = option(
        "euler", help="euler: the state the sampler would go to; x0: the clean image the block believes in", group=READ
    )

    device: str | None = option(
        None, help="cpu, cuda or cuda:N", group=WHERE, default_text="the first GPU, or the CPU where there is none"
    )
    multi_gpu: bool = option(False, help="spread the parts of the model over the GPUs there are", group=WHERE)
    offload: bool = option(False, help="keep each part on the GPU only while it is needed", group=WHERE)
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", help="precision of the text encoders and the transformer, and of what is recorded", group=WHERE
    )
    checkpoint: Path | None = option(
        None,
        help="the transformer's weights: a .safetensors file or a diffusers folder",
        group=WHERE,
        default_text="environment, package, hub",
    )
    ae_checkpoint: Path | None = option(
        None, help="the autoencoder's weights, likewise", group=WHERE, default_text="environment, package, hub"
    )
    output_dir: Path = option(Path("output"), help="where the run's folder is made", group=WHERE)
    plan: bool = option(
        False, help="only say what it would take: tokens, bytes, memory and time, from a short trial", group=WHERE
    )


def run(options: CaptureOptions) -> None:
    """Capture as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    if options.plan:
        from flux_ir.commands.planning import plan_capture

        plan_capture(options)
        return
    from flux_ir.commands.generation import capture

    capture(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The script `capture_sample.py`: returns the exit code."""
    return launch(CaptureOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
