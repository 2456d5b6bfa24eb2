"""A transformer whose blocks are kept as codes: made once from its weights, and kept in a file that is found again.

The file lies in the user's cache folder, below `quantised`; its name says the method and stands for the content of the
files that the codes were made of. It may be deleted at any time. What is not quantised is read from the weights' own
files.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux_ir.errors import FluxIRError, in_units
from flux_ir.files import complete_file
from flux_ir.models.checkpoints.headers import TensorEntry, read_header
from flux_ir.models.checkpoints.inspect import WeightSource, blank_network
from flux_ir.models.checkpoints.load import Weights, flux1_params
from flux_ir.models.checkpoints.lora.read import LoRA
from flux_ir.models.quantisation import (
    CODES_VERSION,
    Codes,
    Method,
    Shapes,
    Waits,
    quantise,
    quantised_weights,
    shapes_of_codes,
    widen,
)
from flux_ir.models.registry import ModelSpec
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.streaming import Fetch

CACHE_VARIABLE = "FLUX_IR_CACHE"
_LONG_TO_READ = 1 << 30  # bytes of a file whose reading is told
_SETTLED_NS = 2_000_000_000
_STORED = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}


def stream_quantised(
    spec: ModelSpec,
    source: WeightSource,
    method: Method,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    loras: Sequence[LoRA] = (),
    waits: Waits = "file",
    announce: Callable[[str], None] | None = None,
) -> StreamedFlux:
    """The transformer with its LoRAs merged and its blocks quantised, which are widened when they compute.

    `announce` is told where codes are made, which takes minutes for FLUX.1.

    Raises FluxIRError for weights that are not finite, and where no file can be written.
    """
    params = flux1_params(spec, "--quantize")
    weights = Weights(blank_network(spec, "transformer"), source, loras)
    told = announce or (lambda _: None)
    path = cache_folder() / "quantised" / f"{spec.name}-{method}-{_key(source, loras, method, told)}.safetensors"
    entries = _stored_codes(spec, source, method, weights.read_into, path, told)
    return StreamedFlux(params, Quantised(entries, method, weights.read_into, waits).fetch, device, dtype)


class Quantised:
    """The weights of a quantised transformer, by their names in it: codes are widened, all else is read as it is."""

    def __init__(
        self, entries: Mapping[str, Mapping[str, TensorEntry]], method: Method, plain: Fetch, waits: Waits
    ) -> None:
        self._entries, self._method, self._plain, self._waits = entries, method, plain, waits
        self._codes: dict[str, Codes] = {}
        self._kept: dict[str, Tensor] = {}

    def fetch(self, target: Tensor, name: str) -> None:
        """Fill `target` with a weight, in its dtype."""
        if name in self._entries:
            widen(self._codes_of(name, target.device), target, self._method)
        elif self._waits == "file" and target.ndim > 1:
            self._plain(target, name)  # a modulation: once for each picture
        else:
            target.copy_(self._kept_of(name, target), non_blocking=True)

    def _codes_of(self, name: str, device: torch.device) -> Codes:
        if name in self._codes:
            return self._codes[name]
        codes = {part: _mapped(entry) for part, entry in self._entries[name].items()}
        if self._waits == "file":
            return codes
        self._codes[name] = {part: self._at_home(values, device) for part, values in codes.items()}
        return self._codes[name]

    def _kept_of(self, name: str, target: Tensor) -> Tensor:
        if name not in self._kept:
            values = torch.empty(target.shape, dtype=target.dtype)
            self._plain(values, name)
            self._kept[name] = self._at_home(values, target.device)
        return self._kept[name]

    def _at_home(self, values: Tensor, device: torch.device) -> Tensor:
        match self._waits:
            case "file":
                return values
            case "pinned":
                return values.pin_memory()
            case "device":
                return values.to(device)


def cache_folder() -> Path:
    """Where this package keeps what it can make again: $FLUX_IR_CACHE, or `flux_ir` in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    # The XDG Base Directory Specification: a path that is not absolute is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "flux_ir"


def _key(source: WeightSource, loras: Sequence[LoRA], method: Method, announce: Callable[[str], None]) -> str:
    """16 hex digits that stand for the content of the weights' files, wherever they lie, the LoRAs, and the method."""
    files = {entry.file for entry in source.entries.values()}
    contents = sorted(_content(file, announce) for file in files)
    changes = [(lora.sha256, lora.strength) for lora in loras if lora.strength]
    return hashlib.sha256(repr((CODES_VERSION, method, contents, changes)).encode()).hexdigest()[:16]


