"""Quantised weights that cannot be read, recognised by the names and types of their tensors, and refused by name."""

from collections.abc import Mapping

from flux_ir.models.checkpoints.headers import TensorEntry

READABLE = "bfloat16, float16, float32, float8, scaled float8, GGUF or bitsandbytes NF4"
# What only tensors of one program are called, by the last part of their names. The first that is there counts.
_LEAVES = {
    "wscales": "packed for the kernels of nunchaku (SVDQuant)",
    "g_idx": "in the format of GPTQ",
    "qzeros": "in the format of AWQ or GPTQ",
    "qweight": "packed for the kernels of one program, such as AWQ's or GPTQ's",
    "_weight_qdata": "in the format of torchao",
    "weight_packed": "in the format of compressed-tensors",
    "weight_scale_2": "NVFP4, whose scales lie in the order of a GPU's units",
    "W_q": "in the format of HQQ",
    "_shift": "quanto's of 4 or 2 bits",
}
_TYPES = {
    "F8_E8M0": "MXFP8, whose scales lie in the order of a GPU's units",
    "F4": "4-bit floats with scales per block (MXFP4 or NVFP4)",
}


class UnreadableError(Exception):
    """What is wrong with the weights of a file, as the end of a sentence that begins with the file's name."""


def refuse(entries: Mapping[str, TensorEntry]) -> None:
    """Raises UnreadableError for weights of a kind that is known and cannot be read."""
    leaves = {name.rpartition(".")[2]: name for name in entries}
    found = [(what, leaves[leaf]) for leaf, what in _LEAVES.items() if leaf in leaves]
    found += [(_TYPES[entry.dtype], name) for name, entry in entries.items() if entry.dtype in _TYPES]
    if found:
        what, name = found[0]
        raise UnreadableError(f"holds quantised weights that cannot be read: they are {what} (first {name})")
