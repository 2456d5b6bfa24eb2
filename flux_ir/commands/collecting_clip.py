"""From a folder of pictures to shards of activations: the heavy half of the command `collect-clip`."""

from collections.abc import Iterator

import torch

from flux_ir.activations.tokens import CLIP_CAPTIONS, CLIP_IMAGES
from flux_ir.collecting.captions import read_captions
from flux_ir.collecting.clip_images import (
    INDEX_FILE,
    ClipCollection,
    Collected,
    Networks,
    check_images,
    collect_images,
    image_names,
)
from flux_ir.commands.collect_clip import CollectClipOptions
from flux_ir.commands.report import Report, counted, peak_memory
from flux_ir.models.clip import load_vision, locate_clip, read_preprocessing
from flux_ir.models.placement import plan
from flux_ir.models.text import load_clip


def collect_clip(options: CollectClipOptions) -> None:
    """Check everything that is cheap to check, load the networks, write the shards; print where they are."""
    report = Report()
    placement = plan(torch.cuda.device_count(), device=options.device)
    names = image_names(options.images)
    collection = ClipCollection(
        images=options.images,
        names=names,
        captions=None if options.captions is None else read_captions(options.captions, names),
        clip=options.clip,
        tokens=options.tokens,
        dtype=getattr(torch, options.dtype),
        batch_size=options.batch_size,
        output_dir=options.output_dir,
    )
    pictures = counted(len(names), "picture")
    with report.phase("check"):
        check_images(options.images, names)
    folder = locate_clip(options.clip, announce=report.note)
    report.note(
        f"{counted(len(names), 'picture')}, {options.clip} on {placement.t5} ({placement.reason}), {options.dtype}"
    )
    with report.phase("load"):
        text = None
        if collection.captions is not None:
            text = load_clip(folder, folder, placement.clip, collection.dtype)
        vision = load_vision(folder, placement.clip, collection.dtype)
        networks = Networks(vision, read_preprocessing(folder), text)
    done = follow(report, collection, networks)
    if done.earlier:
        report.note(f"there from earlier runs: {counted(done.earlier, 'picture')}")
    if done.cut_captions:
        report.note(f"cut to CLIP's length: {counted(done.cut_captions, 'caption')}")
    written = {
        kind: options.output_dir / kind for kind in (CLIP_IMAGES, *([CLIP_CAPTIONS] if text is not None else []))
    }
    report.table(pictures, written | {"index": options.output_dir / INDEX_FILE}, peak_memory())


def follow(report: Report, collection: ClipCollection, networks: Networks) -> Collected:
    """Collect with a progress bar that counts pictures."""
    done = Collected(0, 0, 0)
    for now in report.follow("collect", per_image(collect_images(collection, networks)), total=len(collection.names)):
        done = now
    return done


def per_image(batches: Iterator[Collected]) -> Iterator[Collected]:
    """The same, once for each picture."""
    images = 0
    for now in batches:
        for _ in range(now.images - images):
            yield now
        images = now.images
