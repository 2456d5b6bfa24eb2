"""Which of the networks' weights a layer of a LoRA changes, however the program that trained it spells their names.

Some programs have the names of the published checkpoints and some those of diffusers (`keymap`), with dots or with
underscores between their parts, and with prefixes before them. XLabs has its own for the attention, OneTrainer for the
parts of fused layers. Text encoders have the names of transformers, and no layer is called as one of another network.
A name of one tensor is that of its layer, and what the tensor is for (`LEAVES`). Next: `changes`.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Literal, NamedTuple

from flux_ir.models.architecture import AnyTransformer
from flux_ir.models.checkpoints.keymap import diffusers_parts

Naming = Literal["BFL", "diffusers", "XLabs", "OneTrainer", "transformers"]
Part = Literal["transformer", "t5", "clip"]
"""The networks of a model that a LoRA can change."""
PART_NAMES: dict[Part, str] = {"transformer": "the transformer", "t5": "T5", "clip": "CLIP"}

LEAVES = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight"), "down"),
    "lora_linear_layer.down.weight": "down",  # diffusers before PEFT
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight"), "up"),
    "lora_linear_layer.up.weight": "up",
    "down.weight": "down",  # XLabs
    "up.weight": "up",
    "alpha": "alpha",
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude"),
    "lora_magnitude_vector.default.weight": "magnitude",
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
}
"""What tensors of a layer are called, and what they are here."""
_BY_LENGTH = sorted(LEAVES, key=len, reverse=True)

# What is not read, by a part of a tensor's name.
_REFUSED = {
    "lora_mid": "a Tucker decomposition (lora_mid), which is for convolutions",
    "lokr_t2": "a Tucker decomposition (lokr_t2), which is for convolutions",
    "hada_t": "a Tucker decomposition (hada_t1, hada_t2), which is for convolutions",
    "oft_": "an OFT adapter, which turns weights and adds nothing to them",
    "ia3_": "an IA3 adapter, which scales activations",
    "on_input": "an IA3 adapter, which scales activations",
    ".diff": "whole differences of weights (diff, diff_b)",
    "_norm": "changes of norms",
    ".bias": "changes of biases",
    ".a1.": "a GLoRA",
    ".b1.": "a GLoRA",
}
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    *("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te.", "lora_te1.", "lora_te2.", "lora_te3."),
    *("text_encoders.", "text_encoder.", "text_encoder_2.", "te.", "te1.", "te2.", "te3.", "clip_l.", "t5xxl.", "t5."),
    "lora_",
)
# Files exist whose names have lost their first four letters.
_CUT_SHORT = {"sformer_blocks": "transformer_blocks", "le_transformer_blocks": "single_transformer_blocks"}
_OF_TEXT_ENCODERS = (
    *("lora_te", "text_encoder", "te.", "te1.", "te2.", "te3.", "clip_l.", "t5xxl.", "t5.", "text_model."),
    *("base_model.model.text_model.", "base_model.model.encoder.", "encoder.", "bundle_emb."),
)
# Of text encoders, and not used by FLUX.1: CLIP's projection, and vectors of new words.
_UNUSED = ("text_projection", "bundle_emb.")
_CLIP_LEVEL = "text_model."  # left out of the names by transformers 5
_XLABS_DOUBLE = re.compile(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)")
_XLABS_SINGLE = re.compile(r"(single_blocks\.\d+)\.(linear1|linear2)")

# Names of other families' layers, their dots written as underscores.
_FAMILIES = {
    "FLUX.2": ("double_stream_modulation", "single_stream_modulation", "to_qkv_mlp_proj", "ff_linear_in"),
    "Stable Diffusion 3": ("joint_blocks_",),
    "Stable Diffusion or SDXL": ("input_blocks_", "output_blocks_", "down_blocks_", "up_blocks_", "middle_block_"),
    "Chroma, which was made of FLUX.1 and is built otherwise": ("distilled_guidance_layer",),
    "HunyuanVideo": ("individual_token_refiner",),
    "Qwen-Image": ("img_mlp_net_", "img_mod_1"),
    "Wan": ("cross_attn_",),
    "Z-Image or Lumina": ("noise_refiner_", "context_refiner_", "_attention_to_q", "_attention_qkv"),
}


class Target(NamedTuple):
    """What the change of a layer is added to: rows of one of a network's weights."""

    weight: str
    cuts: tuple[int, ...]
    """Rows from the first to the last of these; between neighbours lies what diffusers has as one tensor."""
    naming: Naming
    swap_halves: bool = False
    """The layer has the first and the second half of the rows in each other's place."""
    part: Part = "transformer"

    @property
    def rows(self) -> slice:
        """The rows of the weight."""
        return slice(self.cuts[0], self.cuts[-1])


