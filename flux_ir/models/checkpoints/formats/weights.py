"""The tensors of a file, and its weights: each joined with what stands beside it, and how it becomes numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.formats.bitsandbytes import four_bit
from flux_ir.models.checkpoints.formats.gguf import read_gguf
from flux_ir.models.checkpoints.formats.refused import UnreadableError, refuse
from flux_ir.models.checkpoints.formats.scaled import beside_weights, check_all_scaled, named_formats, scaled
from flux_ir.models.checkpoints.headers import (
    PLAIN,
    TensorEntry,
    is_index,
    read_header,
    read_index,
    starts_as_gguf,
)

_QUANTO = "._data"


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor by name, of one safetensors or GGUF file or of all the shards of an index.

    Raises FluxIRError for a file that cannot be read, is cut short or of another kind, and for a missing shard.
    """
    try:
        if is_index(path):
            return read_index(path)
        return read_gguf(path) if starts_as_gguf(path) else read_header(path)
    except OSError as error:
        raise FluxIRError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def join_weights(entries: Mapping[str, TensorEntry], where: str, *, hint: str) -> dict[str, TensorEntry]:
    """The weights among the tensors of a file, each joined with the scales or tables that stand beside it.

    Raises FluxIRError for weights that cannot be read, by the name of their format, and for such as lack something.
    `where` names the file there.
    """
    try:
        return _weights(entries)
    except UnreadableError as error:
        raise FluxIRError(f"{where} {error}", hint=hint) from error


def refuse_unreadable(entries: Mapping[str, TensorEntry], where: str, *, hint: str) -> None:
    """Raises FluxIRError for a file of weights in a format that cannot be read, whatever network it holds."""
    try:
        refuse(entries)
    except UnreadableError as error:
        raise FluxIRError(f"{where} {error}", hint=hint) from error


def weight_names(names: Iterable[str]) -> set[str]:
    """What the weights of a file are called by all programs but quanto, which adds a word."""
    return {name.removesuffix(_QUANTO) for name in names}


def stored_as(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """How many weights are stored as what, for those that become wider when they are loaded; most first."""
    names = Counter(
        entry.encoding.name if entry.encoding else str(PLAIN[entry.dtype]).removeprefix("torch.")
        for entry in entries.values()
        if entry.encoding or entry.dtype.startswith("F8_")
    )
    return dict(names.most_common())


def widened(kinds: Mapping[str, int], weights: int) -> str:
    """`stored_as` as one sentence for people, of a network with so many weights."""
    told = ", ".join(f"{count} are {name}" for name, count in kinds.items())
    return f"{sum(kinds.values())} of {weights} weights are widened when loaded: {told}"


def _weights(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    refuse(entries)
    formats = named_formats(entries)
    joined: dict[str, TensorEntry] = {}
    taken = beside_weights(entries)
    for name in entries:
        if (found := four_bit(name, entries) or scaled(name, entries, formats)) is not None:
            joined[name] = found[0]
            taken |= found[1]
    own = {name: joined.get(name, entry) for name, entry in entries.items() if name in joined or name not in taken}
    coded = {name: entry.dtype for name, entry in own.items() if not entry.encoding and entry.dtype not in PLAIN}
    if coded:
        counts = " and ".join(f"{count} tensors of type {dtype}" for dtype, count in Counter(coded.values()).items())
        raise UnreadableError(
            f"holds quantised weights, and nothing says of what format: {counts}, first {next(iter(coded))}"
        )
    check_all_scaled(entries, own)
    return {name.removesuffix(_QUANTO): entry for name, entry in own.items()}
