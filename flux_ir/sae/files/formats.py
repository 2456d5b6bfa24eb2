"""Whose folder is this? Reads any autoencoder's folder, and writes one for another program.

The folders of sae-lens, which are ours too, and of dictionary_learning have files of their own (`folder`, `sae_lens`,
`dictionary_learning`). Here are the two programs that know TopK alone: sparsify, and earlier autoencoders for
flow-matching models.
"""

import filecmp
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, write_json
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files import dictionary_learning
from flux_ir.sae.files import folder as native
from flux_ir.sae.files.foreign import (
    check_finite_weights,
    check_settings,
    check_tensors,
    filled,
    read_config,
    read_tensors,
    refuse,
    whole_number,
)

ForeignFormat = Literal["sparsify", "dictionary_learning"]
ExportFormat = Literal["sae_lens", ForeignFormat]
Format = Literal["sae_lens", "sparsify", "dictionary_learning", "flow_matching"]

_SPARSIFY_CONFIG, _SPARSIFY_WEIGHTS = "cfg.json", "sae.safetensors"
_FLOW_MATCHING_CONFIG, _FLOW_MATCHING_WEIGHTS = "config.json", "model.safetensors"
_WEIGHTS: dict[Format, str] = {
    "sae_lens": native.WEIGHTS_FILE,
    "sparsify": _SPARSIFY_WEIGHTS,
    "dictionary_learning": dictionary_learning.WEIGHTS_FILE,
    "flow_matching": _FLOW_MATCHING_WEIGHTS,
}


def format_of(folder: Path) -> Format:
    """The format of an autoencoder's folder, by the name of its weights.

    Raises FluxIRError if there are none of a known name, or those of two autoencoders.
    """
    formats = _formats_in(folder)
    if len(formats) > 1:
        raise FluxIRError(
            f"{folder} must hold one autoencoder: it has {' and '.join(_WEIGHTS[name] for name in formats)}",
            hint="put each of them into a folder of its own, with its config",
        )
    if not formats:
        inside = [path.name for path in sorted(folder.iterdir())[:4]] if folder.is_dir() else "no such folder"
        raise FluxIRError(
            f"{folder} must hold an autoencoder, as one of {', '.join(_WEIGHTS.values())}: got {inside}",
            hint="name the folder that holds the weights, not the one above it",
        )
    return formats[0]


def weights_file(folder: Path | str) -> Path:
    """The file of a folder that holds the weights, whichever program saved it. Raises FluxIRError as `format_of`."""
    return Path(folder) / _WEIGHTS[format_of(Path(folder))]


def load_any(folder: Path | str) -> SparseAutoencoder:
    """The autoencoder of a folder, whichever program saved it: ours, sae-lens, sparsify and others.

    Raises FluxIRError for folders that are incomplete, broken, or of an unknown architecture.
    """
    return _READERS[format_of(Path(folder))](Path(folder))


def sae_folders(path: Path) -> list[Path]:
    """The folders of autoencoders at this path and below it, whichever programs saved them, in order of name."""
    weights = set(_WEIGHTS.values())
    return sorted({file.parent for file in path.rglob("*") if file.name in weights and file.is_file()})


def export(sae: SparseAutoencoder, name: ExportFormat, folder: Path) -> Path:
    """Write the autoencoder as a program reads it, into a folder where no other autoencoder is.

    A folder that holds exactly what would be written is left as it is. Raises FluxIRError for one that holds any other
    autoencoder, and for architectures the program does not have.
    """
    if not _taken(folder):
        return _WRITERS[name](sae, folder)
    with tempfile.TemporaryDirectory(prefix=".flux_ir_export_") as beside:
        # sparsify takes the name of the folder for the site
        written = _WRITERS[name](sae, Path(beside) / folder.name)
        if not _holds(folder, written):
            raise FluxIRError(
                f"{folder} holds an autoencoder already, and not what would be written there: "
                f"{', '.join(_taken(folder))}",
                hint="name a folder of its own with --output_dir, or delete that one",
            )
    return folder


def save_as(sae: SparseAutoencoder, name: ForeignFormat, folder: Path) -> Path:
    """Write the autoencoder as another program reads it, over what is there.

    Raises FluxIRError for architectures it does not have.
    """
    return _WRITERS[name](sae, folder)


def _formats_in(folder: Path) -> list[Format]:
    return [name for name, file in _WEIGHTS.items() if (folder / file).is_file()]


def _taken(folder: Path) -> list[str]:
    """The files of autoencoders in a folder: weights and configs."""
    names = {*_WEIGHTS.values(), native.CONFIG_FILE, dictionary_learning.CONFIG_FILE}
    return sorted(name for name in names if (folder / name).is_file())


