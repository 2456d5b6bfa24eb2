"""What a file or a folder of weights is; and for a LoRA, how much it changes each block of its model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import read_json, write_json
from flux_ir.models.checkpoints.describe import Network, describe_file
from flux_ir.models.checkpoints.encoder_configs import config_of, linear_layers
from flux_ir.models.checkpoints.load import Weights
from flux_ir.models.checkpoints.locate import transformer_on_disk
from flux_ir.models.checkpoints.locate_text import encoder_on_disk
from flux_ir.models.checkpoints.lora.contents import blank_transformer
from flux_ir.models.checkpoints.lora.effect import Lengths, Shapes, lengths, matrices, relative_changes
from flux_ir.models.checkpoints.lora.names import PART_NAMES, Part
from flux_ir.models.checkpoints.lora.read import LoRA, lora_file, read_lora
from flux_ir.models.checkpoints.paths import first_file, weight_names
from flux_ir.models.registry import ModelSpec, get_spec
from flux_ir.models.text import open_encoder
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.formats import format_of, load_any, weights_file

_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
_IN_A_FOLDER = (*weight_names("diffusion_pytorch_model"), *weight_names("model"))


@dataclass(frozen=True)
class WeightFile:
    """One file of weights and the networks in it."""

    path: Path
    networks: tuple[Network, ...]


@dataclass(frozen=True)
class DescribedWeights:
    """What lies at a path."""

    path: Path
    files: tuple[WeightFile, ...]
    model: str | None = None
    """The model whose weights a LoRA was compared with; None: it was not."""
    changes: dict[str, float] | None = None
    """||dW|| / ||W|| (Frobenius) of all linear layers of each block, in depth order: those of the transformer, then of
    the text encoders that the LoRA changes (`t5.3`, `clip.7`)."""
    layers: dict[str, float] | None = None
    """The same of each weight that is changed."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        files = [
            {"path": str(file.path), "networks": [asdict(network) for network in file.networks]} for file in self.files
        ]
        compared = {"model": self.model, "changes": self.changes, "layers": self.layers}
        return {"path": str(self.path), "files": files, **(compared if self.changes is not None else {})}


def describe_weights(
    file: str | Path,
    *,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    output: str | Path | None = None,
    progress: Watch = unwatched,
) -> DescribedWeights:
    """What a file or a folder of weights is: which network of which model, how large, and how it is stored.

    A LoRA is compared with the weights of `model` (None: the first one that it fits), or those in `checkpoint`, if they
    are on this machine: nothing is fetched. `output` names a JSON file to write all of it to.

    Raises FluxIRError for a path that leads to no weights, and for a LoRA that does not fit `model`.
    """
    path = Path(file).expanduser()
    if not str(file) or not path.exists():
        raise FluxIRError(
            f"--file must name a file or a folder that exists: got {str(file)!r}", hint="correct the path"
        )
    described = DescribedWeights(path, tuple(_described(one) for one in weight_files(path)))
    adapters = [network for one in described.files for network in one.networks if "alpha / rank" in network.facts]
    if model is not None or adapters:
        described = _compared(described, adapters, model, checkpoint, progress)
    if output is not None:
        write_json(Path(output), described.to_json())
    return described


def weight_files(path: Path) -> list[Path]:
    """The files of weights that a path stands for. Raises FluxIRError if there are none."""
    if path.is_file():
        return [path]
    if _sae_in(path) is not None:
        return [weights_file(path)]
    inside = [path / name for name in _FOLDERS if (path / name).is_dir()]
    files = [file for folder in (path, *inside) if (file := first_file(folder, _IN_A_FOLDER))]
    singles = sorted(one for suffix in ("safetensors", "sft", "gguf") for one in path.glob(f"*.{suffix}"))
    listed = {shard for index in files if index.suffix == ".json" for shard in _shards(index)}
    files += [one for one in singles if one not in files and one not in listed]
    if not files:
        raise FluxIRError(f"{path} must hold weights: it has no .safetensors file", hint="name the file itself")
    return files


def _shards(index: Path) -> set[Path]:
    return {index.parent / str(name) for name in read_json(index).get("weight_map", {}).values()}


def _described(path: Path) -> WeightFile:
    sae = _sae_in(path.parent)
    if sae is None or weights_file(path.parent) != path:
        return WeightFile(path, tuple(describe_file(path)))
    tensors = list(sae.state_dict().values())
    network = Network(
        kind=f"a sparse autoencoder ({sae.config.architecture})",
        layout=format_of(path.parent),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
        nbytes=path.stat().st_size,
        dtypes={},
        facts={"features": sae.config.d_sae, "width": sae.config.d_in},
    )
    return WeightFile(path, (network,))


def _sae_in(folder: Path) -> SparseAutoencoder | None:
    """The sparse autoencoder in a folder; None: there is none."""
    try:
        name = format_of(folder)
    except FluxIRError:
        return None
    try:
        return load_any(folder)
    except FluxIRError:
        if name == "flow_matching":  # its files are called as those of transformers
            return None
        raise


def _compared(
    described: DescribedWeights,
    adapters: list[Network],
    model: str | None,
    checkpoint: str | Path | None,
    progress: Watch,
) -> DescribedWeights:
    """The same with the changes that a LoRA makes, where the weights of its model are."""
    if len(adapters) != 1:
        raise FluxIRError(
            f"--model is what a LoRA is compared with: {described.path} holds {counted(len(adapters), 'LoRA')}",
            hint="leave --model out" if not adapters else "name the file of one LoRA",
        )
    candidates = [model] if model is not None else list(adapters[0].models)
    for name in candidates:
        spec = get_spec(name)
        lora = read_lora(lora_file(described.path), spec)
        networks = {part: _weights_of(spec, part, checkpoint) for part in lora.parts}
        there = {part: network for part, network in networks.items() if network is not None}
        if not there:
            continue
        if missing := [PART_NAMES[part] for part in networks if part not in there]:
            progress(Note(f"note: not compared: the weights of {' and '.join(missing)} are not on this machine"))
        total = sum(len(network.shapes) for network in there.values())
        every = chain.from_iterable(lengths(lora, network.read_into, network.shapes) for network in there.values())
        return _with_changes(described, name, lora, list(follow(progress, "compare", every, total=total)))
    progress(Note(f"note: not compared: the weights of {', '.join(candidates)} are not on this machine"))
    return described


class _Readable(NamedTuple):
    """The linear layers of a network whose weights are on this machine."""

    read_into: Callable[[Tensor, str], None]
    shapes: Shapes


def _weights_of(spec: ModelSpec, part: Part, checkpoint: str | Path | None) -> _Readable | None:
    """None: they are not on this machine."""
    if part == "transformer":
        source, blank = transformer_on_disk(spec, checkpoint), blank_transformer(spec)
        return None if source is None else _Readable(Weights(blank, source).read_into, matrices(blank.state_dict()))
    encoder = encoder_on_disk(spec, part, checkpoint, tokenizer=False)
    if encoder is None:
        return None
    return _Readable(open_encoder(part, encoder).read_into, linear_layers(part, config_of(spec, part)))


def _with_changes(described: DescribedWeights, model: str, lora: LoRA, measured: list[Lengths]) -> DescribedWeights:
    layers = {one.weight: (one.changed / one.own) ** 0.5 if one.own else 0.0 for one in measured}
    return DescribedWeights(
        described.path,
        described.files,
        model,
        relative_changes(measured),
        {name: value for name, value in layers.items() if name in lora.layers},
    )
