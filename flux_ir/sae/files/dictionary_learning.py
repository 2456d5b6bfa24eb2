"""dictionary_learning: `config.json` and `ae.pt`, a state dict per class. Reading never runs what a pickle names.

Its classes keep the decoder as [d_in, d_sae]; its JumpReLU does not take b_dec off the input, so that part goes into
the bias of the encoder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, write_json
from flux_ir.sae.architectures.config import HAS_K, Architecture, SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.foreign import (
    LFS_POINTER,
    agreed_k,
    check_finite_weights,
    check_pointer,
    check_tensors,
    field,
    filled,
    read_config,
    refuse,
    whole_number,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"
_Tensors = dict[str, Tensor]
_Shapes = Callable[[int, int], dict[str, tuple[int, ...]]]


class _Format(NamedTuple):
    """One of their classes: its name, what ours becomes in it, and back."""

    dict_class: str
    to_theirs: Callable[[SparseAutoencoder], _Tensors]
    to_ours: Callable[[Mapping[str, Tensor]], _Tensors]
    shapes: _Shapes


def save_dictionary_learning(sae: SparseAutoencoder, folder: Path) -> Path:
    """Write an autoencoder, its normalisation folded in, so that their `load_dictionary` reads it.

    `ae.pt` is torch's own file of tensors, which is what they read.
    """
    # Their BatchTopK has one threshold for all features; with several it is their JumpReLU.
    chosen = _FORMATS.get(
        "jumprelu" if sae.config.whitened and sae.config.architecture in HAS_K else sae.config.architecture
    )
    if chosen is None:
        raise refuse(sae, "dictionary_learning", tuple(_FORMATS))
    folded = sae.folded()
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in chosen.to_theirs(folded).items()}
    with (
        complete_file(folder / WEIGHTS_FILE) as beside,
        beside.open("wb") as file,
    ):  # so that a full disk raises OSError, which torch.save to a path does not
        torch.save(tensors, file)
    trainer = {
        "dict_class": chosen.dict_class,
        "activation_dim": sae.config.d_in,
        "dict_size": sae.config.d_sae,
        "k": sae.config.k,
        "submodule_name": sae.config.site,
        "lm_name": sae.config.model,
    }
    write_json(folder / CONFIG_FILE, {"trainer": trainer, "buffer": {}})
    return folder


def load_dictionary_learning(folder: Path) -> SparseAutoencoder:
    """Read a folder of theirs. Raises FluxIRError for classes that are not autoencoders of ours, and broken files."""
    path, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    trainer = field(read_config(path, program="dictionary_learning"), "trainer", path)
    dict_class = field(trainer, "dict_class", path)
    if dict_class not in _READERS:
        raise FluxIRError(
            f"{path} is of the class {dict_class!r}, which has no counterpart here",
            hint=f"known are {', '.join(_READERS)}",
        )
    architecture, to_ours, shapes = _READERS[dict_class]
    tensors = _read(weights_file)
    in_decoder = dict(
        zip(("activation_dim", "dict_size"), tensors.get("decoder.weight", torch.empty(0)).shape, strict=False)
    )
    d_in, d_sae = (whole_number({**in_decoder, **trainer}, name, path) for name in ("activation_dim", "dict_size"))
    optional = ("k", "threshold") if architecture == "topk" else ("k",)  # of their first versions
    groups = tensors.pop("group_sizes", torch.empty(0)) if architecture == "matryoshka" else torch.empty(0)
    check_tensors(weights_file, tensors, shapes(d_in, d_sae), optional=optional)
    check_finite_weights(weights_file, tensors)
    k = 1
    if "k" in shapes(d_in, d_sae):
        in_weights = int(tensors["k"]) if "k" in tensors else None
        k = agreed_k(path, {"k": trainer.get("k"), WEIGHTS_FILE: in_weights})
    config = SAEConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        prefixes=tuple(groups.long().cumsum(0).tolist()),
        site=trainer.get("submodule_name"),
        model=trainer.get("lm_name"),
    )
    return filled(config, to_ours({name: tensor.double() for name, tensor in tensors.items()}))


def _read(path: Path) -> _Tensors:
    try:
        with path.open("rb") as file:
            check_pointer(path, file.read(len(LFS_POINTER)))
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FluxIRError(f"cannot read {path}: {error.strerror}", hint="fetch the whole folder") from None
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        if not is_zipfile(path) and not isinstance(error, UnpicklingError):
            raise FluxIRError(f"{path} is cut short, or no file of torch.save", hint="fetch the file again") from error
        raise FluxIRError(
            f"{path} must hold tensors and nothing else: {str(error).splitlines()[0]}", hint="fetch the file again"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise FluxIRError(
            f"{path} must hold tensors and nothing else: it holds {type(tensors).__name__}",
            hint="store the state_dict() of the autoencoder, as dictionary_learning does",
        )
    return dict(tensors)


def _linear_to_theirs(sae: SparseAutoencoder) -> _Tensors:
    return {"encoder.weight": sae.encoder, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T.contiguous()}


def _linear_to_ours(theirs: Mapping[str, Tensor]) -> _Tensors:
    return {
        "W_enc": theirs["encoder.weight"].T,
        "b_enc": theirs["encoder.bias"],
        "W_dec": theirs["decoder.weight"].T,
    }


def _linear_shapes(d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    return {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae)}


def _unit_rows_to_ours(theirs: Mapping[str, Tensor]) -> _Tensors:
    """The tensors of an AutoEncoder, which they scale on loading so that rows of the decoder have length 1."""
    ours = _linear_to_ours(theirs) | {"b_dec": theirs["bias"]}
    lengths = ours["W_dec"].norm(dim=1)
    ours["W_dec"] = ours["W_dec"] / torch.where(lengths > 0, lengths, 1.0)[:, None]
    return ours | {"W_enc": ours["W_enc"] * lengths, "b_enc": ours["b_enc"] * lengths}


def _new_to_ours(theirs: Mapping[str, Tensor]) -> _Tensors:
    """The tensors of an AutoEncoderNew, which does not take b_dec off the input."""
    ours = _linear_to_ours(theirs) | {"b_dec": theirs["decoder.bias"]}
    return ours | {"b_enc": ours["b_enc"] + ours["b_dec"] @ ours["W_enc"]}


def _matryoshka_to_ours(theirs: Mapping[str, Tensor]) -> _Tensors:
    return {name: theirs[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


def _matryoshka_shapes(d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    return {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)} | _TOPK_ONLY


def _topk_to_theirs(sae: SparseAutoencoder) -> _Tensors:
    threshold = getattr(sae, "threshold", torch.tensor(-1.0))  # -1: they never measured one
    k = torch.tensor(sae.config.k, dtype=torch.int32)
    return _linear_to_theirs(sae) | {"b_dec": sae.b_dec, "k": k, "threshold": threshold}


def _gated_to_theirs(sae: Any) -> _Tensors:
    return {
        "encoder.weight": sae.encoder,
        "decoder.weight": sae.W_dec.T.contiguous(),
        "decoder_bias": sae.b_dec,
        "gate_bias": sae.b_enc,
        "mag_bias": sae.b_mag,
        "r_mag": sae.r_mag,
    }


def _gated_to_ours(theirs: Mapping[str, Tensor]) -> _Tensors:
    return {
        "W_enc": theirs["encoder.weight"].T,
        "W_dec": theirs["decoder.weight"].T,
        "b_dec": theirs["decoder_bias"],
        "b_enc": theirs["gate_bias"],
        "b_mag": theirs["mag_bias"],
        "r_mag": theirs["r_mag"],
    }


def _jumprelu_to_theirs(sae: Any) -> _Tensors:
    return {
        "W_enc": sae.W_enc.contiguous(),
        "b_enc": sae.b_enc - sae.encoder @ sae.b_dec,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold,
    }


def _jumprelu_to_ours(theirs: Mapping[str, Tensor]) -> _Tensors:
    bias = theirs["b_enc"] + theirs["b_dec"] @ theirs["W_enc"]
    return {name: theirs[name] for name in ("W_enc", "W_dec", "b_dec", "threshold")} | {"b_enc": bias}


_TOPK_ONLY = {"k": (), "threshold": ()}
_FORMATS: dict[Architecture, _Format] = {
    "topk": _Format(
        "AutoEncoderTopK",
        _topk_to_theirs,
        lambda theirs: _linear_to_ours(theirs) | {"b_dec": theirs["b_dec"]},
        lambda d_in, d_sae: _linear_shapes(d_in, d_sae) | {"b_dec": (d_in,)} | _TOPK_ONLY,
    ),
    "batch_topk": _Format(
        "BatchTopKSAE",
        _topk_to_theirs,
        lambda theirs: _linear_to_ours(theirs) | {name: theirs[name] for name in ("b_dec", "threshold")},
        lambda d_in, d_sae: _linear_shapes(d_in, d_sae) | {"b_dec": (d_in,)} | _TOPK_ONLY,
    ),
    "l1": _Format(
        "AutoEncoder",
        lambda sae: _linear_to_theirs(sae) | {"bias": sae.b_dec},
        _unit_rows_to_ours,
        lambda d_in, d_sae: _linear_shapes(d_in, d_sae) | {"bias": (d_in,)},
    ),
    "gated": _Format(
        "GatedAutoEncoder",
        _gated_to_theirs,
        _gated_to_ours,
        lambda d_in, d_sae: {
            "encoder.weight": (d_sae, d_in),
            "decoder.weight": (d_in, d_sae),
            "decoder_bias": (d_in,),
            "gate_bias": (d_sae,),
            "mag_bias": (d_sae,),
            "r_mag": (d_sae,),
        },
    ),
    "jumprelu": _Format(
        "JumpReluAutoEncoder",
        _jumprelu_to_theirs,
        _jumprelu_to_ours,
        lambda d_in, d_sae: {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_in),
            "b_dec": (d_in,),
            "threshold": (d_sae,),
        },
    ),
}
_FORMATS["matryoshka"] = _FORMATS["batch_topk"]  # what it is at inference; their own class wants group sizes too
_READERS: dict[str, tuple[Architecture, Callable[[Mapping[str, Tensor]], _Tensors], _Shapes]] = {
    chosen.dict_class: (name, chosen.to_ours, chosen.shapes)
    for name, chosen in _FORMATS.items()
    if name != "matryoshka"
}
_READERS["AutoEncoderNew"] = (
    "l1",
    _new_to_ours,
    lambda d_in, d_sae: _linear_shapes(d_in, d_sae) | {"decoder.bias": (d_in,)},
)
_READERS["MatryoshkaBatchTopKSAE"] = ("matryoshka", _matryoshka_to_ours, _matryoshka_shapes)
