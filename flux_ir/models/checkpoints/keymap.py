"""Where each of our tensors stands in a diffusers file, and back. Both directions follow from one table.

Our names are those of the published single files. diffusers splits what they fuse (queries, keys, values and the
feed-forward of a single block), stores the last layer's modulation as (scale, shift) where they have (shift, scale),
and writes the autoencoder's 1x1 convolutions as linear layers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.models.autoencoder import AutoEncoderParams
from flux_ir.models.flux1.transformer import FluxParams
from flux_ir.models.flux2.transformer import Flux2Params

NetworkParams = FluxParams | Flux2Params | AutoEncoderParams

_LAST_LAYER = {
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_HALVES_SWAPPED = "final_layer.adaLN_modulation.1"
_OUTSIDE_BLOCKS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    **_LAST_LAYER,
}
_JOINT_ATTENTION: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_DOUBLE_BLOCK: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    **_JOINT_ATTENTION,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE_BLOCK: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# FLUX.2 modulates outside its blocks, and diffusers leaves the two linears of its single blocks whole.
_FLUX2_OUTSIDE_BLOCKS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **_LAST_LAYER,
}
_FLUX2_DOUBLE_BLOCK: dict[str, tuple[str, ...]] = {
    **_JOINT_ATTENTION,
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_FLUX2_SINGLE_BLOCK: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}


class _TransformerNames(NamedTuple):
    """diffusers' names of one architecture's layers: outside its blocks, in a double block and in a single block."""

    outside: Mapping[str, str]
    double: Mapping[str, tuple[str, ...]]
    single: Mapping[str, tuple[str, ...]]


_TRANSFORMERS: Mapping[type, _TransformerNames] = {
    FluxParams: _TransformerNames(_OUTSIDE_BLOCKS, _DOUBLE_BLOCK, _SINGLE_BLOCK),
    Flux2Params: _TransformerNames(_FLUX2_OUTSIDE_BLOCKS, _FLUX2_DOUBLE_BLOCK, _FLUX2_SINGLE_BLOCK),
}
_MIDDLE = {
    "block_1": "resnets.0",
    "block_2": "resnets.1",
    "attn_1.norm": "attentions.0.group_norm",
    "attn_1.q": "attentions.0.to_q",
    "attn_1.k": "attentions.0.to_k",
    "attn_1.v": "attentions.0.to_v",
    "attn_1.proj_out": "attentions.0.to_out.0",
}
# FLUX.2's autoencoder has a 1x1 convolution on either side of the latent; the published file counts them in its halves.
_QUANT_CONVS = ("encoder.quant_conv.", "decoder.post_quant_conv.")
_AS_LINEAR = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


class Parts(NamedTuple):
    """One of our tensors as a file has it: the names it is stored under, and how its rows are arranged there."""

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Rows of each part, if there are several: stacked in this order they are our tensor."""
    swap_halves: bool = False
    """The first and second half of the rows change places."""
    as_linear: bool = False
    """A 1x1 convolution stored without its two last axes."""

    def shapes(self, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape of each part, if our tensor has the shape `ours`."""
        ours = ours[:2] if self.as_linear else ours
        return [(rows, *ours[1:]) for rows in self.rows] if self.rows else [ours]

    def split(self, ours: Tensor) -> list[Tensor]:
        """The parts of our tensor, as views where possible."""
        if self.as_linear:
            ours = ours[..., 0, 0]
        if self.swap_halves:
            ours = torch.cat(ours.chunk(2)[::-1])
        return list(torch.split(ours, list(self.rows))) if self.rows else [ours]

    def fill(self, ours: Tensor, parts: Iterable[Tensor]) -> None:
        """Copies the parts into our tensor, one after the other: it may have another device and dtype than they."""
        target = ours[..., 0, 0] if self.as_linear else ours
        for own_rows, part in zip(torch.split(target, list(self.rows)) if self.rows else [target], parts, strict=True):
            if self.swap_halves:
                first, second = own_rows.chunk(2)
                first.copy_(part.chunk(2)[1])
                second.copy_(part.chunk(2)[0])
            else:
                own_rows.copy_(part)


def diffusers_parts(names: Iterable[str], params: NetworkParams) -> dict[str, Parts]:
    """For each of our names (a network's state dict), where diffusers keeps that tensor."""
    if not isinstance(params, AutoEncoderParams):
        return {name: _transformer_parts(name, params) for name in names}
    levels = len(params.ch_mult)
    return {name: Parts((_autoencoder_name(name, levels),), as_linear=bool(_AS_LINEAR.search(name))) for name in names}


def to_diffusers(state: Mapping[str, Tensor], params: NetworkParams) -> dict[str, Tensor]:
    """A state dict of ours under diffusers' names."""
    converted: dict[str, Tensor] = {}
    for name, parts in diffusers_parts(state, params).items():
        converted.update(zip(parts.names, parts.split(state[name]), strict=True))
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def from_diffusers(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], params: NetworkParams
) -> dict[str, Tensor]:
    """A diffusers state dict under our names. `shapes` are those of our network, by name."""
    converted: dict[str, Tensor] = {}
    for name, parts in diffusers_parts(shapes, params).items():
        found = [state[part] for part in parts.names]
        converted[name] = found[0].new_empty(shapes[name])
        parts.fill(converted[name], found)
    return converted


def _transformer_parts(name: str, params: FluxParams | Flux2Params) -> Parts:
    theirs = _TRANSFORMERS[type(params)]
    stem, leaf = name.rsplit(".", 1)
    if stem in theirs.outside:
        return Parts((f"{theirs.outside[stem]}.{leaf}",), swap_halves=stem == _HALVES_SWAPPED)
    kind, block, layer = stem.split(".", 2)
    folder, table = {
        "double_blocks": ("transformer_blocks", theirs.double),
        "single_blocks": ("single_transformer_blocks", theirs.single),
    }[kind]
    leaf = "weight" if leaf == "scale" else leaf
    names = tuple(f"{folder}.{block}.{part}.{leaf}" for part in table[layer])
    return Parts(names, _rows(len(names), params))


def _rows(parts: int, params: FluxParams | Flux2Params) -> tuple[int, ...]:
    qkv = (params.hidden_size,) * 3
    return {1: (), 3: qkv, 4: (*qkv, int(params.hidden_size * params.mlp_ratio))}[parts]


def _autoencoder_name(name: str, levels: int) -> str:
    if name.startswith("bn."):
        return name
    if name.startswith(_QUANT_CONVS):
        return name.split(".", 1)[1]
    half, module, rest = name.split(".", 2)
    if module == "mid":
        layer = next(ours for ours in _MIDDLE if rest.startswith(f"{ours}."))
        return f"{half}.mid_block.{_MIDDLE[layer]}{rest.removeprefix(layer)}"
    if module in ("down", "up"):
        level, rest = rest.split(".", 1)
        # Our decoder counts its levels from the largest picture, theirs in the order they run.
        number = int(level) if module == "down" else levels - 1 - int(level)
        rest = rest.replace("block.", "resnets.", 1).replace(f"{module}sample.", f"{module}samplers.0.", 1)
        return f"{half}.{module}_blocks.{number}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
    return f"{half}.conv_norm_out.{rest}" if module == "norm_out" else name
