"""Networks whose blocks are on the device only while they compute: their weights come one block after the other.

While one block computes, a thread fetches the next one's weights into memory that is used again and again, a *slot*.
Every product is that of the resident network, in its order: the bits are the same. What is small stays on the device.

`stream_blocks` has the blocks of any network streamed, such as T5's. Next: `streamed_flux`, the transformer.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError

Fetch = Callable[[Tensor, str], None]
"""Fills a tensor with the weight of this name."""
Event = Literal["fetch", "compute", "free"]
Watch = Callable[[Event, str, int], None]
"""Is told of a unit's name and the number of its slot: its weights are asked for, computed with, no longer needed."""
ALIGNMENT = 512
"""Bytes: where a weight may begin in a slot. That of CUDA's allocator and a multiple of the CPU's, so that kernels
choose as they do for resident weights."""
SLOTS = 2  # one that computes, one that is filled


class Weight(NamedTuple):
    """One parameter of a unit: its name in the network, and the module that holds it, under which name."""

    name: str
    module: nn.Module
    leaf: str
    blank: nn.Parameter
    """The parameter on the meta device, which stands there while the weight does not."""


@dataclass(frozen=True)
class Unit:
    """Weights that come and go together."""

    name: str
    weights: tuple[Weight, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of a slot that holds them."""
        return sum(_aligned(weight.blank.numel() * dtype.itemsize) for weight in self.weights)


def unit_of(network: nn.Module, name: str, *, without: type[nn.Module] | None = None) -> Unit:
    """The parameters below the module of this name, but for those below modules of a kind."""
    weights = []
    for path, module in network.get_submodule(name).named_modules(prefix=name):
        if without is not None and isinstance(_owner(network, path, without), without):
            continue
        for leaf, blank in module.named_parameters(recurse=False):
            weights.append(Weight(f"{path}.{leaf}", module, leaf, blank))
    return Unit(name, tuple(weights))


def _owner(network: nn.Module, path: str, kind: type[nn.Module]) -> nn.Module | None:
    """The innermost module of a kind that the module at `path` is, or stands in."""
    while path:
        if isinstance(module := network.get_submodule(path), kind):
            return module
        path = path.rpartition(".")[0]
    return None


class Slot:
    """Memory for one unit's weights on a device. On a GPU `filled` and `freed` order the copies and the products."""

    def __init__(self, number: int, nbytes: int, device: torch.device, dtype: torch.dtype) -> None:
        self.number, self._dtype = number, dtype
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.filled: torch.cuda.Event | None = None
        self.freed: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.filled, self.freed = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def views(self, unit: Unit) -> Iterator[tuple[Weight, Tensor]]:
        """Every weight of a unit with its place in the memory."""
        begin = 0
        for weight in unit.weights:
            nbytes = weight.blank.numel() * self._dtype.itemsize
            yield weight, self._memory[begin : begin + nbytes].view(self._dtype).view(weight.blank.shape)
            begin += _aligned(nbytes)


class HostMemory:
    """Keeps in host memory what is fetched, in the dtype it is asked for: the file is read once, in the first pass.

    `pinned` pages can be copied to a GPU while it computes.
    """

    def __init__(self, fetch: Fetch, *, pinned: bool) -> None:
        self._fetch, self._pinned = fetch, pinned
        self._kept: dict[str, Tensor] = {}

    def fetch(self, target: Tensor, name: str) -> None:
        """Fill `target` from what is kept. On a GPU that is only queued, on the stream that is current."""
        if name not in self._kept:
            kept = torch.empty(target.shape, dtype=target.dtype, pin_memory=self._pinned)
            self._fetch(kept, name)
            self._kept[name] = kept
        target.copy_(self._kept[name], non_blocking=self._pinned)


class BlockStream:
    """Units whose weights are on a device in turns. `present` waits for one unit; the next ones are fetched meanwhile.

    `successor[i]` is the unit that is expected after unit i. Another order is served too, only not ahead of time.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        successor: Sequence[int],
        fetch: Fetch,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        slots: int = SLOTS,
        watch: Watch | None = None,
    ) -> None:
        self.units, self._successor, self._fetch = units, successor, fetch
        self.device, self.watch = torch.device(device), watch
        self._dtype, self._slots = dtype, slots
        self._free: deque[Slot] | None = None  # made when they are needed: who only reads out needs no block
        self._coming: deque[tuple[int, Slot, Future[None]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.turn = RLock()
        """Held by whoever runs the network: one forward at a time."""
        self._copies: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def present(self, number: int) -> Iterator[None]:
        """The unit's weights are in its modules inside the `with`."""
        slot = self.enter(number)
        try:
            yield
        finally:
            self.leave(number, slot)

    def enter(self, number: int) -> Slot:
        """Wait for the unit's weights and put them into its modules; `leave` gives their slot back.

        Raises FluxIRError for weights that cannot be read.
        """
        if not self._coming or self._coming[0][0] != number:
            self._forget_coming()
            self._fetch_from(number)
        _, slot, arriving = self._coming.popleft()
        try:
            arriving.result()
        except BaseException:
            self.free.append(slot)
            raise
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        for weight, view in slot.views(self.units[number]):
            weight.module._parameters[weight.leaf] = nn.Parameter(view, requires_grad=False)
        self._fetch_from(self._successor[number])
        self._tell("compute", number, slot)
        return slot

    def leave(self, number: int, slot: Slot) -> None:
        """Take the weights out of the unit's modules; their slot is filled anew."""
        for weight in self.units[number].weights:
            weight.module._parameters[weight.leaf] = weight.blank
        if slot.freed is not None:
            slot.freed.record(torch.cuda.current_stream(self.device))
        self._tell("free", number, slot)
        self.free.append(slot)
        self._fetch_from(self._successor[self._coming[-1][0] if self._coming else number])

    def close(self) -> None:
        """Stop fetching and give the memory back."""
        self._forget_coming()
        self._thread.shutdown()
        self._free = deque()

    @property
    def free(self) -> "deque[Slot]":
        """The slots that nothing is in and nothing comes to."""
        if self._free is None:
            nbytes = max(unit.nbytes(self._dtype) for unit in self.units)
            self._free = deque(Slot(number, nbytes, self.device, self._dtype) for number in range(self._slots))
        return self._free

    def _fetch_from(self, number: int) -> None:
        """Ask for the unit, if it does not come already, and for those after it, as far as there are free slots."""
        if self._coming:
            number = self._successor[self._coming[-1][0]]
        while self.free:
            slot = self.free.popleft()
            self._tell("fetch", number, slot)
            self._coming.append((number, slot, self._thread.submit(self._fill, self.units[number], slot)))
            number = self._successor[number]

    def _fill(self, unit: Unit, slot: Slot) -> None:
        """Runs in the thread."""
        if self._copies is None or slot.filled is None or slot.freed is None:
            for weight, view in slot.views(unit):
                self._fetch(view, weight.name)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.freed)
            for weight, view in slot.views(unit):
                self._fetch(view, weight.name)
            slot.filled.record(self._copies)

    def _forget_coming(self) -> None:
        while self._coming:
            _, slot, arriving = self._coming.popleft()
            arriving.exception()  # waits; what went wrong with a unit that nobody asked for does not matter
            self.free.append(slot)

    def _tell(self, event: Event, number: int, slot: Slot) -> None:
        if self.watch is not None:
            self.watch(event, self.units[number].name, slot.number)


