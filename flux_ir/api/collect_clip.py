"""CLIP's activations of many pictures, and of their captions, in shards that are computed once."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from flux_ir.api.arguments import check_words
from flux_ir.api.progress import Note, Progress, Watch, phase, unwatched
from flux_ir.collecting.clip_images import ClipCollection, ClipProgress, ClipSettings, Networks
from flux_ir.collecting.image_sources import FolderImages, check_images, open_images
from flux_ir.collecting.shard_notes import files_digest
from flux_ir.collecting.storage import open_storage
from flux_ir.models.clip import TokenChoice, load_vision, locate_clip, read_preprocessing
from flux_ir.models.compute_dtype import DtypeWord, choose_dtype
from flux_ir.models.placement import plan
from flux_ir.models.text import load_clip


class CollectedImages(NamedTuple):
    """What a complete collection of CLIP's activations holds."""

    where: str
    images: int
    earlier: int
    """How many of them earlier calls had made."""
    cut_captions: int
    """How many captions, of pictures made now, were longer than CLIP reads and were cut."""


def collect_clip(
    images: str | Path,
    output_dir: str | Path,
    *,
    clip: str = "openai/clip-vit-large-patch14",
    tokens: TokenChoice = "cls",
    captions: str | Path | None = None,
    dtype: DtypeWord = "auto",
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    batch_size: int = 32,
    device: str | None = None,
    progress: Watch = unwatched,
) -> CollectedImages:
    """Collect CLIP's activations of pictures, the vision hidden_states[-2], and the pooled text of their captions.

    `images` is a folder of pictures, or of shards of (image, caption): parquet files or tars of webdataset, which are
    streamed. `captions` are those of a folder of pictures: a file, or a folder of text files. `clip` is a folder as
    transformers saves it or a repository of the hub; `tokens` says which of a picture's tokens are kept. The same call
    goes on where it was stopped.

    Raises FluxIRError for what a user can mend: a picture or a caption that cannot be read is named.
    """
    check_words(collect_clip, {"tokens": tokens, "dtype": dtype, "store_dtype": store_dtype})
    source = open_images(Path(images), None if captions is None else Path(captions))
    placement = plan(torch.cuda.device_count(), device=device)
    compute = choose_dtype(dtype, placement.devices)

    def announce(text: str) -> None:
        progress(Note(text))

    if isinstance(source, FolderImages):
        with phase(progress, "check"):
            check_images(source)
    folder = locate_clip(clip, announce=announce)
    with_captions = "with captions" if source.has_captions else "without captions"
    announce(f"pictures {len(source)}, {with_captions}, {clip} on {placement.clip} ({placement.reason}), {compute}")
    if compute.warning:
        announce(f"note: {compute.warning}")
    with phase(progress, "load"):
        text = load_clip(folder, folder, placement.clip, compute.dtype) if source.has_captions else None
        vision = load_vision(folder, placement.clip, compute.dtype)
        networks = Networks(vision, read_preprocessing(folder), text)
    weights = files_digest(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    settings = ClipSettings(clip, weights, tokens, compute.dtype, getattr(torch, store_dtype), batch_size)
    collection = ClipCollection(open_storage(str(output_dir)), settings, source, networks)
    progress(Progress("collect", 0, len(source)))
    now = ClipProgress(0, 0, 0)
    for now in collection.collect():
        progress(Progress("collect", now.images, len(source)))
    return CollectedImages(collection.storage.where, now.images, now.earlier, now.cut_captions)
