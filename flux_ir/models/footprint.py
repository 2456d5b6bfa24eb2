"""The memory of a whole run, by arithmetic: which parts are in memory in which phase, on every device and the host.

`memory` has the bytes of single networks; here they are added up as `suite` loads, moves and frees them. A new way of
keeping weights (quantised, split over GPUs) changes `Parts` alone. What is measured stands in `benchmarks/RESULTS.md`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from flux_ir.models.architecture import autoencoder_of
from flux_ir.models.checkpoints.encoder_configs import Encoder, config_of
from flux_ir.models.checkpoints.pretrained import read_params
from flux_ir.models.memory import (
    DEVICE_BASE_BYTES,
    HOST_BASE_BYTES,
    activation_bytes,
    decode_bytes,
    elements,
    quantised_bytes,
    resident_memory,
    streamed_bytes,
)
from flux_ir.models.placement import Placement
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import ModelSpec
from flux_ir.models.split import runs_of
from flux_ir.models.streaming import SLOTS
from flux_ir.models.text.clip import ClipText, ClipTextParams
from flux_ir.models.text.t5 import T5Encoder, T5Params

LARGEST_USUAL_TOKENS = 4096 + 512
"""A picture of 1024 px and the longest text: what memory is kept free for where nobody says how large pictures are."""
CUDA_HOST_BYTES = 1_500_000_000
"""What a process takes of the host once it uses a GPU, beyond `HOST_BASE_BYTES`. Not measured here: an estimate."""


WRITING_BYTES_PER_PIXEL = 64
"""Of a decoded picture that is written and compared with the final one: a float64 difference and its square, the JPEG
encoder's own rows, and the picture as bytes before and after. Measured: 18 MB for 512 x 512 px."""
LATE_BYTES = 100_000_000
"""What a process takes beyond its imports, without any weight: libraries that come later, kernels, and what malloc
keeps. Reckoned from peaks of flux-tiny on one CPU less what else was known to be held: 95 MB, rounded."""


def base_here() -> int:
    """Bytes of a process without any weight, on this machine: of this one, as it is now, and what comes later.

    `HOST_BASE_BYTES` where the system does not tell.
    """
    own = resident_memory()
    return HOST_BASE_BYTES if own is None else own + LATE_BYTES


class Work(NamedTuple):
    """What one run computes."""

    pixels: int
    tokens: int
    """Of image, text and reference together."""
    encodes: bool = True
    """Whether the text encoders run; if not, the prompt's embeddings are given."""
    waiting_bytes: int = 0
    """What waits in host memory to be written at most."""
    decoded_together: int = 1
    """Pictures that are decoded side by side; 0: none is, and there is no autoencoder."""
    written_together: int = 0
    """Decoded pictures that are encoded and compared side by side, while others are decoded."""
    batch: int = 1
    """Pictures that go through the transformer at once, in all threads of a device."""
    encoders_go: bool = False
    """Whether the text encoders are let go when the prompts are encoded, before the transformer is loaded."""


class Parts(NamedTuple):
    """Bytes of the weights of each part of a model, whole."""

    transformer: int
    t5: int
    clip: int
    ae_encoder: int
    ae_decoder: int


class Footprint(NamedTuple):
    """Peak memory of a run in bytes: of the host, and of every GPU by its name."""

    host: int
    devices: Mapping[str, int]

    @property
    def fullest(self) -> int:
        """Of the GPU that takes most; 0 without a GPU."""
        return max(self.devices.values(), default=0)


class T5Elements(NamedTuple):
    """Numbers in the weights of one T5 encoder."""

    outside: int
    """Of its embeddings and last norm, which stay where its blocks are streamed."""
    blocks: tuple[int, ...]
    """Of each block, in depth order."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.outside + sum(self.blocks)


class _Beside(NamedTuple):
    """Numbers in the weights of the parts beside the transformer."""

    t5: T5Elements
    clip: int
    ae_encoder: int
    ae_decoder: int


def parts_of(spec: ModelSpec, dtype: torch.dtype) -> Parts:
    """Bytes of a model's parts in this dtype; the autoencoder stays float32. No file of weights is looked at."""
    beside, size, full = _elements_beside(spec), dtype.itemsize, torch.float32.itemsize
    return Parts(
        transformer=elements(spec.flux).total * size,
        t5=beside.t5.total * size,
        clip=beside.clip * size,
        ae_encoder=beside.ae_encoder * full,
        ae_decoder=beside.ae_decoder * full,
    )


@cache
def _elements_beside(spec: ModelSpec) -> _Beside:
    names: tuple[Encoder, Encoder] = ("t5", "clip")
    configs = {name: config_of(spec, name) for name in names}
    where = Path(spec.name)
    t5_params = read_params(T5Params, where, what="the text encoder", config=configs["t5"])
    clip = read_params(ClipTextParams, where, what="the CLIP model", config=configs["clip"], section="text_config")
    with torch.device("meta"):
        autoencoder, t5 = autoencoder_of(spec.autoencoder), T5Encoder(t5_params)
        networks = ClipText(clip), autoencoder.encoder, autoencoder.decoder
    blocks = tuple(_count(block) for block in t5.encoder.block)
    return _Beside(T5Elements(_count(t5) - sum(blocks), blocks), *map(_count, networks))


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def autoencoder_bytes(spec: ModelSpec, pixels: int, dtype: torch.dtype) -> int:
    """Bytes of the autoencoder while it decodes one picture of so many pixels."""
    parts = parts_of(spec, dtype)
    return parts.ae_encoder + parts.ae_decoder + decode_bytes(spec.autoencoder, pixels, dtype)


