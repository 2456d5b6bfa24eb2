"""`flux-ir collect-clip`: CLIP's activations of pictures, and of their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, ComputeOptions
from flux_ir.errors import FluxIRError

COLLECTED = "what is collected"


@dataclass(frozen=True, kw_only=True)
class CollectClipOptions(ComputeOptions):
    """Collect CLIP's activations of many pictures: the vision hidden_states[-2], as training data.

    They go below --output_dir as a collection: shards with clip.image [images, tokens, d] and, where there are
    captions, clip.text [images, 1, d], the pooled text; and index.jsonl, which says what is where. The same command
    goes on where it was stopped.
    """

    images: Path = option(
        REQUIRED,
        help="a folder of pictures, with everything below it; or of shards of (image, caption) as CC3M has them, "
        ".parquet or webdataset's .tar (or one such file), which are streamed",
        group=COLLECTED,
    )
    clip: str = option(
        "openai/clip-vit-large-patch14",
        help="a folder as transformers saves it, or a repository of the hub",
        group=COLLECTED,
    )
    tokens: Literal["cls", "patches", "all"] = option(
        "cls", help="which tokens of a picture: its class token, its patches, or both", group=COLLECTED
    )
    captions: Path | None = option(
        None,
        help="captions of a folder of pictures: a .jsonl or .csv with image and caption, a .txt of lines, or a folder "
        "with cat.txt for cat.jpg (shards have their own)",
        group=COLLECTED,
        default_text="none",
    )
    store_dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", help="precision of what is kept", group=COLLECTED
    )
    batch_size: int = option(32, help="pictures computed at once", group=MACHINE)
    output_dir: str = option("captures/clip", help="the collection's folder or URL", group=MACHINE)

    def __post_init__(self) -> None:
        if self.dtype in ("float16",):  # what --dtype meant once; in a tuple, for mypy thinks that it is never equal
            raise FluxIRError(
                "--dtype is what the network computes in, auto, bfloat16 or float32: got 'float16'",
                hint="what is kept is said by --store_dtype float16",
            )
        super().__post_init__()


def run(options: CollectClipOptions) -> None:
    """Collect as the options say. Raises FluxIRError for what a user can mend, before a weight is read if possible."""
    from flux_ir.api.collect_clip import collect_clip
    from flux_ir.commands.report import Report, peak_memory
    from flux_ir.errors import counted

    with Report() as report:
        done = collect_clip(
            options.images,
            options.output_dir,
            clip=options.clip,
            tokens=options.tokens,
            captions=options.captions,
            dtype=options.dtype,
            store_dtype=options.store_dtype,
            batch_size=options.batch_size,
            device=options.device,
            progress=report.watch,
        )
    if done.earlier:
        report.note(f"there from earlier runs: {counted(done.earlier, 'picture')}")
    if done.cut_captions:
        report.note(f"cut to CLIP's length: {counted(done.cut_captions, 'caption')}")
    local = {} if "://" in done.where else {"collection": Path(done.where)}
    report.table(counted(done.images, "picture"), local, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CollectClipOptions, run, argv, prog=prog)