def stream_blocks(
    network: nn.Module,
    blocks: Sequence[str],
    fetch: Fetch,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    without: type[nn.Module] | None = None,
    slots: int = SLOTS,
    watch: Watch | None = None,
) -> BlockStream:
    """Have these modules of a network on the meta device streamed, in this order; all others are filled and stay.

    `without`: modules of this kind inside the blocks stay as well, such as those that are used outside of them. Threads
    that call the network wait for each other. On a CPU a block takes the rows of a batch one by one, so that each has
    the bits that it has by itself, and the weights come once for all.
    """
    units = [unit_of(network, name, without=without) for name in blocks]
    fill_the_rest(network, units, fetch, device, dtype)
    successor = [(number + 1) % len(units) for number in range(len(units))]
    stream = BlockStream(units, successor, fetch, device, dtype, slots=slots, watch=watch)
    network.forward = _InTurn(stream, network.forward)
    for number, name in enumerate(blocks):
        block = network.get_submodule(name)
        if stream.device.type == "cpu":
            take_rows_one_by_one(block)
        Turns(stream, number).hang(block)
    return stream


def take_rows_one_by_one(block: nn.Module) -> None:
    """Have a module compute each row of its first argument by itself: on a CPU a batch has other last bits."""
    block.forward = _RowByRow(block.forward)


def fill_the_rest(
    network: nn.Module, units: Sequence[Unit], fetch: Fetch, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Fill every parameter of a network on the meta device that is in none of the units."""
    come_and_go = {weight.name for unit in units for weight in unit.weights}
    for name, blank in list(network.named_parameters()):
        if name not in come_and_go:
            value = torch.empty(blank.shape, device=device, dtype=dtype)
            fetch(value, name)
            path, _, leaf = name.rpartition(".")
            network.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


class Turns:
    """The hooks of one block: its weights are there when it is called, and gone when it is done or has failed."""

    def __init__(self, stream: BlockStream, number: int) -> None:
        self._stream, self._number = stream, number
        self._slot: Slot | None = None

    def hang(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self._before)
        block.register_forward_hook(self._after, always_call=True)

    def _before(self, block: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            raise FluxIRError(
                "gradients need every block's weights after the forward pass: these are streamed",
                hint="leave out --offload blocks and --quantize",
            )
        self._slot = self._stream.enter(self._number)

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._stream.leave(self._number, slot)


class _InTurn:
    """A network's forward, called by one thread at a time."""

    def __init__(self, stream: BlockStream, forward: Callable[..., Tensor]) -> None:
        self._stream, self._forward = stream, forward

    def __call__(self, *args: Any) -> Tensor:
        with self._stream.turn:
            return self._forward(*args)


class _RowByRow:
    """A block's forward, called for each row of its first argument."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        return torch.cat([self._forward(row, *others) for row in torch.split(x, 1)])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