def footprint(
    spec: ModelSpec,
    placement: Placement,
    dtype: torch.dtype,
    work: Work,
    *,
    resident: Sequence[int] = (),
    waits_in_memory: bool = False,
    quantize: Method | None = None,
    processes: int = 1,
    sharded_over: int = 1,
    base_bytes: int = HOST_BASE_BYTES,
) -> Footprint:
    """Peak memory of a run under a placement. `resident`: the blocks that stay where others are streamed.

    `waits_in_memory`: blocks that are streamed to a GPU wait in host memory, else in their file. `quantize`: all blocks
    are codes, which are on the device if nothing is offloaded, and on a CPU pages of their file. `processes` do the
    same side by side, each on its GPU: the host has them all. `sharded_over`: as many that share the blocks' weights.
    `base_bytes`: of a process without any weight, see `base_here`.
    """
    parts = parts_of(spec, dtype)
    if not work.encodes:
        parts = parts._replace(t5=0, clip=0)
    if not work.decoded_together:
        parts = parts._replace(ae_encoder=0, ae_decoder=0)
    counts, size = elements(spec.flux), dtype.itemsize
    staying = sum(counts.blocks[number] for number in resident) * size
    if placement.offload == "blocks":
        t5 = _elements_beside(spec).t5
        parts = parts._replace(transformer=streamed_bytes(spec.flux, dtype) + staying)
        if work.encodes:
            parts = parts._replace(t5=(t5.outside + SLOTS * max(t5.blocks)) * size)
    if sharded_over > 1:  # one rank's part, and two gathered blocks: one that computes, one that comes
        own = -(-sum(counts.blocks) // sharded_over)
        parts = parts._replace(transformer=(counts.outside + own + SLOTS * max(counts.blocks)) * size)
    codes = 0  # with the modulations, which stay as they are
    if quantize is not None:
        codes = quantised_bytes(spec.flux, dtype, quantize) - streamed_bytes(spec.flux, dtype)
        beside_it = placement.offload == "blocks" and placement.transformer != "cpu"
        parts = parts._replace(transformer=streamed_bytes(spec.flux, dtype) + (0 if beside_it else codes))
    # What each part works on, while it does.
    t5_tokens = spec.text_tokens * spec.flux.context_in_dim * size
    active = {
        "transformer": activation_bytes(spec.flux, work.tokens, dtype, batch=work.batch),
        "t5": 16 * t5_tokens if work.encodes else 0,  # gated feed-forwards of 2.5 widths, four of them at once
        "clip": 0,
        "ae_encoder": 0,
        "ae_decoder": decode_bytes(spec.autoencoder, work.pixels, dtype) * work.decoded_together,
    }
    writing = work.written_together * WRITING_BYTES_PER_PIXEL * work.pixels
    gpus = [device for device in placement.devices if device != "cpu"]
    held = counts.outside * size + staying  # of the transformer, while the text is encoded
    runs = runs_of(spec.flux, placement.blocks) if placement.blocks else ()
    shares = {run.device: run.elements * size for run in runs}
    devices = {
        device: DEVICE_BASE_BYTES + _peak(parts, active, placement, device, held, shares=shares, work=work)
        for device in gpus
    }
    if not gpus:
        active["ae_decoder"] += writing
        peak = _peak(parts, active, placement, "cpu", held, shares=shares, work=work, waiting_bytes=work.waiting_bytes)
        return Footprint(base_bytes + peak, devices)
    host = base_bytes + CUDA_HOST_BYTES + max(work.waiting_bytes, writing)
    if placement.offload == "parts":
        host += sum(parts)
    elif placement.offload == "blocks":
        waiting = codes or (sum(counts.blocks) * size - staying if waits_in_memory else 0)
        # T5 goes from its file to the GPU block by block; CLIP and, behind the transformer, the autoencoder wait here.
        host += max(parts.clip, waiting + parts.ae_encoder + parts.ae_decoder)
    return Footprint(host * max(processes, sharded_over), devices)


def _peak(
    parts: Parts,
    active: Mapping[str, int],
    placement: Placement,
    device: str,
    held: int,
    *,
    shares: Mapping[str, int],
    work: Work,
    waiting_bytes: int = 0,
) -> int:
    """Bytes on one device at the fullest moment of a run. `held`: see `footprint`.

    `shares`: of the transformer's weights, where its blocks are split over devices: all of these compute with them.
    """
    on_device = {name for name in Placement.PARTS if getattr(placement, name) == device}
    on_device |= {"transformer"} if device in shares else set()
    weights = {name: value if name in on_device else 0 for name, value in parts._asdict().items()}
    if shares:
        weights["transformer"] = shares.get(device, 0)
    works = {name: value if name in on_device else 0 for name, value in active.items()}
    text = weights["t5"] + weights["clip"]
    autoencoder = weights["ae_encoder"] + weights["ae_decoder"]
    sampling = works["transformer"] + waiting_bytes
    if device == "cpu":  # malloc keeps what was freed of tensors up to 32 MB, and decoding comes on top
        works["ae_decoder"] += works["transformer"]
    if placement.offload == "none" and work.encoders_go:
        return max(text + works["t5"], sum(weights.values()) - text + max(sampling, works["ae_decoder"]))
    if placement.offload == "none":
        return sum(weights.values()) + max(works["t5"], sampling, works["ae_decoder"])
    if placement.offload == "parts":  # one at a time
        alone = (weights["transformer"] + sampling, autoencoder + works["ae_decoder"])
        return max(text + works["t5"], *alone)
    # The text encoders have gone when the slots come, and these stay while the picture is decoded.
    held = held if "transformer" in on_device else 0
    return max(held + text + works["t5"], weights["transformer"] + max(sampling, autoencoder + works["ae_decoder"]))
