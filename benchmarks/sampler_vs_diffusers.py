"""Our transformer against diffusers' with the same weights, inputs and dtype: seconds of one forward."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from measure import Target, arguments, interleaved, keep_freed_memory, machine, parse, print_report
from networks import FULL, NARROW, SIDE_PX, TXT_TOKENS, WIDE, random_flux, random_inputs
from torch import Tensor

from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import Inputs

TARGET = Target("most", 1.0)
TIME = 0.75


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--full", action="store_true", help="the full-size network, in bf16 on a GPU")
    options = parse(parser)
    keep_freed_memory()
    networks = {"full size": FULL} if options.full else {"hidden 384": NARROW, "hidden 1024": WIDE}
    dtypes = [torch.bfloat16] if options.full else [torch.bfloat16, torch.float32]
    rows = [
        row(f"{name}, {params.depth} + {params.depth_single_blocks} blocks", params, dtype, options)
        for name, params in networks.items()
        for dtype in dtypes
    ]
    columns = ["network", "dtype", "ours [s]", "diffusers [s]", "ratio", "target", "largest difference"]
    title = f"One forward, {SIDE_PX} px, {TXT_TOKENS} text tokens"
    print_report(title, columns, rows, machine(options.device))


def row(name: str, params: FluxParams, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    """One network in one dtype, both implementations in turns."""
    model = random_flux(params, options.device, dtype)
    inputs = random_inputs(params, SIDE_PX, TXT_TOKENS, options.device, dtype)
    ours, theirs = our_forward(model, inputs), their_forward(model, inputs)
    difference = (ours().float() - theirs().float()).abs().max().item()
    seconds = interleaved({"ours": ours, "theirs": theirs}, options.repetitions, device=options.device)
    ratio = seconds["ours"] / seconds["theirs"]
    return [
        name,
        str(dtype).removeprefix("torch."),
        f"{seconds['ours']:.4f}",
        f"{seconds['theirs']:.4f}",
        f"{ratio:.3f}",
        TARGET.verdict(ratio),
        f"{difference:.2g}",
    ]


def our_forward(model: Flux, inputs: Inputs) -> Callable[[], Tensor]:
    """One velocity of ours."""
    t = per_sample(TIME, inputs.img)

    @torch.no_grad()
    def forward() -> Tensor:
        return model(inputs.img, inputs.img_ids, inputs.txt, inputs.txt_ids, t, inputs.y)

    return forward


def their_forward(model: Flux, inputs: Inputs) -> Callable[[], Tensor]:
    """One velocity of diffusers', computed with our very weights: the two share them."""
    params = model.params
    with torch.device("meta"):
        theirs: Any = FluxTransformer2DModel(  # type: ignore[no-untyped-call]
            in_channels=params.in_channels,
            num_layers=params.depth,
            num_single_layers=params.depth_single_blocks,
            attention_head_dim=params.head_dim,
            num_attention_heads=params.num_heads,
            joint_attention_dim=params.context_in_dim,
            pooled_projection_dim=params.vec_in_dim,
            guidance_embeds=params.guidance_embed,
            axes_dims_rope=params.axes_dim,
        )
    theirs.load_state_dict(to_diffusers(model.state_dict(), params), strict=True, assign=True)
    theirs.eval()
    t = per_sample(TIME, inputs.img)

    @torch.no_grad()
    def forward() -> Tensor:
        return theirs(
            hidden_states=inputs.img,
            encoder_hidden_states=inputs.txt,
            pooled_projections=inputs.y,
            timestep=t,
            img_ids=inputs.img_ids[0],
            txt_ids=inputs.txt_ids[0],
            return_dict=False,
        )[0]

    return forward


if __name__ == "__main__":
    main()
