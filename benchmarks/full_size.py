"""The whole of flux-schnell on a machine without a GPU: a file of its full size, streamed block by block, captured.

Writes the published layout with random weights (24 GB, and its autoencoder), runs `flux-ir capture --offload blocks` on
it in a process of its own, and then holds every block's output against a resident pass over that block alone: the bytes
must be equal. Beside the seconds stand the floors: reading the file once past the page cache, and the arithmetic of
these resident passes. The files are deleted at the end, unless --keep.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Target, arguments, machine, print_report
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_ir import read_capture
from flux_ir.files import complete_file
from flux_ir.models.architecture import block_names
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.load import Weights
from flux_ir.models.flux1.attention import rotary_table
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import get_spec
from flux_ir.recording.reader import Capture
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.latents import image_ids, text_ids

MODEL = "flux-schnell"
MEMORY, SAME = Target("most", 6.0), Target("least", 1.0)
CHUNK = 2**26  # bytes of one read past the page cache


def drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Random bfloat16 weights of a size that keeps tokens finite through all blocks."""
    draw = torch.Generator().manual_seed(seed)
    if name.endswith("norm.scale"):
        return torch.ones(shape, dtype=torch.bfloat16)
    fan_in = shape[-1] if len(shape) > 1 else 256
    return (torch.randn(shape, generator=draw) / math.sqrt(fan_in) / 2).to(torch.bfloat16)


def write_transformer(path: Path) -> None:
    """The file, tensor by tensor: memory stays that of the largest."""
    with torch.device("meta"):
        blank = Flux(get_spec(MODEL).flux).state_dict()
    header, offset = {}, 0
    for name, tensor in blank.items():
        nbytes = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with complete_file(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, tensor) in enumerate(blank.items()):
            file.write(memoryview(drawn(name, tensor.shape, number).view(torch.uint8).flatten().numpy()))


def write_rest(folder: Path) -> None:
    """The autoencoder, and the embeddings of a prompt: random as well."""
    spec = get_spec(MODEL)
    torch.manual_seed(0)
    save_file(AutoEncoder(spec.autoencoder).state_dict(), folder / "ae.safetensors")
    txt = torch.randn(1, spec.text_tokens, spec.flux.context_in_dim, dtype=torch.bfloat16)
    y = torch.randn(1, spec.flux.vec_in_dim, dtype=torch.bfloat16)
    save_file({"prompt_embeds": txt, "pooled_prompt_embeds": y}, folder / "text.safetensors")


