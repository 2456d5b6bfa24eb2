"""A transformer whose blocks are sharded over the ranks of a job: every rank has a part of each weight (FSDP2).

Before a block computes, `torch.distributed.fsdp.fully_shard` gathers its weights from all ranks; behind it they are let
go. A weight is gathered as it is, byte for byte, with no cast and no mixed precision: the bits of every product are
those of the whole network. All-gathers are collective, so all ranks must call the same blocks in the same order, each
with inputs of its own: `collecting.collector` keeps them in step.

FSDP is imported where it is used: it brings sympy and torch's compiler, seconds for everybody else.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import block_names
from flux_ir.models.flux1.transformer import Flux, FluxParams


class ShardedFlux(Flux):
    """FLUX's transformer with its blocks sharded over all ranks. It is called, hooked and read as any `Flux`.

    It is made without weights, on the meta device, while the rank's GPU is the `current_device`; `own_part` says what a
    rank keeps of each. The layers before and behind the blocks, 0.5 % of FLUX.1, are whole on every rank, so
    `conditioning` and `read_out` need no other rank. Inside a block's forward its weights are plain tensors.
    """

    def __init__(self, params: FluxParams, device: torch.device, dtype: torch.dtype, ranks: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with torch.device("meta"):
            super().__init__(params)
        self.to(dtype).requires_grad_(requires_grad=False).eval()
        mesh = init_device_mesh(device.type, (ranks,))
        names = block_names(params)
        whole = {weight for name, weight in self.named_parameters() if not name.startswith(tuple(names))}
        for name in names:
            fully_shard(self.get_submodule(name), mesh=mesh, reshard_after_forward=True)
        # The root holds no weights of its own: it ties the blocks together, so that they share streams and the next
        # one's weights can come while one computes.
        fully_shard(self, mesh=mesh, ignored_params=whole)
        self.register_forward_hook(_let_go, always_call=True)

    def twin(self) -> NoReturn:
        """There is none: its blocks could be called on all ranks together alone."""
        raise FluxIRError(
            "a network that is sharded over processes cannot compute beside itself", hint="start one process"
        )


def _let_go(network: nn.Module, args: Any, output: Any) -> None:
    """Behind a forward that was left in the middle of a block: the weights of that block are let go as well."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule) and module is not network:
            module.reshard()


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one of this thread: `fully_shard` takes that for its own, and for its streams."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def own_part(weight: Tensor, blank: Tensor, device: torch.device) -> Tensor:
    """What this rank keeps of a weight, in memory of its own; `blank` is the parameter it will stand for.

    No rank is asked for anything: each reads the weight for itself.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(blank, DTensor):
        return weight.to(device)
    return distribute_tensor(weight, blank.device_mesh, blank.placements, src_data_rank=None)