def _holds(folder: Path, written: Path) -> bool:
    """Whether a folder has the written files, byte for byte, and no other autoencoder's."""
    return set(_taken(folder)) == set(_taken(written)) and all(
        (folder / file.name).is_file() and filecmp.cmp(file, folder / file.name, shallow=False)
        for file in written.iterdir()
    )


# ---- EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder named after the site
_SPARSIFY_FIXED = {"activation": "topk", "skip_connection": False, "transcode": False}
# `normalize_decoder` and `multi_topk` are about training: the weights compute the same with and without.
_SPARSIFY_KNOWN = {*_SPARSIFY_FIXED, "d_in", "k", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk"}


def save_sparsify(sae: SparseAutoencoder, folder: Path) -> Path:
    """Write a TopK autoencoder, its normalisation folded in. Raises FluxIRError for other architectures."""
    config = sae.config
    if config.architecture != "topk":
        raise refuse(sae, "sparsify", ("topk",))
    folded = sae.folded()
    tensors = {
        "encoder.weight": folded.encoder,
        "encoder.bias": folded.b_enc,
        "W_dec": folded.W_dec,
        "b_dec": folded.b_dec,
    }
    with complete_file(folder / _SPARSIFY_WEIGHTS) as beside:
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, beside)
    described = {
        "expansion_factor": math.ceil(config.d_sae / config.d_in),
        "normalize_decoder": True,
        "num_latents": config.d_sae,
        "k": config.k,
        **_SPARSIFY_FIXED,
        "multi_topk": False,
        "d_in": config.d_in,
    }
    write_json(folder / _SPARSIFY_CONFIG, described)
    return folder


def load_sparsify(folder: Path) -> SparseAutoencoder:
    """Read a sparsify folder. Its last part is taken for the site, as sparsify names them.

    Raises FluxIRError for transcoders, group maximum and skip connections, which are no TopK autoencoders.
    """
    path, weights_file = folder / _SPARSIFY_CONFIG, folder / _SPARSIFY_WEIGHTS
    stored = read_config(path, program="sparsify")
    d_in = whole_number(stored, "d_in", path)
    different = {name: stored[name] for name, value in _SPARSIFY_FIXED.items() if stored.get(name, value) != value}
    if different:
        raise FluxIRError(
            f"{path} must describe a plain TopK autoencoder: it has {different}", hint="use it with sparsify itself"
        )
    check_settings(path, stored, _SPARSIFY_KNOWN, program="sparsify")
    d_sae = stored.get("num_latents") or d_in * whole_number(stored, "expansion_factor", path)
    tensors = read_tensors(weights_file)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_tensors(weights_file, tensors, shapes)
    check_finite_weights(weights_file, tensors)
    k = whole_number(stored, "k", path)
    config = SAEConfig(architecture="topk", d_in=d_in, d_sae=d_sae, k=k, site=folder.name)
    weights = {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    return filled(config, weights | {name: tensors[name] for name in ("W_dec", "b_dec")})


# ---- Earlier autoencoders for flow-matching models, on the hub: `config.json` and `model.safetensors`
# There `features` is the width of the activations and `pages` the number of features. They are read and never written:
# more programs read our own folders.


def load_flow_matching(folder: Path) -> SparseAutoencoder:
    """Read such a folder; the rows of its decoder keep their lengths, which may be other than 1.

    Raises FluxIRError for other settings, and for tensors that do not fit or are not finite.
    """
    path = folder / _FLOW_MATCHING_CONFIG
    stored = read_config(path, program="such a program")
    d_in, d_sae, k = (whole_number(stored, name, path) for name in ("features", "pages", "k"))
    check_settings(path, stored, ("features", "pages", "k"), program="the program that made it")
    tensors = read_tensors(folder / _FLOW_MATCHING_WEIGHTS)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "bias": (d_in,),
    }
    check_tensors(folder / _FLOW_MATCHING_WEIGHTS, tensors, shapes)
    check_finite_weights(folder / _FLOW_MATCHING_WEIGHTS, tensors)
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["bias"],
    }
    return filled(SAEConfig(architecture="topk", d_in=d_in, d_sae=d_sae, k=k), weights)


_READERS: dict[Format, Callable[[Path], SparseAutoencoder]] = {
    "sae_lens": native.load_sae,
    "sparsify": load_sparsify,
    "dictionary_learning": dictionary_learning.load_dictionary_learning,
    "flow_matching": load_flow_matching,
}
_WRITERS: dict[ExportFormat, Callable[[SparseAutoencoder, Path], Path]] = {
    # other programs' decoders are kept as they are
    "sae_lens": lambda sae, folder: native.save_sae(sae, folder, unit_decoder=False),
    "sparsify": save_sparsify,
    "dictionary_learning": dictionary_learning.save_dictionary_learning,
}
