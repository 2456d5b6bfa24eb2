"""Blocks compiled one by one: `torch.compile` for the forward of a block, and nothing around it.

Hooks on a block stay outside of what is compiled, so recorders, interventions and steering work as ever. A block is
not run compiled while a hook hangs inside it (on its attention, say), and where gradients are asked for.

Compiled code rounds elsewhere: fused operations keep float32 between them. So its bits are other bits, and what is kept
says that they are.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import Flux

MOST_SIZES = 64
"""Batch sizes and token counts one kind of block is compiled for in one process. PyTorch's own bound is 8."""


class CompiledForward:
    """The `forward` of one block, compiled once for all blocks of its class; `backend` is one of `torch.compile`."""

    def __init__(self, block: nn.Module, backend: str = "inductor") -> None:
        self.block, self._plain = block, type(block).forward
        self._inside = [module for module in block.modules() if module is not block]
        self._compiled = _compiled(self._plain, backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output. Raises FluxIRError where the block cannot be compiled."""
        if self._must_be_plain(args):
            return self._plain(self.block, *args, **kwargs)
        try:
            return self._compiled(self.block, *args, **kwargs)
        except TorchDynamoException as error:
            raise _cannot_compile(error) from error

    def _must_be_plain(self, args: Iterable[Any]) -> bool:
        # Compiled code calls no hook that came after it, and none that came before could be taken off.
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._inside):
            return True
        return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args)


def compile_blocks(flux: Flux, *, backend: str = "inductor") -> None:
    """Have every block's forward compiled at its first call, once for each size of its inputs (seconds to a minute)."""
    # Said of the rotary table, which compiled code only looks at as pairs of real numbers (`attention.rotate`).
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    # Sizes are compiled apart: code for any size would have other bits, from the second size on.
    torch._dynamo.config.recompile_limit = max(MOST_SIZES, torch._dynamo.config.recompile_limit)
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = CompiledForward(block, backend)


def check_compiles(device: str) -> None:
    """Compile one small function on the device: what is missing is known before weights are read.

    Raises FluxIRError where that fails.
    """
    try:
        if torch.device(device).type == "cpu":
            get_cpp_compiler()  # by itself, too: what was compiled once is on the disk, and needs no compiler again
        torch.compile(_small, dynamic=False, fullgraph=True)(torch.zeros(16, device=device))
    except (TorchDynamoException, InvalidCxxCompiler) as error:
        raise _cannot_compile(error) from error


_known: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """One compiled function for each class of blocks: weights are inputs of it, so all blocks of the class share it."""
    if (forward, backend) not in _known:
        _known[forward, backend] = torch.compile(forward, dynamic=False, fullgraph=True, backend=backend)
    return _known[forward, backend]


def _small(x: Tensor) -> Tensor:
    return x.sin() + 1


def _cannot_compile(error: Exception) -> FluxIRError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return FluxIRError(
        f"--compile: the blocks cannot be compiled here: {lines[0] if lines else type(error).__name__}",
        hint="leave out --compile; it needs a C++ compiler such as g++ on a CPU, Triton and a C compiler on a GPU",
    )
