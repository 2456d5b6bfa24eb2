"""Where a model's files are. First what the user names, then what is on disk, and only then the hub.

The order: arguments (`--checkpoint`, `--ae_checkpoint`), environment variables, the package, the hub's cache, the hub.
What lies in the file or the folder of the transformer that was named comes before the package and the hub. A path that
is named but missing is an error, never a download. What is found is checked (`inspect`) and announced; `load` loads it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints import hub
from flux_ir.models.checkpoints.formats.weights import widened
from flux_ir.models.checkpoints.hub import Announce
from flux_ir.models.checkpoints.inspect import Part, WeightSource, holds, inspect
from flux_ir.models.checkpoints.locate_text import EncoderSource, TextSource, download_encoder, encoder_on_disk
from flux_ir.models.checkpoints.lora.read import LoRA, Paths, Strengths, read_loras
from flux_ir.models.checkpoints.paths import (
    CACHE,
    COMPONENT_FOLDERS,
    HUB,
    PACKAGE,
    RECORDED,
    NamedPath,
    first_file,
    model_folder,
    named_path,
    repository,
    shards_present,
    verified,
    weight_names,
)
from flux_ir.models.checkpoints.variants import check_folder
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import ModelSpec

_DIFFUSERS_FILES = weight_names("diffusion_pytorch_model")
_SUFFIXES = ("*.safetensors", "*.sft", "*.gguf")


class ModelSource(NamedTuple):
    """Everything a model needs, found and checked."""

    transformer: WeightSource
    autoencoder: WeightSource | None
    """None: not asked for."""
    text: TextSource | None
    """None: not asked for."""
    loras: tuple[LoRA, ...] = ()
    """Merged into the transformer and the text encoders, in this order."""
    quantize: Method | None = None
    """How its blocks are quantised once that is done; None: they are not."""


def locate_model(
    spec: ModelSpec,
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    *,
    lora: Paths = None,
    lora_strength: Strengths = None,
    autoencoder: bool = True,
    text: bool = True,
    announce: Announce | None = None,
) -> ModelSource:
    """All parts of the model, without its autoencoder or its text encoders if these are not needed.

    `lora` is merged into the transformer and the text encoders, as far as it changes them: one path or several, with
    one strength for all or one for each (None: 1).
    Everything on disk is found and checked first, so a mistake shows before any download. `announce` is told of
    downloads, and at the end which file was taken for each part.
    """
    loras = read_loras(spec, lora, lora_strength, announce)
    transformer = transformer_on_disk(spec, checkpoint)
    ae = _autoencoder_on_disk(spec, ae_checkpoint, checkpoint) if autoencoder else None
    t5, clip = (encoder_on_disk(spec, name, checkpoint, announce) if text else None for name in ("t5", "clip"))
    source = ModelSource(
        # Small files first (arguments are computed in this order): they tell whether the hub gives access at all.
        autoencoder=(ae or _download(spec, "autoencoder", announce)) if autoencoder else None,
        text=TextSource(
            clip=clip or download_encoder(spec, "clip", announce), t5=t5 or download_encoder(spec, "t5", announce)
        )
        if text
        else None,
        transformer=transformer or _download(spec, "transformer", announce),
        loras=loras,
    )
    parts: dict[str, WeightSource | EncoderSource | None] = {
        "transformer": source.transformer,
        "autoencoder": source.autoencoder,
    }
    if source.text is not None:
        parts |= {"T5": source.text.t5, "CLIP": source.text.clip}
    _announce(announce, parts)
    return source


def _announce(announce: Announce | None, parts: Mapping[str, WeightSource | EncoderSource | None]) -> None:
    """Says which file was taken for each part, and what led to it. Parts of the package share one line."""
    if announce is None:
        return
    shipped = [name for name, part in parts.items() if part is not None and part.origin == PACKAGE]
    if shipped:
        announce(f"{', '.join(shipped)}: the package's own")
    for name, part in parts.items():
        if part is not None and part.origin != PACKAGE:
            announce(f"{name}: {part.path} (from {part.origin})")
            if kinds := part.stored_as:
                announce(f"{name}: {widened(kinds, len(part.entries))}")


def locate_transformer(
    spec: ModelSpec,
    checkpoint: str | Path | None = None,
    *,
    recorded: Path | None = None,
    announce: Announce | None = None,
) -> WeightSource:
    """The transformer's weights. `checkpoint` is a file, or a folder in the diffusers or the published layout.

    `recorded` is a path that was written down when a capture was made: it is taken where no `checkpoint` is given.
    """
    source = transformer_on_disk(spec, checkpoint, recorded) or _download(spec, "transformer", announce)
    _announce(announce, {"transformer": source})
    return source


def locate_autoencoder(
    spec: ModelSpec,
    ae_checkpoint: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    recorded: Path | None = None,
    announce: Announce | None = None,
) -> WeightSource:
    """The autoencoder's weights. Without `ae_checkpoint`, those that lie in the file or the folder of `checkpoint`.

    `recorded` as in `locate_transformer`.
    """
    source = _autoencoder_on_disk(spec, ae_checkpoint, checkpoint, recorded) or _download(spec, "autoencoder", announce)
    _announce(announce, {"autoencoder": source})
    return source


def transformer_on_disk(
    spec: ModelSpec, checkpoint: str | Path | None, recorded: Path | None = None
) -> WeightSource | None:
    """The same, but nothing is fetched; None: the weights are not on this machine."""
    named = _argument(checkpoint, "--checkpoint", recorded, spec.transformer_env)
    if named is not None:
        return inspect(spec, "transformer", _weight_file(spec, "transformer", named), named.origin)
    return _shipped(spec, "transformer") or _cached(spec, "transformer")


def _autoencoder_on_disk(
    spec: ModelSpec, ae_checkpoint: str | Path | None, checkpoint: str | Path | None, recorded: Path | None = None
) -> WeightSource | None:
    own = _argument(ae_checkpoint, "--ae_checkpoint", recorded, spec.autoencoder_env)
    if own is not None:
        return inspect(spec, "autoencoder", _weight_file(spec, "autoencoder", own), own.origin)
    named = named_path(checkpoint, "--checkpoint", spec.transformer_env)
    if named is not None:
        weights = _weight_file(spec, "transformer", named)
        inside = weights if holds("autoencoder", weights) else None
        if own_file := inside or _in_folder(spec, "autoencoder", model_folder(named.path)):
            return inspect(spec, "autoencoder", own_file, named.origin)
    return _shipped(spec, "autoencoder") or _cached(spec, "autoencoder")


def _argument(
    argument: str | Path | None, flag: str, recorded: Path | None, variables: tuple[str, ...]
) -> NamedPath | None:
    if argument is None and recorded is not None:
        return named_path(recorded, RECORDED, ())
    return named_path(argument, flag, variables)


def _weight_file(spec: ModelSpec, part: Part, named: NamedPath) -> Path:
    """The file (or index of shards) a path stands for: itself, or what lies in the folder."""
    if part == "transformer":
        check_folder(spec, named)
    if named.path.is_file():
        return named.path
    found = _in_folder(spec, part, named.path) or first_file(named.path, _DIFFUSERS_FILES)
    if found is not None:
        return found
    candidates = sorted(named.path.glob("*.safetensors.index*.json"))
    candidates = candidates or sorted(file for suffix in _SUFFIXES for file in named.path.glob(suffix))
    if len(candidates) > 1:
        candidates = [file for file in candidates if holds(part, file)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(file.name for file in candidates[:3])
    problem = f"{len(candidates)} files that it may be ({names})" if candidates else "no safetensors or GGUF file"
    single, diffusers = _possible_names(spec, part)[0], _possible_names(spec, part)[2]
    raise FluxIRError(
        f"{named.origin} must lead to the {part} of {spec.name}: the folder {named.path} has {problem}",
        hint=f"name the file itself, or a folder with {single} or {diffusers}",
    )


def _in_folder(spec: ModelSpec, part: Part, folder: Path) -> Path | None:
    """The weights of one part in a model's folder, in the published or the diffusers layout."""
    return first_file(folder, _possible_names(spec, part))


