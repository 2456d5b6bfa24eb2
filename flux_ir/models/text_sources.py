"""Where the text encoders are: folders that transformers reads. The order of sources is that of `sources`."""

from pathlib import Path
from typing import Literal, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models import hub
from flux_ir.models.headers import INDEX_SUFFIX
from flux_ir.models.hub import Announce
from flux_ir.models.paths import (
    CACHE,
    HUB,
    PACKAGE,
    first_file,
    model_folder,
    named_path,
    repository,
    shards_present,
    verified,
)
from flux_ir.models.registry import ModelSpec

Encoder = Literal["t5", "clip"]

# Folders of (model, tokenizer) inside a model's folder: the diffusers layout, and that of packaged models.
_FOLDERS: dict[Encoder, tuple[tuple[str, str], ...]] = {
    "t5": (("text_encoder_2", "tokenizer_2"), ("t5", "t5")),
    "clip": (("text_encoder", "tokenizer"), ("clip", "clip")),
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEXES = (f"model{INDEX_SUFFIX}", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")


class EncoderSource(NamedTuple):
    """A text encoder on disk, as transformers reads it."""

    model_dir: Path
    tokenizer_dir: Path
    origin: str


class TextSource(NamedTuple):
    """Both text encoders."""

    t5: EncoderSource
    clip: EncoderSource


def locate_text(
    spec: ModelSpec, checkpoint: str | Path | None = None, *, announce: Announce | None = None
) -> TextSource:
    """Both text encoders. Those that lie in the folder of `checkpoint` come first."""
    t5, clip = encoder_on_disk(spec, "t5", checkpoint), encoder_on_disk(spec, "clip", checkpoint)
    return TextSource(
        clip=clip or download_encoder(spec, "clip", announce), t5=t5 or download_encoder(spec, "t5", announce)
    )


def encoder_on_disk(spec: ModelSpec, encoder: Encoder, checkpoint: str | Path | None) -> EncoderSource | None:
    """The text encoder beside the transformer that the user named, in the package, or in the hub's cache."""
    named = named_path(checkpoint, "--checkpoint", spec.transformer_env)
    if named is not None and (found := _encoder_in(model_folder(named.path), encoder)):
        return _complete(EncoderSource(*found, named.origin), encoder)
    return _shipped_encoder(spec, encoder) or _cached_encoder(spec, encoder)


def _encoder_in(folder: Path, encoder: Encoder) -> tuple[Path, Path] | None:
    for model, tokenizer in _FOLDERS[encoder]:
        if (folder / model / "config.json").is_file():
            return folder / model, folder / tokenizer
    return None


def _shipped_encoder(spec: ModelSpec, encoder: Encoder) -> EncoderSource | None:
    if spec.assets is None:
        return None
    for relative in spec.sha256:
        if relative.startswith(f"{encoder}/"):
            verified(spec, relative)
    return _complete(EncoderSource(spec.assets / encoder, spec.assets / encoder, PACKAGE), encoder)


def _cached_encoder(spec: ModelSpec, encoder: Encoder) -> EncoderSource | None:
    """The model's own copy if it is whole, else that of the open repository with the same weights."""
    model, tokenizer = _FOLDERS[encoder][0]
    if spec.repo_id and (config := hub.cached(spec.repo_id, f"{model}/config.json")):
        own = EncoderSource(config.parent, config.parent.parent / tokenizer, CACHE)
        if not _lacking(own):
            return own
    open_repo_id = spec.t5_repo_id if encoder == "t5" else spec.clip_repo_id
    if open_repo_id and (config := hub.cached(open_repo_id, "config.json")):
        same = EncoderSource(config.parent, config.parent, CACHE)
        if not _lacking(same):
            return same
    return None


def download_encoder(spec: ModelSpec, encoder: Encoder, announce: Announce | None) -> EncoderSource:
    """The text encoder of the model's own repository, fetched from the hub."""
    model, tokenizer = _FOLDERS[encoder][0]
    folder = hub.download_folders(repository(spec), (model, tokenizer), announce)
    return _complete(EncoderSource(folder / model, folder / tokenizer, HUB), encoder)


def _complete(source: EncoderSource, encoder: Encoder) -> EncoderSource:
    if lacking := _lacking(source):
        raise FluxIRError(
            f"the {encoder.upper()} text encoder from {source.origin} is incomplete: {lacking}",
            hint="fetch the whole folder again",
        )
    return source


def _lacking(source: EncoderSource) -> str | None:
    """What a text encoder's folders lack, in words; None if they are complete."""
    if not (source.model_dir / "config.json").is_file():
        return f"no config.json in {source.model_dir}"
    index = first_file(source.model_dir, _INDEXES)
    if not first_file(source.model_dir, _WEIGHTS) and not (index and shards_present(index)):
        return f"no weights in {source.model_dir} ({' or '.join(_WEIGHTS)}, or all shards of one)"
    if not first_file(source.tokenizer_dir, _TOKENIZERS):
        return f"no tokenizer in {source.tokenizer_dir} ({', '.join(_TOKENIZERS)})"
    return None
