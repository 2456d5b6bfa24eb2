"""Peak memory as `flux-ir plan` predicts it, beside that of the command `flux-ir capture` in a process of its own.

flux-tiny at several sizes, and a random network of about a billion weights in the published layout (2 GB on the disk,
deleted at the end), resident and streamed. Peaks are VmHWM, as the command tells it; nothing runs on a GPU.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from measure import Target, arguments, machine, print_report
from networks import random_flux
from safetensors.torch import save_file

from flux_ir.api.capacity import capture_work
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.footprint import base_here, footprint
from flux_ir.models.placement import plan
from flux_ir.models.registry import MODELS, ModelSpec, get_spec
from flux_ir.recording.plan import CapturePlan, capture_bytes
from flux_ir.sites import block_outputs

SIDES = (128, 256, 512)
OFF = 0.1
UNIT = re.compile(r"^peak memory, host +([\d.]+) ([kMG]B)", re.MULTILINE)
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
MIDDLE = replace(MODELS["flux-schnell"].flux, depth=2, depth_single_blocks=4)
"""1.3 billion weights in blocks of the real width."""

# The command, with the network of the middle size known by the name of a real one.
WITH_MIDDLE = """
import sys
from dataclasses import replace
from flux_ir.models import registry
spec = registry.MODELS["flux-schnell"]
registry.MODELS["flux-schnell"] = replace(spec, flux=replace(spec.flux, depth=2, depth_single_blocks=4))
from flux_ir.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


BASE_BYTES = base_here()
"""Of a process like this one, before any work."""


def predicted(spec: ModelSpec, side: int, offload: str, *, whole: bool) -> int:
    """Bytes of host memory that the capture should take at its highest. `whole`: with its prompt and the lens."""
    dtype = choose_dtype("auto", ["cpu"]).dtype
    img = (side // 16) ** 2
    file = CapturePlan(
        spec.flux,
        block_outputs(spec.flux.depth, spec.flux.depth_single_blocks),
        timesteps=[1.0, 0.0],
        txt_tokens=spec.text_tokens,
        img_tokens=img,
        guidance=1.0,
        metadata={},
        dtype=dtype,
    )
    tokens, size = spec.text_tokens + img, capture_bytes(file)
    work = capture_work(side**2, tokens, on_gpu=False, encodes=whole, capture_bytes=size, lens=whole)
    placement = plan(0, offload="blocks" if offload == "blocks" else False)
    return footprint(spec, placement, dtype, work, base_bytes=BASE_BYTES).host


def measured(words: Sequence[str], *, middle: bool) -> float:
    """Bytes, as the command tells them."""
    program = ["-c", WITH_MIDDLE] if middle else ["-m", "flux_ir"]
    done = subprocess.run([sys.executable, *program, "capture", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = UNIT.search(done.stdout)
    if found is None:
        raise LookupError(f"no peak memory in:\n{done.stdout}")
    return float(found[1]) * BYTES[found[2]]


def write_middle(folder: Path) -> list[str]:
    """The files of the middle network, and the flags that name them."""
    files = {name: folder / f"{name}.safetensors" for name in ("transformer", "ae", "text")}
    save_file(random_flux(MIDDLE, "cpu", torch.bfloat16).state_dict(), files["transformer"])
    save_file(AutoEncoder(MODELS["flux-schnell"].autoencoder).state_dict(), files["ae"])
    txt, y = torch.randn(1, 256, MIDDLE.context_in_dim), torch.randn(1, MIDDLE.vec_in_dim)
    save_file({"prompt_embeds": txt, "pooled_prompt_embeds": y}, files["text"])
    flags = ["--checkpoint", files["transformer"], "--ae_checkpoint", files["ae"], "--prompt_embeds", files["text"]]
    return [str(word) for word in flags]


def row(spec: ModelSpec, side: int, offload: str, words: Sequence[str], output_dir: str, *, middle: bool) -> list[str]:
    """One capture of one step."""
    size = ["--width", str(side), "--height", str(side), "--num_steps", "1", "--output_dir", output_dir]
    size += ["--offload", offload] if offload == "blocks" else []
    lens = ["--should_decode_intermediates", "False"] if middle else []
    peak = measured(["--model", spec.name, *size, *lens, *words], middle=middle)
    guess = predicted(spec, side, offload, whole=not middle)
    ratio = guess / peak
    verdict = Target("most", OFF).verdict(abs(ratio - 1))
    name = "1.3 B weights" if middle else spec.name
    return [name, f"{side} px", offload, f"{guess / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{ratio:.2f}", verdict]


def main(sides: Sequence[int], networks: Sequence[str]) -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in networks:
            middle = name == "middle"
            spec = replace(MODELS["flux-schnell"], flux=MIDDLE) if middle else get_spec("flux-tiny")
            words = write_middle(Path(folder)) if middle else ["--seed", "1"]
            for side in sides:
                for way in ("resident", "blocks"):
                    rows.append(row(spec, side, way, words, folder, middle=middle))
                    print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    columns = ["network", "picture", "setting", "predicted", "peak", "ratio", "off by, target"]
    print_report("Memory as planned", columns, rows, machine())


if __name__ == "__main__":
    parser = arguments(__doc__ or "", repetitions=False)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="pictures' sides [px]")
    parser.add_argument("--networks", nargs="+", choices=("tiny", "middle"), default=("tiny", "middle"))
    options = parser.parse_args()
    main(options.sides, options.networks)
