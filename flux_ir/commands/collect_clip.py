"""`flux-ir collect-clip`: CLIP's activations of a folder of pictures, and of their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, Device

WHAT = "what is collected"


@dataclass(frozen=True, kw_only=True)
class CollectClipOptions(Device):
    """Collect CLIP's activations of every picture below a folder: the vision hidden_states[-2], as training data.

    They go below --output_dir as safetensors shards of [images, tokens, d]: images/, captions/ for the pooled text of
    captions, and index.jsonl, which says what is where. The same command goes on where it was stopped.
    """

    images: Path = option(REQUIRED, help="the folder of pictures, with everything below it", group=WHAT)
    clip: str = option(
        "openai/clip-vit-large-patch14",
        help="a folder as transformers saves it, or a repository of the hub",
        group=WHAT,
    )
    tokens: Literal["cls", "patches", "all"] = option(
        "cls", help="which tokens of a picture: its class token, its patches, or both", group=WHAT
    )
    captions: Path | None = option(
        None,
        help="captions of the pictures: a .jsonl or .csv with image and caption, a .txt of lines, or a folder with "
        "cat.txt for cat.jpg",
        group=WHAT,
        default_text="none",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", help="precision of the encoders and of what is stored", group=WHAT
    )
    batch_size: int = option(32, help="pictures computed at once", group=MACHINE, minimum=1)
    output_dir: Path = option(Path("captures/clip"), help="where the shards go", group=MACHINE)


def run(options: CollectClipOptions) -> None:
    """Collect as the options say. Raises FluxIRError for what a user can mend, before a weight is read if possible."""
    from flux_ir.commands.collecting_clip import collect_clip

    collect_clip(options)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CollectClipOptions, run, argv, prog=prog)
