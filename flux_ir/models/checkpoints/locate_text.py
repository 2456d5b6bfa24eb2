"""Where the text encoders are: folders that transformers reads, or single files of weights as ComfyUI keeps them.

They are looked for in the order of `locate`; variables name them, and no flag. A folder's configuration is checked
here, its weights when they are read (`pretrained`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints import hub
from flux_ir.models.checkpoints.encoder_configs import CONFIG_FILE, Encoder, config_of
from flux_ir.models.checkpoints.formats.weights import read_entries, stored_as, weight_names
from flux_ir.models.checkpoints.headers import TensorEntry, is_index, shards
from flux_ir.models.checkpoints.hub import Announce
from flux_ir.models.checkpoints.paths import (
    CACHE,
    HUB,
    PACKAGE,
    NamedPath,
    first_file,
    model_folder,
    named_path,
    repository,
    shards_present,
    verified,
)
from flux_ir.models.checkpoints.pretrained import WEIGHTS, read_config, weight_entries, weights_file
from flux_ir.models.registry import ModelSpec

ENCODER_ENV: dict[Encoder, tuple[str, ...]] = {"t5": ("FLUX_T5",), "clip": ("FLUX_CLIP",)}
"""Environment variables that may name a text encoder: a file of weights, or a folder."""

# Folders of (model, tokenizer) inside a model's folder: the diffusers layout, and that of packaged models.
_FOLDERS: dict[Encoder, tuple[tuple[str, str], ...]] = {
    "t5": (("text_encoder_2", "tokenizer_2"), ("t5", "t5")),
    "clip": (("text_encoder", "tokenizer"), ("clip", "clip")),
}
_WHAT = "the text encoder"
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "spiece.model", "vocab.json", "merges.txt")

# ---- Single files: weights without a configuration or a tokenizer

_FILES: dict[Encoder, tuple[str, ...]] = {
    "t5": ("t5xxl*.safetensors", "t5xxl*.sft", "t5*xxl*.gguf"),
    "clip": ("clip_l*.safetensors", "clip_l*.sft", "clip_l*.gguf"),
}
_FILE_FOLDERS = (".", "text_encoders", "clip")
_INSIDE: dict[Encoder, str] = {"t5": "text_encoders.t5xxl.transformer.", "clip": "text_encoders.clip_l.transformer."}
"""What stands before the names of a text encoder in a file that holds a whole model."""
_MARKS: dict[Encoder, tuple[str, ...]] = {
    "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    # transformers 5 leaves out the first level of the names.
    "clip": ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
}
"""Tensors of which every file has one."""


class EncoderSource(NamedTuple):
    """A text encoder on disk.

    `path`: the folder that transformers reads, or a file of weights whose `config` is known otherwise and in which
    `prefix` stands before the names of the encoder's tensors.
    """

    path: Path
    tokenizer_dir: Path
    origin: str
    config: Mapping[str, Any] | None = None
    prefix: str = ""

    def files(self) -> list[Path]:
        """The files that hold the weights."""
        weights = weights_file(self.path, _WHAT)
        return [file for file in shards(weights) if file.is_file()] if is_index(weights) else [weights]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The weights of the file by their names there, without prefix, unread. Pickles have no header: none."""
        weights = weights_file(self.path, _WHAT)
        return {} if ".bin" in weights.suffixes else weight_entries(weights, self.prefix, what=_WHAT)

    @property
    def stored_as(self) -> dict[str, int]:
        """How many weights are stored as what, for those that become wider when they are loaded."""
        return stored_as(self.entries)


class TextSource(NamedTuple):
    """Both text encoders."""

    t5: EncoderSource
    clip: EncoderSource


def locate_text(
    spec: ModelSpec, checkpoint: str | Path | None = None, *, announce: Announce | None = None
) -> TextSource:
    """Both text encoders. Those that lie in the folder of `checkpoint` come first."""
    t5, clip = (encoder_on_disk(spec, encoder, checkpoint, announce) for encoder in ("t5", "clip"))
    return TextSource(
        clip=clip or download_encoder(spec, "clip", announce), t5=t5 or download_encoder(spec, "t5", announce)
    )


