"""GGUF files: the header of llama.cpp's format, its names, and weights that are read a few blocks at a time.

A file is the magic word, a version, what its writer says of it (keys and values), the names, shapes, types and places
of all tensors, and their bytes. ComfyUI-GGUF and stable-diffusion.cpp keep the published names of FLUX in it; T5 has
those of llama.cpp. Next: `blocks`, how the bytes of a block become numbers.
"""

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.formats.blocks import BLOCK_TYPES
from flux_ir.models.checkpoints.headers import GGUF_START, PLAIN, TensorEntry, mapped_bytes, truncated

# The types of a file in the order of their numbers; "-" is a number that is no longer used. What is neither plain nor
# in `BLOCK_TYPES` cannot be read: only its name is known.
_TYPES = (
    "F32 F16 Q4_0 Q4_1 - - Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S "
    "IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 - - - TQ1_0 TQ2_0 - - - MXFP4 NVFP4"
)
# Values of the header, by the number of their type; 8 is a text and 9 a list.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_WEIGHTS_AT_ONCE = 1 << 20
_MOST_AXES = 8
_MOST_BYTES = 1 << 28  # of one value in a header
# Where llama.cpp keeps T5's layers, and what they are in the published file.
_T5_NAMES = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_up": "layer.1.DenseReluDense.wi",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_T5_OUTSIDE = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_T5_LAYER = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Blocks:
    """A weight in blocks of GGUF."""

    codes: TensorEntry
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"GGUF {self.codes.dtype}"

    def decode(self) -> Tensor:
        block = BLOCK_TYPES[self.codes.dtype]
        codes = mapped_bytes(self.codes).view(-1, block.nbytes)
        numbers = torch.empty(codes.shape[0], block.weights)
        # A part at a time: what lies between codes and numbers then stays in the processor's cache.
        step = _WEIGHTS_AT_ONCE // block.weights
        for start in range(0, codes.shape[0], step):
            numbers[start : start + step] = block.numbers(codes[start : start + step])
        return numbers.reshape(self.shape)


def read_gguf(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a GGUF file by the name that safetensors files give it.

    Raises FluxIRError for a file that is cut short or broken, a part of a split one, and types that cannot be read.
    """
    with path.open("rb") as file:
        try:
            said, tensors = _header(file, path)
        except (EOFError, UnicodeDecodeError, struct.error, KeyError) as error:
            raise _broken(path, "its header ends or has a value that no header has") from error
        data = file.tell()
    if said.get("split.count", 1) not in (0, 1):
        raise FluxIRError(
            f"{path} is one of {said['split.count']} parts of a split GGUF file",
            hint="join them with llama.cpp's `llama-gguf-split --merge`, or download a whole file",
        )
    alignment = said.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _broken(path, f"its alignment is {alignment!r}")
    data += -data % alignment
    entries = [_entry(path, name, shape, kind, data + offset, said) for name, shape, kind, offset in tensors]
    size, expected = path.stat().st_size, max((entry.offset + entry.nbytes for entry in entries), default=data)
    if size < expected:
        raise truncated(path, size, expected)
    published = _published_names([entry.name for entry in entries])
    named = {published[entry.name]: entry for entry in entries}
    if len(named) < len(entries):
        raise _broken(path, "two of its tensors have one name")
    return named


def _entry(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, said: dict[str, Any]) -> TensorEntry:
    known = dict(enumerate(_TYPES.split()))
    dtype = known[kind] if known.get(kind, "-") != "-" else f"number {kind}"
    count = prod(shape)
    if (block := BLOCK_TYPES.get(dtype)) is not None:
        per_block, block_bytes = block.weights, block.nbytes
    elif dtype in PLAIN:
        per_block, block_bytes = 1, PLAIN[dtype].itemsize
    else:
        raise FluxIRError(
            f"{path} holds weights of the GGUF type {dtype}, which cannot be read: first {name}",
            hint=f"take the same model as Q4_K_M, or another of these: {', '.join(BLOCK_TYPES)}, BF16, F16, F32",
        )
    if count % per_block:
        raise _broken(path, f"{name} has {count} weights, which are no whole blocks of {per_block}")
    original = said.get(_ORIGINAL_SHAPE + name)
    if original is not None:
        if not isinstance(original, list) or prod(original) != count:
            raise _broken(path, f"{name} of shape {shape} is said to have had the shape {original!r}")
        shape = tuple(original)
    stored = TensorEntry(path, name, shape, dtype, count // per_block * block_bytes, offset)
    return stored if dtype in PLAIN else stored._replace(encoding=Blocks(stored, shape))


def _published_names(names: list[str]) -> dict[str, str]:
    """For each name in the file what it is called elsewhere: llama.cpp has names of its own for T5."""
    if not any(_T5_LAYER.fullmatch(name) for name in names):
        return {name: name for name in names}
    return {name: _published_name(name, set(names)) for name in names}


def _published_name(name: str, names: set[str]) -> str:
    layer = _T5_LAYER.fullmatch(name)
    if layer is None or layer[2] not in _T5_NAMES:
        # The decoder of a whole T5, which no text encoder needs.
        return f"decoder.{name}" if name.startswith("dec.") or name == "output.weight" else _T5_OUTSIDE.get(name, name)
    gated = layer[2] == "ffn_up" and f"enc.blk.{layer[1]}.ffn_gate.weight" in names
    return f"encoder.block.{layer[1]}.{_T5_NAMES[layer[2]]}{'_1' if gated else ''}.weight"


# ---- The header


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    """What the writer said, and name, shape, type and offset of every tensor; the file stands behind its header."""
    if _bytes(file, 4) != GGUF_START:
        raise _broken(path, "it does not begin as one")
    version = _number(file, "I")
    if version not in (2, 3):
        known = "it has the byte order of another machine" if version % (1 << 16) == 0 else f"its version is {version}"
        raise _broken(path, f"versions 2 and 3 are known, and {known}")
    tensors, values = _number(file, "Q"), _number(file, "Q")
    said = {}
    for _ in range(values):
        key = _text(file)
        said[key] = _value(file, _number(file, "I"))
    places = []
    for _ in range(tensors):
        name, axes = _text(file), _number(file, "I")
        if axes > _MOST_AXES:
            raise _broken(path, f"{name!r} has {axes} axes")
        shape = tuple(_number(file, "Q") for _ in range(axes))[::-1]  # the file has the innermost axis first
        places.append((name, shape, _number(file, "I"), _number(file, "Q")))
    return said, places


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _number(file, _VALUES[kind])
    kind, count = _number(file, "I"), _number(file, "Q")
    if kind in (_TEXT, _LIST):
        return [_value(file, kind) for _ in range(count)]
    code = _VALUES[kind]
    return list(struct.unpack(f"<{count}{code}", _bytes(file, count * struct.calcsize(f"<{code}"))))


def _text(file: BinaryIO) -> str:
    return _bytes(file, _number(file, "Q")).decode()


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", _bytes(file, struct.calcsize(f"<{code}")))[0]


def _bytes(file: BinaryIO, count: int) -> bytes:
    """That many bytes, and never more than the file has: a broken length must not ask for all memory."""
    if count > _MOST_BYTES or len(got := file.read(count)) < count:
        raise EOFError
    return got


def _broken(path: Path, problem: str) -> FluxIRError:
    return FluxIRError(f"{path} is not a GGUF file that can be read: {problem}", hint="download it again")
