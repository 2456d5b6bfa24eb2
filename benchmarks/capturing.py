"""Sampling with a random network, every block captured or none: what the other benchmarks time, weigh and read.

`hooked` is how the program did it that this project descends from: hooks that copy to lists, and one `torch.save`.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import FULL, SIDE_PX, TXT_TOKENS, WIDE, random_flux, random_inputs

from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.registry import get_spec
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.recorder import Recorder
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sampling.generate import Inputs, sample
from flux_ir.sampling.schedule import get_schedule
from flux_ir.sites import block_outputs

GUIDANCE = 0.0  # none of these networks takes any


class Setting(NamedTuple):
    """A network and what it draws."""

    name: str
    params: FluxParams
    side_px: int
    txt_tokens: int
    steps: int


def settings() -> dict[str, Setting]:
    """What is timed, by the name it has on the command line."""
    tiny = get_spec("flux-tiny")
    return {
        "tiny": Setting("flux-tiny", tiny.flux, tiny.default_side_px, tiny.text_tokens, tiny.default_steps),
        "wide": Setting("hidden 1024, 4 + 8 blocks", WIDE, SIDE_PX, TXT_TOKENS, 4),
        "full": Setting("full size", FULL, SIDE_PX, TXT_TOKENS, 4),
    }


class Sampling:
    """A network of one setting on its device, in the dtype that suits the device, ready to sample."""

    def __init__(self, setting: Setting, device: str, steps: int | None = None) -> None:
        self.setting, self.device = setting, device
        dtype = choose_dtype("auto", [device]).dtype
        self.model: Flux = random_flux(setting.params, device, dtype)
        self.inputs: Inputs = random_inputs(setting.params, setting.side_px, setting.txt_tokens, device, dtype)
        self.timesteps = get_schedule(steps or setting.steps, self.inputs.img.shape[1], shift=False)
        self.plan = CapturePlan(
            flux=setting.params,
            sites=block_outputs(setting.params.depth, setting.params.depth_single_blocks),
            timesteps=self.timesteps,
            txt_tokens=self.inputs.txt.shape[1],
            img_tokens=self.inputs.img.shape[1],
            guidance=GUIDANCE,
            metadata={"height": setting.side_px, "width": setting.side_px},
            dtype=dtype,
        )

    def plain(self) -> None:
        """Every step, watched by no one."""
        for _ in sample(self.model, self.inputs, self.timesteps, GUIDANCE):
            pass

    def captured(self, path: Path) -> None:
        """Every step, with all block outputs written to `path`."""
        with CaptureWriter(path, self.plan) as sink, Recorder(self.model, self.plan.sites, sink):
            self.plain()

    def hooked(self, path: Path) -> None:
        """Every step, with all block outputs copied to lists in memory by hooks, and saved at the end."""
        outputs: dict[str, list[Any]] = {}

        def copy_to(name: str) -> Any:
            kept = outputs.setdefault(name, [])

            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                several = isinstance(output, tuple)
                copies = [value.to("cpu", copy=True) for value in (output if several else (output,))]
                kept.append(tuple(copies) if several else copies[0])

            return hook

        with ExitStack() as hooks:
            for kind in ("double_blocks", "single_blocks"):
                for number, block in enumerate(getattr(self.model, kind)):
                    handle = block.register_forward_hook(copy_to(f"{kind}.{number}"))
                    hooks.callback(handle.remove)
            self.plain()
        torch.save(outputs, path)