def encoder_on_disk(
    spec: ModelSpec,
    encoder: Encoder,
    checkpoint: str | Path | None,
    announce: Announce | None = None,
    *,
    tokenizer: bool = True,
) -> EncoderSource | None:
    """The text encoder that a variable names, in or beside the transformer that the user named, in the package, or in
    the hub's cache.

    A single file takes its tokenizer from the same places, or from the hub; `announce` is told of that download. With
    `tokenizer` False its own folder stands for that of a tokenizer that is nowhere else, and nothing is fetched.
    """
    own = named_path(None, "", ENCODER_ENV[encoder])
    if own is not None:
        return _named_encoder(spec, encoder, own, announce, tokenizer=tokenizer)
    named = named_path(checkpoint, "--checkpoint", spec.transformer_env)
    if named is not None and (found := _beside(spec, encoder, named, announce, tokenizer=tokenizer)):
        return found
    return _shipped_encoder(spec, encoder) or _cached_encoder(spec, encoder)


def tokenizer_on_disk(spec: ModelSpec, encoder: Encoder) -> Path | None:
    """The folder of an encoder's tokenizer, in the places where `encoder_on_disk` looks; its weights need not be there.

    None: it is not on this machine.
    """
    named = named_path(None, "", ENCODER_ENV[encoder]) or named_path(None, "", spec.transformer_env)
    if named is None:
        return _tokenizer_beside(spec, encoder, None)
    if named.path.is_dir() and first_file(named.path, _TOKENIZERS):
        return named.path
    return _tokenizer_beside(spec, encoder, model_folder(named.path))


def _named_encoder(
    spec: ModelSpec, encoder: Encoder, named: NamedPath, announce: Announce | None, *, tokenizer: bool
) -> EncoderSource:
    if named.path.is_file():
        return _single_file(spec, encoder, named.path, named.origin, announce, tokenizer=tokenizer)
    if found := _encoder_in(named.path, encoder):
        return _complete(spec, encoder, EncoderSource(*found, named.origin))
    return _complete(spec, encoder, EncoderSource(named.path, named.path, named.origin))


def _beside(
    spec: ModelSpec, encoder: Encoder, named: NamedPath, announce: Announce | None, *, tokenizer: bool
) -> EncoderSource | None:
    """The text encoder in the file that was named, in a folder beside it, or as a file beside it."""
    if named.path.is_file() and _prefix(encoder, named.path):
        return _single_file(spec, encoder, named.path, named.origin, announce, tokenizer=tokenizer)
    folder = model_folder(named.path)
    if found := _encoder_in(folder, encoder):
        return _complete(spec, encoder, EncoderSource(*found, named.origin))
    files = [file for sub in _FILE_FOLDERS for pattern in _FILES[encoder] for file in (folder / sub).glob(pattern)]
    if files:  # the largest has lost least
        file = max(files, key=lambda file: (file.stat().st_size, file.name))
        return _single_file(spec, encoder, file, named.origin, announce, tokenizer=tokenizer)
    return None


def _single_file(
    spec: ModelSpec, encoder: Encoder, file: Path, origin: str, announce: Announce | None, *, tokenizer: bool
) -> EncoderSource:
    """The encoder in a file of weights. Raises FluxIRError if it holds none."""
    prefix = _prefix(encoder, file)
    if prefix is None:
        raise FluxIRError(
            f"{file} (from {origin}) must hold the {encoder.upper()} text encoder: it has no {_MARKS[encoder][0]}",
            hint="take the file as transformers or ComfyUI has it, such as t5xxl_fp16 or clip_l",
        )
    config = config_of(spec, encoder)
    beside = _tokenizer_beside(spec, encoder, model_folder(file))
    if beside is None:
        beside = _fetched_tokenizer(spec, encoder, announce) if tokenizer else file.parent
    source = EncoderSource(file, beside, origin, config, prefix)
    _check_width(spec, encoder, source, config)
    return source


def _prefix(encoder: Encoder, file: Path) -> str | None:
    """What stands before the names of the encoder's tensors in this file; None: it holds no such encoder."""
    names = weight_names(read_entries(file))
    prefixes = ("", _INSIDE[encoder])
    return next((prefix for prefix in prefixes for mark in _MARKS[encoder] if prefix + mark in names), None)


def _tokenizer_beside(spec: ModelSpec, encoder: Encoder, folder: Path | None) -> Path | None:
    """The folder of the tokenizer beside a single file, in the package, or in the hub's cache."""
    folders = [] if folder is None else [folder / tokenizer for _, tokenizer in _FOLDERS[encoder]]
    if spec.assets is not None:
        folders.append(spec.assets / encoder)
    open_repo_id = _open_repo_id(spec, encoder)
    for repo_id, below in ((spec.repo_id, f"{_FOLDERS[encoder][0][1]}/"), (open_repo_id, "")):
        cached = [hub.cached(repo_id, below + name) for name in _TOKENIZERS] if repo_id else []
        folders += [file.parent for file in cached if file]
    return next((folder for folder in folders if first_file(folder, _TOKENIZERS)), None)


