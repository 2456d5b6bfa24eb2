"""The two text encoders of FLUX: networks (`t5`, `clip`), tokenizers (`tokenizer`) and what joins them (`encoders`)."""

from flux_ir.models.text.encoders import (
    TextEmbedding,
    TextEncoder,
    encode,
    load_clip,
    load_phrase_tower,
    load_t5,
    open_encoder,
)

__all__ = ["TextEmbedding", "TextEncoder", "encode", "load_clip", "load_phrase_tower", "load_t5", "open_encoder"]
