"""`flux-ir collect`: activations of thousands of prompts, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    KEEP,
    LARGEST_SEED,
    MACHINE,
    Checkpoints,
    Device,
    Offload,
    Picture,
    Plan,
    Steps,
)

PROMPTS = "the prompts"


@dataclass(frozen=True, kw_only=True)
class CollectOptions(Picture, Steps, Device, Offload, Checkpoints, Plan):
    """Collect what some sites put out over many prompts: one capture file per generation, in groups, with an index.

    No step after the last of --steps is computed. The same command goes on where it stopped. Under torchrun all
    processes share the work: torchrun --nproc_per_node 2 -m flux_ir collect --prompts ... writes the same files, byte
    for byte.
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
        REQUIRED, help="the collection's folder, such as captures/NAME: new, or one to go on with", group=MACHINE
    )
    repeats: int = option(1, help="generations per prompt, each from its own noise", group=PROMPTS, minimum=1)
    seed: int = option(
        0,
        help="base seed: the noise of a generation follows from it, the prompt and the repeat",
        group=PROMPTS,
        minimum=0,
        maximum=LARGEST_SEED,
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
        group=MACHINE,
        minimum=1,
        maximum=64,
        default_text="8 on a CPU; on a GPU what fits, found by trying",
    )
    verify: Literal["checksums", "sizes"] = option(
        "checksums", help="how files that are there already are looked at, before going on", group=MACHINE
    )


def run(options: CollectOptions) -> int:
    """Collect as the options say; returns the exit code. Raises FluxIRError for what a user can mend."""
    if options.plan:
        from flux_ir.commands.planning import plan_collection

        plan_collection(options)
        return 0
    from flux_ir.commands.collecting import collect

    return collect(options)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CollectOptions, run, argv, prog=prog)
