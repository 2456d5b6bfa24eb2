"""Words of a short run of flux-tiny, and what lies in the folder that a run leaves."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from flux_ir.models.registry import get_spec
from flux_ir.recording.reader import load_capture

SCRIPT = Path(__file__).parents[2] / "capture_sample.py"
SPEC = get_spec("flux-tiny")
DEPTH, DEPTH_SINGLE = SPEC.flux.depth, SPEC.flux.depth_single_blocks
LAST = f"single.{DEPTH_SINGLE - 1}"
BLOCKS = [f"double_block_{i}" for i in range(DEPTH)] + [f"single_block_{i}" for i in range(DEPTH_SINGLE)]
SMALL = ("--model", "flux-tiny", "--num_steps", "1", "--sites", LAST)
QUICK = (*SMALL, "--should_decode_intermediates", "False")


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def metadata_of(folder):
    return json.loads(only(folder, "intermediates/metadata_*.json").read_text(encoding="utf-8"))


def pixels_of(path):
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture.convert("RGB"))


def tensors_of(folder):
    capture = load_capture(folder)
    tensors = {f"{site} {step}": capture.read(site, step) for site in capture.sites for step in capture.steps}
    for step in capture.steps:
        context = capture.context(step)
        tensors |= {f"img {step}": context.img, f"y {step}": context.y}
    return tensors


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes meanwhile: what a full disk is to it, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
