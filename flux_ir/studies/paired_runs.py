"""Runs of transformers that take the same steps: what every block of them puts out, beside that of a reference.

Nothing is stored but the outputs of the reference's blocks at one step. Next: `likeness`, which measures what is told.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_ir.models.architecture import Transformer, block_names
from flux_ir.sampling.denoise import Step
from flux_ir.sampling.generate import Inputs, sample
from flux_ir.shapes import Tokens

REFERENCE, ALONE = "reference", "block"
"""What the reference is called among the runs, and what blocks that are given its blocks' inputs are."""
Told = Callable[[str, str, Tokens, Tokens], None]
"""Called with the name of a run, a block (`double_blocks.3`), the reference's output and the run's, of one step: text,
then image."""


class PairedRun(NamedTuple):
    """A run beside the reference."""

    name: str
    network: Transformer
    inputs: Inputs
    guidance: float
    forced: bool = False
    """Whether each step begins with the reference's state; if not, with the one that its own last step went to."""


class PairedRuns:
    """A reference run and others, step by step.

    `alone` is a network whose blocks are asked one by one, each given exactly what the reference's block was given, its
    conditioning vector included: what the block's own weights do, called `ALONE`.
    """

    def __init__(
        self,
        reference: Transformer,
        inputs: Inputs,
        timesteps: Sequence[float],
        guidance: float,
        runs: Sequence[PairedRun],
        told: Told,
        *,
        alone: Transformer | None = None,
    ) -> None:
        self._reference, self._timesteps, self._runs = reference, list(timesteps), runs
        self._told, self._alone = told, alone
        self._start = PairedRun(REFERENCE, reference, inputs, guidance)
        self._outputs: dict[str, Tokens] = {}
        self._asking = False

    @torch.no_grad()
    def steps(self) -> Iterator[Mapping[str, Step]]:
        """Each step of every run, by name."""
        with ExitStack() as stack:
            own = {
                run.name: stack.enter_context(closing(self._walk(run)))  # type: ignore[type-var]
                for run in (self._start, *self._runs)
                if not run.forced
            }
            for _ in range(len(self._timesteps) - 1):
                with _watched(self._reference, self._keep):
                    done = {REFERENCE: next(own[REFERENCE])}
                for run in self._runs:
                    with _watched(run.network, partial(self._compare, run)):
                        done[run.name] = self._forced(run, done[REFERENCE]) if run.forced else next(own[run.name])
                self._outputs.clear()
                yield done

    def _walk(self, run: PairedRun) -> Iterator[Step]:
        return sample(run.network, run.inputs, self._timesteps, run.guidance)

    def _forced(self, run: PairedRun, reference: Step) -> Step:
        """One step from where the reference's began."""
        inputs, number = run.inputs._replace(img=reference.before), reference.number
        walk = sample(run.network, inputs, self._timesteps[: number + 2], run.guidance, first_step=number)
        with closing(walk):  # type: ignore[type-var]
            return next(walk)

    def _keep(self, name: str, args: tuple[Any, ...], output: Tokens) -> None:
        if self._asking:
            return
        self._outputs[name] = output
        if self._alone is not None:
            self._asking = True  # the network may be the reference itself, whose hooks then come here again
            try:
                alone = _joined(self._alone.get_submodule(name)(*args))
            finally:
                self._asking = False
            self._told(ALONE, name, output, alone)

    def _compare(self, run: PairedRun, name: str, args: tuple[Any, ...], output: Tokens) -> None:
        self._told(run.name, name, self._outputs[name], output)


@contextmanager
def _watched(network: Transformer, told: Callable[[str, tuple[Any, ...], Tokens], None]) -> Iterator[None]:
    """Every block's arguments and output, text and image together, are told inside the `with`."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda block, args, output: told(name, args, _joined(output))

    with ExitStack() as stack:
        for name in block_names(network.params):
            stack.callback(network.get_submodule(name).register_forward_hook(hook_of(name)).remove)
        yield


def _joined(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat([output[1], output[0]], dim=1)
