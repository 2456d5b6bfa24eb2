"""Where each part of a model runs: plans as data, made without touching a device. `suite` acts on them.

One process, any number of devices. (Many processes for one job is another matter: see `distributed`.)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flux_ir.errors import FluxIRError

# Device numbers of (T5, CLIP, transformer, autoencoder encoder, autoencoder decoder) per number of GPUs. The
# transformer never shares a device: it is the largest part and the only one that is busy at every step.
SPREAD = {
    2: (0, 0, 1, 0, 0),
    3: (0, 1, 2, 1, 1),
    4: (0, 1, 2, 3, 3),
    5: (0, 1, 2, 3, 4),
    6: (0, 1, 2, 4, 5),
    7: (0, 1, 2, 5, 6),
}
MOST_GPUS = max(SPREAD)  # with more, the rest stay free

MultiGpuWord = bool | Literal["blocks"]
"""How a model is spread over GPUs; True: each part on one of them; blocks: the transformer's blocks on all of them."""
OffloadWord = bool | Literal["parts", "blocks"]
"""How offloading is asked for; True: what is best for the model and the machine."""
Offload = Literal["none", "parts", "blocks"]
"""Where weights wait: on their device; a whole part on the CPU until it is needed; or also the blocks of the
transformer and of T5 in host memory or in their file, from where they come one after another (`streaming`)."""


@dataclass(frozen=True)
class Placement:
    """The device of each part, and where the weights wait that are not needed at the moment."""

    t5: str
    clip: str
    transformer: str
    ae_encoder: str
    ae_decoder: str
    offload: Offload
    reason: str
    vram_bytes: int | None = None
    """What the transformer's device may be filled with; None: what is free there."""
    memory_bytes: int | None = None
    """What the process may take of host memory; None: as little as it can where blocks are streamed."""
    blocks: tuple[str, ...] = ()
    """The devices that the transformer's blocks are split over, `transformer` first; none: all are on that one."""

    PARTS: ClassVar = ("t5", "clip", "transformer", "ae_encoder", "ae_decoder")

    @property
    def devices(self) -> list[str]:
        """Every device in use, each once."""
        return list(dict.fromkeys([*(getattr(self, part) for part in self.PARTS), *self.blocks]))


def plan(
    num_gpus: int,
    *,
    device: str | None = None,
    multi_gpu: MultiGpuWord = False,
    offload: OffloadWord = False,
) -> Placement:
    """The placement for `num_gpus` visible GPUs. `device` None means the first GPU, or the CPU where there is none.

    `multi_gpu` with fewer than two GPUs goes on with one device and says so in `reason`. `offload` True is `parts`
    here; what is best for a model and a machine says `memory.best_offload`.

    Raises FluxIRError for `multi_gpu` together with `offload` or `device`, and for a GPU that is not there.
    """
    if multi_gpu and (offload or device is not None):
        other = "--offload" if offload else "--device"
        raise FluxIRError(
            f"--multi_gpu {multi_gpu} spreads the model over GPUs, {other} keeps it on one: got both",
            hint=f"leave out --multi_gpu or {other}",
        )
    if multi_gpu and num_gpus >= min(SPREAD):
        return _split(num_gpus) if multi_gpu == "blocks" else _spread(num_gpus)
    single = _one_device(num_gpus, device)
    reason = _reason(num_gpus, single, chosen=device is not None, multi_gpu=bool(multi_gpu))
    waits: Offload = "none" if offload is False else "parts" if offload is True else offload
    if waits == "parts" and single == "cpu":
        waits, reason = "none", f"{reason}; --offload has nothing to move without a GPU"
    return Placement(single, single, single, single, single, offload=waits, reason=reason)


def _spread(num_gpus: int) -> Placement:
    numbers = SPREAD[min(num_gpus, MOST_GPUS)]
    t5, clip, transformer, ae_encoder, ae_decoder = (f"cuda:{number}" for number in numbers)
    return Placement(
        t5, clip, transformer, ae_encoder, ae_decoder, offload="none", reason=f"--multi_gpu over {num_gpus} GPUs"
    )


def _split(num_gpus: int) -> Placement:
    """All blocks split over all GPUs; the other parts on the first, until `split` has reckoned where there is room."""
    devices = tuple(f"cuda:{number}" for number in range(num_gpus))
    reason = f"--multi_gpu blocks over {num_gpus} GPUs"
    first = devices[0]
    return Placement(first, first, first, first, first, offload="none", reason=reason, blocks=devices)


def _one_device(num_gpus: int, device: str | None) -> str:
    if device is None:
        return "cuda:0" if num_gpus else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return "cpu"
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise FluxIRError(f"--device must be cpu, cuda or cuda:N: got {device!r}", hint="try --device cpu")
    if int(number or 0) >= num_gpus:
        seen = "no GPU is visible" if num_gpus == 0 else f"visible are cuda:0 to cuda:{num_gpus - 1}"
        raise FluxIRError(f"--device {device} must be a GPU of this machine: {seen}", hint="try --device cpu")
    return f"cuda:{number or 0}"


def _reason(num_gpus: int, device: str, *, chosen: bool, multi_gpu: bool) -> str:
    if multi_gpu:
        have = "no GPU" if num_gpus == 0 else "one GPU"
        return f"--multi_gpu needs two GPUs and there is {have}: everything on {device}"
    if chosen:
        return "as --device says"
    return "no GPU is visible" if num_gpus == 0 else "the first GPU"
