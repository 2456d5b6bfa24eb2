"""Stored activations as training data: a collection, a folder of captures or of exported files, or a plain array.

`open_source` finds out which it is. Next: `token_blocks`, what all of them give; `capture_source`, `exported_source`
and `array_source`, how they are read.
"""

from pathlib import Path

from flux_ir.activations.array_source import ArraySource
from flux_ir.activations.capture_rows import is_collection
from flux_ir.activations.capture_source import CaptureSource
from flux_ir.activations.exported_source import ExportedSource, is_exported, npy_generations, safetensors_generation
from flux_ir.activations.remote import as_url
from flux_ir.activations.remote_source import open_remote_collection
from flux_ir.activations.token_blocks import Generation, TokenBlock, TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.layout import newest_capture

__all__ = ["Generation", "TokenBlock", "TokenSource", "open_source"]

CLIP_SETTINGS_FILE = "clip.json"
"""In a folder with this file `flux-ir collect-clip` keeps its arrays: pictures and captions, in folders of shards."""
CLIP_IMAGES, CLIP_CAPTIONS = "images", "captions"

_KINDS = "a collection, a capture *.pt, a run's folder, a folder of these, or arrays *.npy or *.safetensors"


def open_source(path: Path | str) -> TokenSource:
    """The activations at a path: a collection's folder, finished or not; a capture or a folder of captures or of runs;
    what `flux-ir export` wrote; a plain array [tokens, d] or [images, tokens, d] (.npy, .safetensors) or a folder of
    these; what `flux-ir collect-clip` made (its pictures); or the URL of a collection, of which files are fetched when
    they are read.

    Raises FluxIRError for a path that holds none of these, a broken file, and files that do not belong together.
    """
    if (url := as_url(path)) is not None:
        return open_remote_collection(url)
    where = Path(path)
    if not where.exists():
        raise FluxIRError(f"there is nothing at {where}", hint=f"name {_KINDS}")
    if where.is_dir():
        return _open_folder(where)
    if where.suffix == ".pt":
        return CaptureSource.of_files([where])
    if where.suffix in (".npy", ".safetensors"):
        return _open_arrays([where])
    raise FluxIRError(f"{where} is no file of activations that is known by its name", hint=f"name {_KINDS}")


def _open_folder(folder: Path) -> TokenSource:
    if (folder / CLIP_SETTINGS_FILE).is_file():  # of CLIP: pictures, in shards
        return _open_arrays(sorted((folder / CLIP_IMAGES).glob("*.safetensors")))
    if is_collection(folder):
        return CaptureSource.of_collection(folder)
    if captures := sorted(folder.glob("*.pt")):
        return CaptureSource.of_files(captures)
    if (folder / "intermediates").is_dir():
        return CaptureSource.of_files([newest_capture(folder)])
    if runs := sorted({capture.parents[1] for capture in folder.glob("*/intermediates/capture_*.pt")}):
        return CaptureSource.of_files([newest_capture(run) for run in runs])
    if arrays := sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.npy")):
        return _open_arrays(arrays)
    if exported := npy_generations(folder):
        return ExportedSource(exported)
    unfinished = len(list(folder.glob("*.partial")))
    holds = f"only {unfinished} unfinished files (*.partial)" if unfinished else "no activations"
    raise FluxIRError(f"{folder} holds {holds}", hint=f"name {_KINDS}")


def _open_arrays(files: list[Path]) -> TokenSource:
    if is_exported(files[0]):
        return ExportedSource([safetensors_generation(file) for file in files])
    return ArraySource(files)
