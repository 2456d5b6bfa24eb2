"""What attention maps cost: time beside the same run without, and memory as image tokens grow."""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from measure import Target, arguments, keep_freed_memory, machine, parse, print_report, seconds_of
from networks import TXT_TOKENS, WIDE, random_flux, random_inputs
from torch.profiler import ProfilerActivity, profile

from flux_ir.errors import in_units
from flux_ir.maps.attention import AttentionMapper, MapTargets, attention_and_lse, block_maps, block_names
from flux_ir.maps.words import Word
from flux_ir.recording.hooks import TokenCounts
from flux_ir.sampling.generate import sample

SECONDS_RATIO = Target("most", 1.15)
BYTES_RATIO = Target("most", 1.1)
SIDE_PX = 512  # 1,024 image tokens
IMG_TOKENS = (256, 1024, 2304, 4096)
WORDS = 8
PIECES = (1, 2, 1, 1, 3, 1, 2, 1)
"""How many T5 tokens each word has."""
USED = 20
"""Tokens of the prompt before its end mark and the padding."""


def main() -> None:
    """Print both tables."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--quarter", action="store_true", help="a quarter of the network's blocks: 1 + 2")
    options = parse(parser)
    keep_freed_memory()
    about = machine(options.device)
    print_report(
        f"Maps of {WORDS} words in all blocks: seconds of a step",
        ["network", "tokens", "plain [s]", "with maps [s]", "CPU ratio", "ratio", "target"],
        [seconds_row(options)],
        about,
    )
    print_report(
        "Maps of a block: peak of what is allocated beside queries, keys and values",
        ["image tokens", "peak", "per image token", "all probabilities would be", "per token, of 256", "target"],
        memory_rows(),
        about,
    )


def targets() -> MapTargets:
    """Eight words of one to three pieces, then the rest of a prompt, the end mark and padding."""
    words, first = [], 0
    for number, pieces in enumerate(PIECES):
        words.append(Word(f"word {number}", tuple(range(first, first + pieces))))
        first += pieces
    return MapTargets(words, end=(USED,), padding=range(USED + 1, TXT_TOKENS))


def seconds_row(options: argparse.Namespace) -> list[str]:
    """One step of the network of width 1,024, with and without, in pairs: A B, B A, ..."""
    blocks = (1, 2) if options.quarter else (WIDE.depth, WIDE.depth_single_blocks)
    params = replace(WIDE, depth=blocks[0], depth_single_blocks=blocks[1])
    model = random_flux(params, options.device, torch.float32)
    inputs = random_inputs(params, SIDE_PX, TXT_TOKENS, options.device, torch.float32)

    def plain() -> None:
        list(sample(model, inputs, [1.0, 0.0], 3.5))

    def mapped() -> None:
        with AttentionMapper(model, block_names(None, *blocks), targets(), lambda *_: None):
            plain()

    pairs = []
    for number in range(options.repetitions + 1):
        order = (plain, mapped) if number % 2 else (mapped, plain)
        seconds = {way: wall_and_cpu(way, options.device) for way in order}
        pairs.append((seconds[plain], seconds[mapped]))
    counted = pairs[1:]  # the first warms up
    wall, cpu = (median(mapped[kind] / plain[kind] for plain, mapped in counted) for kind in (0, 1))
    return [
        f"width {params.hidden_size}, {blocks[0]} + {blocks[1]} blocks",
        f"{inputs.img.shape[1]:,} of the image, {TXT_TOKENS} of the text",
        f"{median(plain[0] for plain, _ in counted):.2f}",
        f"{median(mapped[0] for _, mapped in counted):.2f}",
        f"{cpu:.3f}",
        f"{wall:.3f}",
        SECONDS_RATIO.verdict(wall),
    ]


def wall_and_cpu(way: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds of wall clock, and of this process's threads: on a busy machine the second is the steadier one."""
    before = time.process_time()
    return seconds_of(way, device), time.process_time() - before


def memory_rows() -> list[list[str]]:
    """Exact bytes on a CPU: every allocation is counted, those inside of kernels too."""
    rows, first = [], 0.0
    for img_tokens in IMG_TOKENS:
        peak = peak_bytes(img_tokens)
        per_token = peak / img_tokens
        first = first or per_token
        dense = WIDE.num_heads * (img_tokens + TXT_TOKENS) ** 2 * 4
        ratio = per_token / first
        figures = [f"{img_tokens:,}", in_units(peak), in_units(round(per_token)), in_units(dense), f"{ratio:.3f}"]
        rows.append([*figures, BYTES_RATIO.verdict(ratio)])
    return rows


def peak_bytes(img_tokens: int) -> int:
    """Of the maps of one block with the width of the network, log-sum-exp and all."""
    draw = torch.Generator().manual_seed(0)
    size = (1, WIDE.num_heads, TXT_TOKENS + img_tokens, WIDE.head_dim)
    q, k, v = (torch.randn(size, generator=draw) for _ in range(3))
    output = torch.randn(WIDE.hidden_size, WIDE.num_heads, WIDE.head_dim, generator=draw)
    _, lse = attention_and_lse(q, k, v)
    tokens = TokenCounts(TXT_TOKENS, img_tokens, 0)
    return allocated_at_most(lambda: block_maps(q, k, v, lse, output, targets(), tokens))


def allocated_at_most(work: Callable[[], object]) -> int:
    """The most bytes that `work` has allocated and not freed at any time, by the profiler's account of the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    main()
