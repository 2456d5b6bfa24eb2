"""Opens stored activations: a collection, captures, or arrays. All give the same blocks of tokens.

What a source is, `blocks` says; how each kind is read, `shard_source`, `captures`, `arrays` and
`exported`.
"""

from pathlib import Path

from flux_ir.activations.arrays import ArraySource, open_safetensors
from flux_ir.activations.blocks import Generation, TokenBlock, TokenRun, TokenSource
from flux_ir.activations.captures import CaptureSource
from flux_ir.activations.collection import is_collection, open_collection, open_remote_collection
from flux_ir.activations.exported import ExportedSource, is_exported, npy_generations, safetensors_generation
from flux_ir.activations.remote import as_url
from flux_ir.activations.shard_source import CLIP_IMAGE, CLIP_TEXT, STATISTICS, is_layer
from flux_ir.activations.shards import FORMAT
from flux_ir.errors import FluxIRError
from flux_ir.layout import folders_with_captures, is_run_folder, newest_capture

__all__ = ["CLIP_IMAGE", "CLIP_TEXT", "Generation", "TokenBlock", "TokenRun", "TokenSource", "open_source"]

_KINDS = "a collection, a capture *.pt, a run's folder, a folder of these, or arrays *.npy or *.safetensors"


def open_source(path: Path | str) -> TokenSource:
    """The activations at a path: a collection's folder, finished or not; a capture or a folder of captures or of runs;
    what `flux-ir export` wrote; a plain array [tokens, d] or [images, tokens, d] (.npy, .safetensors) or a folder of
    these; or the URL of a collection, of which shards are fetched when they are read.

    Of what `flux-ir collect-clip` made, the pictures; `NAME/clip.text` names its captions. Where `flux-ir collect`
    kept layers of the text encoders, `NAME/t5.12` names one: like pictures under CLIP these have no step.

    Raises FluxIRError for a path that holds none of these or two kinds of them, a broken file, and files that do not
    belong together.
    """
    path, key = _split_key(path)
    if (url := as_url(path)) is not None:
        return open_remote_collection(url, key=key)
    where = Path(path)
    if not where.exists():
        raise FluxIRError(f"there is nothing at {where}", hint=f"name {_KINDS}")
    if where.is_dir() and is_collection(where):
        arrays = {*where.glob("*.safetensors")} - {where / STATISTICS}
        if strays := sorted([*where.glob("*.pt"), *where.glob("*.npy"), *arrays]):
            raise _two_kinds(f"{where} is a collection and holds {strays[0].name}")
        return open_collection(where, key=key)
    if where.is_dir():
        return _open_folder(where)
    if where.suffix == ".pt":
        return CaptureSource([where])
    if where.suffix in (".npy", ".safetensors"):
        return _open_arrays([where])
    raise FluxIRError(f"{where} is no file of activations that is known by its name", hint=f"name {_KINDS}")


def _split_key(path: Path | str) -> tuple[Path | str, str | None]:
    """`NAME/t5.12` as the collection NAME and the key `t5.12` of activations without a step; other paths, and None."""
    where, _, last = str(path).rpartition("/")
    if where and (last in (CLIP_IMAGE, CLIP_TEXT) or is_layer(last)) and not Path(path).exists():
        return where, last
    return path, None


def _open_folder(folder: Path) -> TokenSource:
    kinds = {
        "captures (*.pt)": sorted(folder.glob("*.pt")),
        "a run (intermediates/)": [folder] if is_run_folder(folder) else [],
        "runs (*/intermediates/)": folders_with_captures(folder),
        "arrays (*.safetensors)": sorted(folder.glob("*.safetensors")),
        "arrays (*.npy)": sorted(folder.glob("*.npy")),
        "exported arrays ({site}/step_{s}/*.npy)": sorted(folder.glob("*/step_*/*.npy")),
    }
    there = {kind: files for kind, files in kinds.items() if files}
    if len(there) > 1:
        counts = " and ".join(f"{len(files)} {kind}" for kind, files in there.items())
        raise _two_kinds(f"{folder} holds {counts}")
    if there:
        ((kind, files),) = there.items()
        if kind.startswith("captures"):
            return CaptureSource(files)
        if kind.startswith(("a run", "runs")):
            return CaptureSource([newest_capture(run) for run in files])
        if kind.startswith("arrays"):
            return _open_arrays(files)
        if exported := npy_generations(folder):
            return ExportedSource(exported)
    unfinished = len(list(folder.glob("*.partial")))
    holds = f"only {unfinished} unfinished files (*.partial)" if unfinished else "no activations"
    raise FluxIRError(f"{folder} holds {holds}", hint=f"name {_KINDS}")


def _open_arrays(files: list[Path]) -> TokenSource:
    if shards := [file for file in files if _is_shard(file)]:
        raise FluxIRError(
            f"a collection is opened as a whole: {shards[0]} is a shard of one",
            hint="name the folder that has collection.json",
        )
    exported = [file for file in files if is_exported(file)]
    if exported and len(exported) < len(files):
        plain = next(file for file in files if file not in exported)
        raise _two_kinds(f"{exported[0]} names sites and steps, {plain} does not")
    return ExportedSource([safetensors_generation(file) for file in exported]) if exported else ArraySource(files)


def _is_shard(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    with open_safetensors(file) as archive:
        return (archive.metadata() or {}).get("format") == FORMAT


def _two_kinds(what: str) -> FluxIRError:
    return FluxIRError(
        f"a folder of activations holds one kind of them: {what}", hint="put each kind into a folder of its own"
    )
