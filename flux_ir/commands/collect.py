"""`flux-ir collect`: activations of thousands of prompts, computed once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import INTERRUPTED, launch
from flux_ir.commands.cli.shared import (
    KEEP,
    LARGEST_SEED,
    MACHINE,
    BegunPictureOptions,
    EditOptions,
    ModelOptions,
    PlanOptions,
    StepOptions,
)
from flux_ir.errors import FluxIRError

if TYPE_CHECKING:
    from flux_ir.api.collect import Collected
    from flux_ir.commands.report import Report

PROMPTS = "the prompts"


@dataclass(frozen=True, kw_only=True)
class CollectOptions(BegunPictureOptions, EditOptions, StepOptions, ModelOptions, PlanOptions):
    """Collect what some sites put out over many prompts, in shards of up to 64 generations, with an index.

    No step after the last of --steps is computed, unless pictures or latents are kept. The same command goes on where
    it stopped. Under torchrun all processes share the work: torchrun --nproc_per_node 2 -m flux_ir collect
    --prompts ... writes the same files, byte for byte.
    """

    prompts: Path = option(
        REQUIRED,
        help='a .txt file with a prompt per line, a .jsonl with rows that have "prompt", or a .csv with such a column',
        group=PROMPTS,
    )
    sites: tuple[str, ...] = option(
        REQUIRED, help="which sites to keep, as shell patterns such as double.18.img, single.3? or t5.12", group=KEEP
    )
    output_dir: str = option(
        REQUIRED, help="the collection's folder, such as captures/NAME: new, or one to go on with", group=MACHINE
    )
    max_prompts: int | None = option(
        None,
        help="take only the first so many prompts: 32 tell the pace of this machine, in tokens/s",
        group=PROMPTS,
        default_text="all of them",
    )
    repeats: int = option(1, help="generations per prompt, each from its own noise", group=PROMPTS)
    seed: int = option(
        0,
        help="base seed: the noise of a generation follows from it, the prompt and the repeat",
        group=PROMPTS,
        maximum=LARGEST_SEED,
    )

    tokens_per_image: int | None = option(
        None,
        help="image tokens to keep of every generation, at random places (text tokens are all kept)",
        group=KEEP,
        minimum=1,
        default_text="all",
    )
    store_dtype: Literal["bfloat16", "float16", "float32", "float8_e4m3fn"] = option(
        "bfloat16", help="precision of what is kept (float8 with a scale per token)", group=KEEP
    )
    save_images: bool = option(False, help="also keep the pictures: all steps run, and are decoded", group=KEEP)
    save_latents: bool = option(False, help="also keep the finished latents: all steps run", group=KEEP)

    batch_size: int | None = option(
        None,
        help="generations that go through the network together",
        group=MACHINE,
        default_text="8 on a CPU; on a GPU what fits, found by trying",
    )
    verify: Literal["checksums", "sizes"] = option(
        "checksums", help="how files that are there already are looked at, before going on", group=MACHINE
    )

    fsdp: bool = option(
        False,
        help="under torchrun: shard the transformer's blocks over all processes, for GPUs that cannot hold it alone",
        group=MACHINE,
    )

    def __post_init__(self) -> None:
        if self.dtype in ("float16", "float8_e4m3fn"):  # what --dtype meant once
            raise FluxIRError(
                f"--dtype is what the network computes in, auto, bfloat16 or float32: got {self.dtype!r}",
                hint=f"what is kept is said by --store_dtype {self.dtype}",
            )
        super().__post_init__()


def run(options: CollectOptions) -> int:
    """Collect as the options say; returns the exit code. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.collect import CollectArguments, run_collection
    from flux_ir.commands.report import Report

    arguments = CollectArguments(**options.given(CollectArguments))
    if options.plan:
        from flux_ir.commands.planning import plan_collection

        plan_collection(arguments, options)
        return 0
    # The first process of a job speaks for all. Torchrun's variable tells it, also when Ctrl-C has ended the job.
    is_first_rank = os.environ.get("RANK", "0") == "0"
    report = Report()
    try:
        with report:
            done = run_collection(arguments, report.watch)
    except KeyboardInterrupt:
        if is_first_rank:
            where = options.output_dir
            report.note(f"stopped: what is finished is kept in {where}; the same command goes on from there")
        return INTERRUPTED
    if is_first_rank:
        conclude(done, options, report)
    return 0


def conclude(done: "Collected", options: CollectOptions, report: "Report") -> None:
    """Print that the collection is complete, what it holds, and what collecting it took."""
    from flux_ir.commands.report import peak_memory
    from flux_ir.errors import in_units

    seconds = report.seconds.get("collect", 0.0)
    rows = [("generations", f"{done.generations}", f"{done.made} of them now"), ("tokens", f"{done.tokens}", "")]
    rows += [("bytes", in_units(done.bytes), "without index, statistics and embedded prompts")]
    rows += [(name, f"{value:.2f} s", "") for name, value in report.seconds.items()]
    if done.made and seconds:
        rows += [("speed", f"{done.made * done.tokens // done.generations / seconds:.0f} tokens/s", "")]
    rows += [
        (f"peak memory, {device}", in_units(size), "of the first process") for device, size in peak_memory().items()
    ]
    how = {"checksums": "size and checksum", "sizes": "size"}[options.verify]
    state = "complete" if done.made else f"complete; every file has its {how}"
    report.rows(f"collection {state}", [*rows, ("where", "", done.where)])


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CollectOptions, run, argv, prog=prog)
