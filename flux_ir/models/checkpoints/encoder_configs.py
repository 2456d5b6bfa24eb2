"""What the text encoders of the models are, for whoever has no configuration beside their weights, or no weights yet.

Names and shapes of their linear layers follow from it: what a LoRA can change.
"""

from collections.abc import Mapping
from typing import Any, Literal

from flux_ir.files import read_json
from flux_ir.models.registry import ModelSpec

Encoder = Literal["t5", "clip"]

CONFIG_FILE = "config.json"

# The two encoders that every published FLUX.1 uses: google/t5-v1_1-xxl and openai/clip-vit-large-patch14.
PUBLISHED: dict[Encoder, Mapping[str, Any]] = {
    "t5": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "clip": {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,  # wrong, and published so: `models.text.clip.ClipText` knows
        "pad_token_id": 1,
    },
}


def config_of(spec: ModelSpec, encoder: Encoder) -> Mapping[str, Any]:
    """The configuration of a text encoder of this model: that of the package, or the published one."""
    return PUBLISHED[encoder] if spec.assets is None else read_json(spec.assets / encoder / CONFIG_FILE)


def linear_layers(encoder: Encoder, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The weights of a text encoder's linear layers by their names in the network: rows and columns, in depth order."""
    # Arithmetic, because the networks are in `models.text`, which stands above: a test holds it against them.
    if encoder == "t5":
        d, inner, wide = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
        attention = {"q": (inner, d), "k": (inner, d), "v": (inner, d), "o": (d, inner)}
        gated = "gated" in config.get("feed_forward_proj", "relu")
        into = dict.fromkeys(("wi_0", "wi_1") if gated else ("wi",), (wide, d))
        layers = {f"layer.0.SelfAttention.{name}": shape for name, shape in attention.items()}
        layers |= {f"layer.1.DenseReluDense.{name}": shape for name, shape in (into | {"wo": (d, wide)}).items()}
        return _in_blocks("encoder.block", config["num_layers"], layers)
    config = config.get("text_config", config)
    d, wide = config["hidden_size"], config["intermediate_size"]
    layers = {f"self_attn.{name}": (d, d) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
    layers |= {"mlp.fc1": (wide, d), "mlp.fc2": (d, wide)}
    return _in_blocks("text_model.encoder.layers", config["num_hidden_layers"], layers)


def _in_blocks(stem: str, count: int, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{stem}.{n}.{layer}.weight": shape for n in range(count) for layer, shape in layers.items()}