def _possible_names(spec: ModelSpec, part: Part) -> tuple[str, ...]:
    """The files of a model's folder or repository that may hold the weights of one part: the published one first."""
    name, folder = {
        "transformer": (spec.transformer_file, COMPONENT_FOLDERS[0]),
        "autoencoder": (spec.autoencoder_file, COMPONENT_FOLDERS[1]),
    }[part]
    single = (name, f"{Path(name).stem}.sft")
    diffusers = tuple(f"{folder}/{file}" for file in _DIFFUSERS_FILES)
    return (*single, *diffusers, *(f"{folder}/{file}" for file in single))  # ComfyUI keeps it as vae/ae.safetensors


def _shipped(spec: ModelSpec, part: Part) -> WeightSource | None:
    return inspect(spec, part, verified(spec, _possible_names(spec, part)[0]), PACKAGE) if spec.assets else None


def _cached(spec: ModelSpec, part: Part) -> WeightSource | None:
    """What the hub's cache has in full; a set of shards with gaps counts as absent."""
    if spec.repo_id is None:
        return None
    for name in _possible_names(spec, part):
        path = hub.cached(spec.repo_id, name)
        if path is not None and shards_present(path):
            return inspect(spec, part, path, CACHE)
    return None


def _download(spec: ModelSpec, part: Part, announce: Announce | None) -> WeightSource:
    return inspect(spec, part, hub.download(repository(spec), _possible_names(spec, part)[0], announce), HUB)