def capture(folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], Path]:
    """Seconds of the phases and peak memory [GB] of the command, and the folder of the run."""
    out = folder / "output"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "flux_ir", "capture", "--model", MODEL, "--offload", "blocks"]
    command += ["--checkpoint", folder / "transformer.safetensors", "--ae_checkpoint", folder / "ae.safetensors"]
    command += ["--prompt_embeds", folder / "text.safetensors", "--seed", "1", "--num_steps", str(options.steps)]
    command += ["--width", str(options.side), "--height", str(options.side), "--output_dir", out]
    command += ["--should_decode_intermediates", "False"]
    if options.memory_gb is not None:
        command += ["--memory_gb", str(options.memory_gb)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    done.check_returncode()
    told = dict(re.findall(r"^(\S.*?)\s{2,}([\d.]+) (?:s|MB|GB)\s*$", done.stdout, flags=re.MULTILINE))
    figures = {name: float(value) for name, value in told.items()}
    if "peak memory, host" in figures and figures["peak memory, host"] > 100:
        figures["peak memory, host"] /= 1000
    (run,) = out.iterdir()
    return figures, run


def read_floor(path: Path) -> float:
    """Seconds to read the file once, past the page cache."""
    buffer = memoryview(torch.empty(CHUNK + 4096, dtype=torch.uint8).numpy())
    skip = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 4096
    start, offset, size = time.perf_counter(), 0, path.stat().st_size
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        while offset < size:
            offset += os.preadv(handle, [buffer[skip : skip + CHUNK]], offset)
    finally:
        os.close(handle)
    return time.perf_counter() - start


@torch.no_grad()
def blocks_alone(folder: Path, recorded: Capture) -> Iterator[tuple[str, bool, float]]:
    """For each block of the first step: whether a resident pass over it gives the captured bytes, and its seconds.

    Each block gets what the capture holds of the one before; its weights are loaded for it alone.
    """
    spec = get_spec(MODEL)
    source = inspect(spec, "transformer", folder / "transformer.safetensors", "a benchmark")
    with torch.device("meta"):
        flux = Flux(spec.flux).requires_grad_(requires_grad=False).eval()
    weights = Weights(flux, source)
    dtype, step = recorded.dtype, recorded.context(0)

    def fill(module: nn.Module, prefix: str) -> None:
        for name, blank in list(module.named_parameters()):
            value = torch.empty(blank.shape, dtype=dtype)
            weights.read_into(value, f"{prefix}{name}")
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    for name in ("img_in", "txt_in", "time_in", "vector_in"):
        fill(flux.get_submodule(name), f"{name}.")
    txt = load_file(folder / "text.safetensors")["prompt_embeds"].to(dtype)
    img, y = step.img.to(dtype), step.y.to(dtype)
    vec = flux.conditioning(per_sample(step.t_curr, img), y)
    side = math.isqrt(img.shape[1]) * 16
    ids = torch.cat([text_ids(1, txt.shape[1]), image_ids(1, side, side)], dim=1)
    rotation = rotary_table(ids, spec.flux.axes_dim, spec.flux.theta)
    img, txt = flux.img_in(img), flux.txt_in(txt)
    x = None
    for name in block_names(spec.flux):
        block = flux.get_submodule(name)
        blanks = dict(block.named_parameters())
        fill(block, f"{name}.")
        site = name.replace("_blocks", "")
        start = time.perf_counter()
        if name.startswith("double"):
            img, txt = block(img, txt, vec, rotation)
            seconds = time.perf_counter() - start
            same = torch.equal(img, recorded.read(f"{site}.img", 0)) and torch.equal(
                txt, recorded.read(f"{site}.txt", 0)
            )
            img, txt = recorded.read(f"{site}.img", 0), recorded.read(f"{site}.txt", 0)
        else:
            x = block(torch.cat([txt, img], dim=1) if x is None else x, vec, rotation)
            seconds = time.perf_counter() - start
            same = torch.equal(x, recorded.read(site, 0))
            x = recorded.read(site, 0)
        yield site, same, seconds
        for path, blank in blanks.items():
            owner, _, leaf = path.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = blank


def main(options: argparse.Namespace) -> None:
    """Print the table."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    transformer = folder / "transformer.safetensors"
    if not transformer.is_file():
        start = time.perf_counter()
        write_transformer(transformer)
        write_rest(folder)
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    figures, run = capture(folder, options)
    recorded = read_capture(run)
    results = list(blocks_alone(folder, recorded))
    floor = read_floor(transformer)
    arithmetic = sum(seconds for _, _, seconds in results) * options.steps
    same = sum(same for _, same, _ in results)
    peak = figures["peak memory, host"]
    rows = [
        ["file", f"{transformer.stat().st_size / 1e9:.1f} GB", ""],
        ["peak memory (VmHWM)", f"{peak:.2f} GB", MEMORY.verdict(peak)],
        *([name, f"{seconds:.1f} s", ""] for name, seconds in figures.items() if "memory" not in name),
        ["floor: the file read once, past the page cache", f"{floor:.1f} s", ""],
        ["floor: the blocks' arithmetic, resident", f"{arithmetic:.1f} s", ""],
        ["blocks with the bytes of a resident pass", f"{same} of {len(results)}", SAME.verdict(same / len(results))],
    ]
    title = f"{MODEL}, full size, {options.side} px, steps: {options.steps}, every block captured, no GPU"
    print_report(title, ["what", "figure", "target"], rows, machine())
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = arguments(__doc__, repetitions=False)
    parser.add_argument("--folder", type=Path, default=Path("full_size"), help="where the 24 GB go")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--side", type=int, default=256, help="of the picture [px]")
    parser.add_argument("--memory_gb", type=float, help="as flux-ir capture takes it")
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    main(parser.parse_args())