def _content(file: Path, announce: Callable[[str], None]) -> str:
    """The sha256 of a whole file. What was found is remembered: 24 GB take half a minute or more.

    It holds as long as the system says that the file is the same and was not written to. The time of a change of a file
    (ctime) is the system's own: a program that gives a file its old time back changes that one.
    """
    stat, path = file.stat(), str(file.absolute())
    identity = [path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    named = hashlib.sha256(path.encode()).hexdigest()[:16]
    remembered = cache_folder() / "quantised" / "digests" / f"{named}.json"
    try:
        known = json.loads(remembered.read_bytes())
        if known["identity"] == identity:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # never read, or no longer readable
        pass
    if stat.st_size >= _LONG_TO_READ:
        announce(f"transformer: reading {file.name} once ({in_units(stat.st_size)}), to know it by its content")
    begun = time.time_ns()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    # A file that was written to just now may be again within one tick of the system's clock, and have the same times.
    if begun - stat.st_ctime_ns > _SETTLED_NS:
        try:
            with complete_file(remembered) as beside:
                beside.write_text(json.dumps({"identity": identity, "sha256": digest}))
        except FluxIRError as error:  # codes in a folder that others may only read are taken none the less
            announce(f"note: {error.message}: {file.name} is read again the next time")
    return digest


# ---- the file: a safetensors file with the parts of every weight, such as `single_blocks.0.linear1.weight.codes`


def _stored_codes(
    spec: ModelSpec,
    source: WeightSource,
    method: Method,
    read_into: Fetch,
    path: Path,
    announce: Callable[[str], None],
) -> dict[str, dict[str, TensorEntry]]:
    """Where the parts of every quantised weight are, in a file that is made if it is not there or broken."""
    sizes = quantised_weights(spec.flux)
    shapes = {name: shapes_of_codes(method, *size) for name, size in sizes.items()}
    if path.exists():
        try:
            return _entries_in(path, shapes)
        except FluxIRError as error:
            announce(f"note: the codes are made again: {error}")
    nbytes = sum(dtype.itemsize * prod(shape) for parts in shapes.values() for dtype, shape in parts.values())
    announce(f"transformer: quantising {len(shapes)} weights to {method}, once: {path} ({in_units(nbytes)})")
    about = {"made_by": "flux_ir", "method": method, "source": str(source.path.absolute())}
    # A name of its own: several processes may be at it. The last one wins, and all wrote the same bytes.
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with complete_file(own) as beside:
            _write(beside, sizes, shapes, read_into, method, about)
        own.replace(path)
    except FluxIRError as error:
        if error.message.startswith("cannot write"):
            error.hint = f"free some space, or name another folder with the variable {CACHE_VARIABLE}"
        raise
    return _entries_in(path, shapes)


def _write(
    path: Path,
    sizes: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, Shapes],
    read_into: Fetch,
    method: Method,
    about: dict[str, str],
) -> None:
    """One weight after the other is read, quantised and written to where the header says."""
    header: dict[str, object] = {"__metadata__": about}
    # float32 first: so that all begin where their type may begin in memory.
    named = [(f"{name}.{part}", *what) for name, parts in shapes.items() for part, what in parts.items()]
    begin, offsets = 0, {}
    for name, dtype, shape in sorted(named, key=lambda one: -one[1].itemsize):
        end = begin + dtype.itemsize * prod(shape)
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": [begin, end]}
        offsets[name], begin = begin, end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + begin)
        for name, size in sizes.items():
            weight = torch.empty(size, dtype=torch.float32)
            read_into(weight, name)
            if not weight.isfinite().all():
                raise FluxIRError(
                    f"{name} must be finite to be quantised: it has NaN or infinite values",
                    hint="leave --quantize out",
                )
            for part, values in quantise(weight, method).items():
                file.seek(8 + len(content) + offsets[f"{name}.{part}"])
                file.write(values.contiguous().view(torch.uint8).numpy().data)


def _entries_in(path: Path, shapes: Mapping[str, Shapes]) -> dict[str, dict[str, TensorEntry]]:
    """The parts of every weight in a file of codes. Raises FluxIRError for a file that does not hold just these."""
    stored = read_header(path)
    promised = {
        f"{name}.{part}": (_STORED[dtype], shape)
        for name, parts in shapes.items()
        for part, (dtype, shape) in parts.items()
    }
    if {name: (entry.dtype, entry.shape) for name, entry in stored.items()} != promised:
        raise FluxIRError(f"{path} does not hold the codes that its name stands for", hint="delete it")
    return {name: {part: stored[f"{name}.{part}"] for part in parts} for name, parts in shapes.items()}


def _mapped(entry: TensorEntry) -> Tensor:
    """A part as a view of the file, mapped for it alone: freeing it gives its pages back at once."""
    dtype = next(dtype for dtype, word in _STORED.items() if word == entry.dtype)
    try:
        content = np.memmap(entry.file, mode="c", offset=entry.offset, shape=(entry.nbytes,), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise FluxIRError(f"{entry.file} can no longer be read: {error}", hint="start again") from error
    return torch.from_numpy(content).view(dtype).view(entry.shape)
