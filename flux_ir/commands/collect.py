"""`flux-ir collect`: activations of thousands of prompts, computed once. Also `python -m flux_ir.commands.collect`,
which is what `torchrun -m` starts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.front import launch
from flux_ir.options import REQUIRED, Options, option

PROMPTS, PICTURES, KEEP, WHERE = "the prompts", "the pictures", "what is kept", "model and machine"


@dataclass(frozen=True)
class CollectOptions(Options):
    """Collect what some sites put out over many prompts: one capture file per generation, in groups, with an index.

    The same command goes on where it stopped. Under torchrun all processes share the work:
    torchrun --nproc_per_node 2 -m flux_ir.commands.collect --prompts ... writes the same files, byte for byte.
    """

    prompts: Path = option(
        REQUIRED,
        help='a .txt file with a prompt per line, a .jsonl with rows that have "prompt", or a .csv with such a column',
        group=PROMPTS,
    )
    sites: tuple[str, ...] = option(
        REQUIRED, help="which sites to keep, as shell patterns such as double.18.img or single.3?", group=KEEP
    )
    output_dir: str = option(
        REQUIRED, help="the collection's folder, such as captures/NAME: new, or one to go on with", group=WHERE
    )
    repeats: int = option(1, help="generations per prompt, each from its own noise", group=PROMPTS, minimum=1)
    seed: int = option(
        0,
        help="base seed: the noise of a generation follows from it, the prompt and the repeat",
        group=PROMPTS,
        minimum=0,
        maximum=2**63 - 1,
    )
    model: str = option("flux-schnell", help="flux-schnell, flux-dev, flux-dev-krea or flux-tiny", group=PICTURES)
    width: int | None = option(
        None,
        help="width of the pictures",
        unit="px",
        group=PICTURES,
        multiple_of=16,
        minimum=16,
        default_text="256, or 128 for flux-tiny",
    )
    height: int | None = option(
        None,
        help="height of the pictures",
        unit="px",
        group=PICTURES,
        multiple_of=16,
        minimum=16,
        default_text="256, or 128 for flux-tiny",
    )
    num_steps: int | None = option(
        None,
        help="Euler steps of the schedule",
        group=PICTURES,
        minimum=1,
        default_text="the model's own: 4 for flux-schnell, 8 for flux-tiny, else 50",
    )
    guidance: float = option(2.5, help="guidance strength, for the guidance-distilled dev family", group=PICTURES)

    steps: tuple[int, ...] | None = option(
        None,
        help="which steps to keep, counted from 0; none after the last of them is computed",
        group=KEEP,
        minimum=0,
        default_text="every step",
    )
    tokens_per_image: int | None = option(
        None,
        help="image tokens to keep of every generation, at random places (text tokens are all kept)",
        group=KEEP,
        minimum=1,
        default_text="all",
    )
    dtype: Literal["bfloat16", "float16", "float32", "float8_e4m3fn"] = option(
        "bfloat16",
        help="precision of what is kept (float8 with a scale per token); the network runs in bfloat16, but for float32",
        group=KEEP,
    )
    save_images: bool = option(False, help="also keep the pictures: all steps run, and are decoded", group=KEEP)
    save_latents: bool = option(False, help="also keep the finished latents: all steps run", group=KEEP)

    batch_size: int | None = option(
        None,
        help="generations that go through the network together",
        group=WHERE,
        minimum=1,
        maximum=64,
        default_text="8 on a CPU; on a GPU what fits, found by trying",
    )
    verify: Literal["checksums", "sizes"] = option(
        "checksums", help="how files that are there already are looked at, before going on", group=WHERE
    )
    device: str | None = option(
        None, help="cpu, cuda or cuda:N", group=WHERE, default_text="the GPU of each process, or the CPU"
    )
    offload: bool = option(False, help="keep each part on the GPU only while it is needed", group=WHERE)
    checkpoint: Path | None = option(
        None,
        help="the transformer's weights: a .safetensors file or a diffusers folder",
        group=WHERE,
        default_text="environment, package, hub",
    )
    ae_checkpoint: Path | None = option(
        None, help="the autoencoder's weights, likewise", group=WHERE, default_text="environment, package, hub"
    )
    plan: bool = option(
        False, help="only say what it would take: tokens, bytes, memory and time, from a short trial", group=WHERE
    )


def run(options: CollectOptions) -> int:
    """Collect as the options say; returns the exit code. Raises FluxIRError for what a user can mend."""
    if options.plan:
        from flux_ir.commands.planning import plan_collection

        plan_collection(options)
        return 0
    from flux_ir.commands.collecting import collect

    return collect(options)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m flux_ir.commands.collect`: returns the exit code."""
    return launch(CollectOptions, run, argv, prog="flux-ir collect")


if __name__ == "__main__":
    sys.exit(main())