def _fetched_tokenizer(spec: ModelSpec, encoder: Encoder, announce: Announce | None) -> Path:
    repo_id = _open_repo_id(spec, encoder)
    if repo_id is None:
        raise FluxIRError(
            f"a file of weights holds no tokenizer, and none for {encoder.upper()} lies beside it",
            hint=f"put the folder {_FOLDERS[encoder][0][1]} of a diffusers folder beside the file",
        )
    return hub.download_repository(repo_id, _TOKENIZER_FILES, announce)


def _open_repo_id(spec: ModelSpec, encoder: Encoder) -> str | None:
    return spec.t5_repo_id if encoder == "t5" else spec.clip_repo_id


# ---- Folders of transformers


def _encoder_in(folder: Path, encoder: Encoder) -> tuple[Path, Path] | None:
    for model, tokenizer in _FOLDERS[encoder]:
        if (folder / model / CONFIG_FILE).is_file():
            return folder / model, folder / tokenizer
    return None


def _shipped_encoder(spec: ModelSpec, encoder: Encoder) -> EncoderSource | None:
    if spec.assets is None:
        return None
    for relative in spec.sha256:
        if relative.startswith(f"{encoder}/"):
            verified(spec, relative)
    return _complete(spec, encoder, EncoderSource(spec.assets / encoder, spec.assets / encoder, PACKAGE))


def _cached_encoder(spec: ModelSpec, encoder: Encoder) -> EncoderSource | None:
    """The model's own copy if it is whole, else that of the open repository with the same weights."""
    model, tokenizer = _FOLDERS[encoder][0]
    candidates = []
    if spec.repo_id and (config := hub.cached(spec.repo_id, f"{model}/{CONFIG_FILE}")):
        candidates.append(EncoderSource(config.parent, config.parent.parent / tokenizer, CACHE))
    open_repo_id = _open_repo_id(spec, encoder)
    if open_repo_id and (config := hub.cached(open_repo_id, CONFIG_FILE)):
        candidates.append(EncoderSource(config.parent, config.parent, CACHE))
    whole = (source for source in candidates if not _lacking(source))
    return next((_complete(spec, encoder, source) for source in whole), None)


def download_encoder(spec: ModelSpec, encoder: Encoder, announce: Announce | None) -> EncoderSource:
    """The text encoder of the model's own repository, fetched from the hub."""
    model, tokenizer = _FOLDERS[encoder][0]
    folder = hub.download_folders(repository(spec), (model, tokenizer), announce)
    return _complete(spec, encoder, EncoderSource(folder / model, folder / tokenizer, HUB))


def _complete(spec: ModelSpec, encoder: Encoder, source: EncoderSource) -> EncoderSource:
    """The source. Raises FluxIRError if it is incomplete, quantised or another model's."""
    if lacking := _lacking(source):
        raise FluxIRError(
            f"the {encoder.upper()} text encoder from {source.origin} is incomplete: {lacking}",
            hint="fetch the whole folder again",
        )
    _check_width(spec, encoder, source, read_config(source.path, what=f"the {encoder.upper()} text encoder"))
    return source


def _check_width(spec: ModelSpec, encoder: Encoder, source: EncoderSource, config: Mapping[str, Any]) -> None:
    """Raises FluxIRError for an encoder whose vectors the transformer does not take."""
    config = config.get("text_config", config)  # CLIP with both its halves
    key, width = {"t5": ("d_model", spec.flux.context_in_dim), "clip": ("hidden_size", spec.flux.vec_in_dim)}[encoder]
    if config.get(key, width) != width:
        raise FluxIRError(
            f"{source.path} (from {source.origin}) is not the {encoder.upper()} of {spec.name}: its {key} is "
            f"{config[key]}, and the transformer takes {width}",
            hint=f"take the text encoder that {spec.name} was trained with",
        )


def _lacking(source: EncoderSource) -> str | None:
    """What a text encoder's folders lack, in words; None if they are complete."""
    if not (source.path / CONFIG_FILE).is_file():
        return f"no {CONFIG_FILE} in {source.path}"
    if not any(shards_present(source.path / name) for name in _present(source.path, WEIGHTS)):
        return f"no weights in {source.path} ({WEIGHTS[0]} or pytorch_model.bin, or all shards of one)"
    if not first_file(source.tokenizer_dir, _TOKENIZERS):
        return f"no tokenizer in {source.tokenizer_dir} ({', '.join(_TOKENIZERS)})"
    return None


def _present(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]
