"""One random LoRA, as each program would have written it."""

import json
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.models.checkpoints.keymap import diffusers_parts

RANK, SCALE = 4, 0.5


class Factors(NamedTuple):
    """One layer's matrices, for the layer as the published checkpoints have it."""

    up: Tensor
    down: Tensor


def draw_factors(network, *, attention_only=False, rank=RANK, seed=3):
    """Matrices for every linear layer, by its name; `attention_only`: those that XLabs' layout can say."""
    draw, factors = torch.Generator().manual_seed(seed), {}
    attention = ("img_attn.qkv", "txt_attn.qkv", "_attn.proj", "linear1", "linear2")
    for name, weight in network.state_dict().items():
        if not name.endswith(".weight") or weight.ndim != 2 or (attention_only and not name[:-7].endswith(attention)):
            continue
        rows, columns = weight.shape
        up, down = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
        if attention_only and name.endswith("linear1.weight"):
            up[3 * network.params.hidden_size :] = 0  # its feed-forward rows
        factors[name.removesuffix(".weight")] = Factors(0.1 * up, down)
    return factors


def bfl_names(factors, network):
    return dict(factors)


def diffusers_names(factors, network):
    """Split as diffusers splits the layers; a part without any change is left out."""
    split = {}
    for name, (up, down) in factors.items():
        parts = diffusers_parts([f"{name}.weight"], network.params)[f"{name}.weight"]
        for part, rows in zip(parts.names, parts.split(up), strict=True):
            if rows.any():
                split[part.removesuffix(".weight")] = Factors(rows, down)
    return split


def xlabs_names(factors, network):
    named, hidden = {}, network.params.hidden_size
    for name, (up, down) in factors.items():
        kind, block, layer = name.split(".", 2)
        stream = {"img_attn": "1", "txt_attn": "2"}.get(layer.split(".")[0], "")
        is_qkv = layer.endswith(("qkv", "linear1"))
        what = ("qkv" if is_qkv else "proj") + f"_lora{stream}"
        named[f"{kind}.{block}.processor.{what}"] = Factors(up[: 3 * hidden] if is_qkv else up, down)
    return named


def write(factors, path, *, prefix="", dots=True, ends=("lora_A.weight", "lora_B.weight"), alpha=None, metadata=None):
    """A file with these layers, their names behind a prefix and with dots or underscores."""
    tensors = {}
    for name, (up, down) in factors.items():
        layer = prefix + (name if dots else name.replace(".", "_"))
        tensors |= {f"{layer}.{ends[0]}": down.clone().contiguous(), f"{layer}.{ends[1]}": up.clone().contiguous()}
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def scaled(factors):
    """With the scale in the second matrix, for layouts that say none. A power of two: no bit is lost."""
    return {name: Factors(SCALE * up, down) for name, (up, down) in factors.items()}


def kohya(factors, network, path):
    ends = ("lora_down.weight", "lora_up.weight")
    return write(factors, path, prefix="lora_unet_", dots=False, ends=ends, alpha=SCALE * RANK)


def kohya_with_diffusers_names(factors, network, path):
    ends, named = ("lora_down.weight", "lora_up.weight"), diffusers_names(factors, network)
    return write(named, path, prefix="lora_transformer_", dots=False, ends=ends, alpha=SCALE * RANK)


def diffusers(factors, network, path):
    return write(diffusers_names(scaled(factors), network), path, prefix="transformer.")


def diffusers_with_settings(factors, network, path):
    settings = {"transformer.r": RANK, "transformer.lora_alpha": SCALE * RANK, "transformer.alpha_pattern": {}}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    return write(diffusers_names(factors, network), path, prefix="transformer.", metadata=metadata)


def peft_folder(factors, network, path):
    folder = path.with_suffix("")
    write(diffusers_names(factors, network), folder / "adapter_model.safetensors", prefix="base_model.model.")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "alpha_pattern": {}, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def onetrainer(factors, network, path):
    """The newer layout: parts of fused layers by their numbers."""
    split = {}
    for name, (up, down) in factors.items():
        parts = diffusers_parts([f"{name}.weight"], network.params)[f"{name}.weight"]
        rows = torch.split(up, list(parts.rows)) if parts.rows else [up]
        names = [f"{name}.{number}" for number in range(len(rows))] if parts.rows else [name]
        names = ["img_in.proj"] if name == "img_in" else names
        split |= {part: Factors(own, down) for part, own in zip(names, rows, strict=True) if own.any()}
    ends = ("lora_down.weight", "lora_up.weight")
    return write(split, path, prefix="transformer.", ends=ends, alpha=SCALE * RANK)


def comfyui(factors, network, path):
    return write(scaled(factors), path, prefix="diffusion_model.")


def no_prefix(factors, network, path):
    return write(scaled(factors), path, ends=("lora_down.weight", "lora_up.weight"))


def cut_short(factors, network, path):
    named = diffusers_names(scaled(factors), network)
    cut = {name.replace("single_transformer_blocks", "le_transformer_blocks"): both for name, both in named.items()}
    cut = {
        name.replace("transformer_blocks", "sformer_blocks", 1) if name.startswith("transformer_blocks") else name: f
        for name, f in cut.items()
    }
    return write(cut, path, prefix="base_model.model.")


def xlabs(factors, network, path):
    return write(xlabs_names(scaled(factors), network), path, ends=("down.weight", "up.weight"))


LAYOUTS = {
    f.__name__: f
    for f in (
        *(kohya, kohya_with_diffusers_names, diffusers, diffusers_with_settings),
        *(peft_folder, onetrainer, comfyui, no_prefix, cut_short, xlabs),
    )
}