class TensorName(NamedTuple):
    """The name of a tensor in a file, taken apart."""

    layer: str
    """As the file spells it."""
    leaf: str


def targets(network: AnyTransformer) -> dict[str, Target]:
    """Every linear layer of a transformer under all names that it has, without prefixes, with dots and underscores."""
    found: dict[str, Target] = {}
    state = network.state_dict()
    matrices = [name for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2]
    for name, parts in diffusers_parts(matrices, network.params).items():
        cuts = (0, *accumulate(parts.rows or (state[name].shape[0],)))
        stem = name.removesuffix(".weight")
        found[stem] = Target(name, cuts, "BFL")
        for number, part in enumerate(parts.names):
            own = Target(name, cuts[number : number + 2], "diffusers", parts.swap_halves)
            found[part.removesuffix(".weight")] = own
            if len(parts.names) > 1:
                found[f"{stem}.{number}"] = own._replace(naming="OneTrainer")
        if match := _XLABS_DOUBLE.fullmatch(stem):
            found[f"{match[1]}.processor.{match[3]}_lora{1 if match[2] == 'img' else 2}"] = Target(name, cuts, "XLabs")
        elif match := _XLABS_SINGLE.fullmatch(stem):
            # Its layer beside `linear1` gives queries, keys and values alone.
            kind, own_cuts = ("qkv", cuts[:4]) if match[2] == "linear1" else ("proj", cuts)
            found[f"{match[1]}.processor.{kind}_lora"] = Target(name, own_cuts, "XLabs")
    found["img_in.proj"] = found["img_in"]._replace(naming="OneTrainer")
    return _spelt(found)


def text_targets(part: Part, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """The same of a text encoder, whose weights these are (`encoder_configs.linear_layers`)."""
    found: dict[str, Target] = {}
    for name, (rows, _) in shapes.items():
        target = Target(name, (0, rows), "transformers", part=part)
        stem = name.removesuffix(".weight")
        found |= {stem: target, stem.removeprefix(_CLIP_LEVEL): target}
    return _spelt(found)


def _spelt(found: Mapping[str, Target]) -> dict[str, Target]:
    return {name.replace(".", "_"): target for name, target in found.items()} | dict(found)


def find(layer: str, known: Mapping[str, Target]) -> Target | None:
    """The target of a layer, whatever prefixes its name has; None: no network has such a layer."""
    while True:
        for short, whole in _CUT_SHORT.items():
            if layer.startswith(short):
                layer = whole + layer.removeprefix(short)
        if layer in known:
            return known[layer]
        prefix = next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), None)
        if prefix is None:
            return None
        layer = layer.removeprefix(prefix)


def taken_apart(name: str) -> TensorName | None:
    """The layer and the purpose of a tensor; None if its name ends in none of `LEAVES`."""
    leaf = next((leaf for leaf in _BY_LENGTH if name.endswith(f".{leaf}")), None)
    return None if leaf is None else TensorName(name.removesuffix(f".{leaf}"), LEAVES[leaf])


def is_of_a_text_encoder(name: str) -> bool:
    """Whether a tensor is one for a text encoder, by the start of its name."""
    return name.startswith(_OF_TEXT_ENCODERS)


def is_unused(name: str) -> bool:
    """Whether a tensor changes what FLUX.1 does not use of a text encoder."""
    return is_of_a_text_encoder(name) and any(mark in name for mark in _UNUSED)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are names of a LoRA or its like, and not of a network."""
    marks = ("lora_", ".lora.", "_lora.", "_lora1.", "_lora2.", "lokr_", "hada_", "oft_", "ia3_", "dora_scale")
    return any(mark in name for name in names for mark in marks)


def refusal(names: Iterable[str]) -> str | None:
    """What these tensors are, if it is something known that is not read."""
    for name in names:
        for mark, what in _REFUSED.items():
            if mark in name:
                return what
    return None


def other_family(names: Iterable[str]) -> str | None:
    """The family of models that a LoRA with such names is for, if it is another one."""
    flat = [name.replace(".", "_") for name in names]
    return next((f for f, marks in _FAMILIES.items() if any(mark in name for name in flat for mark in marks)), None)
