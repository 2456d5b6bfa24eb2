"""In which dtype a device computes: bfloat16 where it has instructions for it, else float32. Nothing else decides this.

Emulated bfloat16 is worse than none: on a CPU without such instructions (Zen 2) a 3x3 convolution of 64 channels takes
11.5 s in bfloat16 and 0.065 s in float32. float16 is never chosen, for older GPUs neither: outliers of FLUX and T5 pass
65504, where it ends.
"""

import os
import platform
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from flux_ir.distributed import Ranks, all_sum

DtypeWord = Literal["auto", "bfloat16", "float32"]

CUDA_CAPABILITY = 8  # Ampere: the first major compute capability with bfloat16
X86 = ("x86_64", "AMD64", "x86", "i386", "i686")
# Limits that a user sets on what torch and oneDNN may use of a CPU; these leave no bfloat16 instructions.
ATEN_TOO_LOW = ("DEFAULT", "NO AVX", "AVX2")
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ONEDNN_TOO_LOW = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


class Bfloat16(NamedTuple):
    """Whether a device computes in bfloat16 by itself, and how that is known, in words."""

    real: bool
    reason: str


class ComputeDtype(NamedTuple):
    """The dtype that transformer, text encoders and autoencoder compute in, and why it is that one."""

    dtype: torch.dtype
    reason: str
    warning: str | None = None
    """What a user must know who asked for a dtype that the device only emulates; None: nothing."""

    @property
    def name(self) -> str:
        """The dtype as metadata and flags spell it."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_dtype(
    word: DtypeWord, devices: Sequence[str], *, recorded: torch.dtype | None = None, ranks: Ranks | None = None
) -> ComputeDtype:
    """What `--dtype word` means for parts of a model on these devices.

    `auto` is bfloat16 if every device has it and float32 otherwise. `recorded`: what is read again was computed in this
    dtype; if that was float32, so is `auto`, and no digit is lost. With several `ranks`, all of which must ask, `auto`
    is bfloat16 only if it is on each of them: the answer is the same everywhere.
    """
    known = [bfloat16_on(device) for device in devices]
    lacking = [found for found in known if not found.real]
    ranks_lacking = int(all_sum(torch.tensor([len(lacking) > 0]).long(), ranks or Ranks()))
    if word != "auto":
        warning = None
        if word == "bfloat16" and lacking:
            warning = f"bfloat16 is emulated and slow here ({lacking[0].reason}): float32 is many times faster"
        return ComputeDtype(getattr(torch, word), "as --dtype says", warning)
    if lacking:
        return ComputeDtype(torch.float32, lacking[0].reason)
    if ranks_lacking:
        return ComputeDtype(torch.float32, "another process of this job has no bfloat16 instructions")
    if recorded == torch.float32:
        return ComputeDtype(torch.float32, "as it was recorded")
    return ComputeDtype(torch.bfloat16, known[0].reason)


def bfloat16_on(device: str | torch.device) -> Bfloat16:
    """Whether a device has bfloat16 instructions that torch uses there."""
    kind = torch.device(device).type
    if kind == "cpu":
        return _bfloat16_on_cpu()
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        has = "has" if major >= CUDA_CAPABILITY else "has no"
        return Bfloat16(major >= CUDA_CAPABILITY, f"a GPU of compute capability {major}.{minor} {has} bfloat16")
    return Bfloat16(real=False, reason=f"bfloat16 on {kind} was never measured")


def _bfloat16_on_cpu() -> Bfloat16:
    """Whether oneDNN, which computes convolutions and products on a CPU, has bfloat16 instructions to do it with.

    Its own answer is not enough: it says yes as well where it emulates them with AVX512.
    """
    if platform.machine() not in X86:
        return Bfloat16(real=False, reason=f"bfloat16 on CPUs of the kind {platform.machine()} was never measured")
    instructions = {
        "AMX": torch.cpu._is_amx_tile_supported(),  # these two are in torch 2.8 as well as in 2.15
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }
    has = [name for name, there in instructions.items() if there]
    if not has:
        return Bfloat16(real=False, reason="this CPU has no bfloat16 instructions")
    if torch.backends.cpu.get_cpu_capability() in ATEN_TOO_LOW:
        limit = os.environ.get("ATEN_CPU_CAPABILITY", "unset")
        return Bfloat16(real=False, reason=f"ATEN_CPU_CAPABILITY={limit} leaves this CPU no bfloat16 instructions")
    for name in ONEDNN_LIMITS:
        if os.environ.get(name, "").upper() in ONEDNN_TOO_LOW:
            return Bfloat16(real=False, reason=f"{name}={os.environ[name]} leaves this CPU no bfloat16 instructions")
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (built and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return Bfloat16(real=False, reason="this torch has no oneDNN that computes in bfloat16 here")
    return Bfloat16(real=True, reason=f"this CPU has {has[0]}")
