"""Folders that sae-lens itself wrote, in any of its versions: what their settings do becomes part of the weights.

Ours lie in the same files (`sae.files`), with settings that do nothing. Here are the others: an older version's names,
a decoder that is not normalised, a bias that is not taken off the input. What cannot be folded into weights is refused
by name. Every setting that is switched on must be known, because an unknown one may change what the weights compute.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import Architecture, SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.foreign import (
    agreed_k,
    check_finite_weights,
    check_settings,
    check_tensors,
    filled,
    is_off,
    whole_number,
)

KEPT_METADATA = "sae_lens"
"""The key of `SparseAutoencoder.metadata` under which what sae-lens says of the training is kept when it is saved."""

_ARCHITECTURES: dict[str, Architecture] = {
    "topk": "topk",
    "standard": "l1",
    "jumprelu": "jumprelu",
    "gated": "gated",
    # as training leaves them; for use sae-lens turns them into jumprelu
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_MEANT_NAMES = (
    "architecture d_in d_sae k activation_fn activation_fn_kwargs apply_b_dec_to_input normalize_activations "
    "reshape_activations rescale_acts_by_decoder_norm finetuning_scaling_factor matryoshka_widths dtype device "
    "metadata"
)
# What it was trained on, and how, of all versions from 1 to 6: it does not change what the weights compute.
_ABOUT_NAMES = (
    "model_name model_class_name hook_name hook_eval hook_layer hook_point_layer hook_head_index hook_name_out "
    "hook_layer_out hook_head_index_out hf_hook_name hf_hook_name_out neuronpedia_id model_from_pretrained_kwargs "
    "model_kwargs prepend_bos exclude_special_tokens seqpos_slice context_size dataset_path dataset_trust_remote_code "
    "streaming is_dataset_tokenized is_dataset_on_disk use_chat_formatting sequence_separator_token "
    "disable_concat_sequences begin_batch_token begin_sequence_token use_cached_activations cached_activations_path "
    "from_pretrained_path n_batches_in_buffer n_batches_for_norm_estimate training_tokens total_training_tokens "
    "total_training_steps store_batch_size store_batch_size_prompts activations_mixing_fraction act_store_device "
    "llm_device llm_batch_size prefetch_llm_batches train_batch_size train_batch_size_tokens train_batch_size_samples "
    "seed autocast autocast_lm autocast_sae compile_llm llm_compilation_mode compile_sae sae_compilation_mode "
    "expansion_factor l1_coefficient lp_norm l1_warm_up_steps l1_warmup_steps l0_coefficient l0_warm_up_steps "
    "l0_lambda mse_loss_normalization use_ghost_grads noise_scale sparsity_loss_mode "
    "scale_sparsity_penalty_by_decoder_norm normalize_sae_decoder decoder_heuristic_init "
    "decoder_heuristic_init_norm decoder_orthogonal_init init_encoder_as_decoder_transpose decoder_init_norm "
    "b_dec_init_method init_dec_as_enc_transpose jumprelu_init_threshold jumprelu_bandwidth jumprelu_tanh_scale "
    "jumprelu_sparsity_loss_mode jumprelu_ste_to_input pre_act_loss_coefficient target_l0 aux_loss_coefficient "
    "use_sparse_activations topk_threshold_lr use_matryoshka_aux_loss adam_beta1 adam_beta2 lr lr_end "
    "lr_scheduler_name lr_warm_up_steps lr_decay_steps n_restart_cycles warm_up_steps "
    "dead_feature_window dead_feature_threshold dead_feature_estimation_method feature_sampling_window "
    "feature_sampling_method feature_reinit_scale resample_batches n_eval_batches eval_batch_size_prompts "
    "n_eval_seqs n_checkpoints checkpoint_path save_final_checkpoint output_path resume resume_from_checkpoint "
    "verbose logger log_to_wandb wandb_project wandb_id wandb_entity wandb_log_frequency run_name "
    "eval_every_n_wandb_logs log_activations_store_to_wandb log_optimizer_state_to_wandb log_weights_to_wandb "
    "tokens_per_buffer sae_lens_version sae_lens_training_version version tokenizer_name"
)
_MEANT, _ABOUT = frozenset(_MEANT_NAMES.split()), frozenset(_ABOUT_NAMES.split())
_SHAPES: dict[Architecture, dict[str, str]] = {
    "topk": {"b_enc": "f"},
    "l1": {"b_enc": "f"},
    "jumprelu": {"b_enc": "f", "threshold": "f"},
    "gated": {"b_gate": "f", "b_mag": "f", "r_mag": "f"},
    "batch_topk": {"b_enc": "f", "topk_threshold": ""},
    "matryoshka": {"b_enc": "f", "topk_threshold": ""},
}
_SCALING = ("scaling_factor", "finetuning_scaling_factor")
_NO_WEIGHTS_SAY_IT = "it depends on each token, so weights cannot say it: use the autoencoder with sae-lens"
_NORMALISATIONS = {
    "expected_average_only_in": "its factor is not in the folder: in sae-lens, call "
    "sae.fold_activation_norm_scaling_factor(factor), then sae.save_model(folder)",
    "covariance_whitening": "its matrices are not in the folder: in sae-lens, call sae.fold_activation_whitening(...), "
    "then sae.save_model(folder)",
    "layer_norm": _NO_WEIGHTS_SAY_IT,
    "constant_norm_rescale": _NO_WEIGHTS_SAY_IT,
}


class _Settings(NamedTuple):
    """What a config says of the function, by today's names."""

    architecture: Architecture
    fields: dict[str, Any]
    about: dict[str, Any]


def read_sae_lens(path: Path, stored: Mapping[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    """The autoencoder of a config at `path` and its tensors.

    `encode` gives what sae-lens's own gives. It takes vectors: heads that sae-lens flattens (hook_z) come flat here.

    Raises FluxIRError for unknown architectures and settings, and for tensors that do not fit.
    """
    settings = _settings(path, stored)
    fields, architecture = settings.fields, settings.architecture
    kept_k, scaling = tensors.pop("k", None), [tensors.pop(name) for name in _SCALING if name in tensors]
    k = 1
    if architecture in ("topk", "batch_topk", "matryoshka"):
        kwargs = fields.get("activation_fn_kwargs") or {}
        in_weights = None if kept_k is None else int(kept_k)
        k = agreed_k(path, {"k": fields.get("k"), "activation_fn_kwargs": kwargs.get("k"), "the weights": in_weights})
    if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
        raise FluxIRError(
            f"the weights beside {path} must have the matrix W_enc: they have {', '.join(tensors) or 'none'}",
            hint="copy config and weights from one folder",
        )
    d_in, d_sae = (
        whole_number({**dict(zip(("d_in", "d_sae"), tensors["W_enc"].shape, strict=True)), **fields}, name, path)
        for name in ("d_in", "d_sae")
    )
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {name: (d_sae,) if shape else () for name, shape in _SHAPES[architecture].items()}
    check_tensors(path, tensors, shapes)
    check_finite_weights(path, tensors)
    widths = fields.get("matryoshka_widths") or []
    config = SAEConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        prefixes=tuple(widths) if architecture == "matryoshka" else (),
        site=settings.about.get("hook_name"),
        model=settings.about.get("model_name"),
    )
    sae = filled(config, _folded(path, fields, {name: tensor.double() for name, tensor in tensors.items()}, scaling))
    if settings.about:
        sae.metadata = {KEPT_METADATA: settings.about}
    return sae


def _settings(path: Path, stored: Mapping[str, Any]) -> _Settings:
    fields = {_RENAMED.get(name, name): value for name, value in stored.items()}
    if "metadata" not in fields:  # before version 6
        fields.setdefault("architecture", "standard")
    if "architecture" not in fields:
        raise FluxIRError(
            f"{path} must be the config of a sparse autoencoder: it lacks architecture",
            hint="name a folder that flux-ir or sae-lens saved",
        )
    activation = fields.get("activation_fn") or "relu"
    if activation == "topk" and fields["architecture"] == "standard":
        fields["architecture"] = "topk"
    if fields["architecture"] not in _ARCHITECTURES:
        raise FluxIRError(
            f"{path} is of the architecture {fields['architecture']!r}, which is not known here",
            hint=f"known are {', '.join(_ARCHITECTURES)}",
        )
    architecture = _ARCHITECTURES[fields["architecture"]]
    check_settings(path, fields, _MEANT | _ABOUT, program="sae-lens")
    _check_function(path, fields, activation)
    about = {name: value for name, value in fields.items() if name in _ABOUT} | dict(fields.get("metadata") or {})
    return _Settings(architecture, fields, about)


def _check_function(path: Path, fields: Mapping[str, Any], activation: str) -> None:
    """Raises FluxIRError for settings with which the weights compute something that is not implemented here."""
    architecture = fields["architecture"]
    different: dict[str, Any] = {}
    hint = "use the autoencoder with sae-lens"
    if activation != "relu" and (architecture, activation) != ("topk", "topk"):
        different["activation_fn"] = activation
    extra = {name: value for name, value in (fields.get("activation_fn_kwargs") or {}).items() if name != "k"}
    if not is_off(extra):
        different["activation_fn_kwargs"] = extra
    normalisation = fields.get("normalize_activations")
    if normalisation is True:  # of version 2
        normalisation = "expected_average_only_in"
    if not is_off(normalisation):
        different["normalize_activations"] = normalisation
        hint = _NORMALISATIONS.get(str(normalisation), hint)
    if fields.get("reshape_activations", "none") not in ("none", "hook_z", None):
        different["reshape_activations"] = fields["reshape_activations"]
    if fields.get("rescale_acts_by_decoder_norm") and "topk" not in architecture:
        different["rescale_acts_by_decoder_norm"] = True
    if different:
        raise FluxIRError(f"{path} must describe weights that work on plain activations: it has {different}", hint=hint)


def _folded(
    path: Path, fields: Mapping[str, Any], tensors: dict[str, Tensor], scaling: list[Tensor]
) -> dict[str, Tensor]:
    """The weights of the same function without any setting, by our names; in float64."""
    weights = dict(tensors)
    if not fields.get("apply_b_dec_to_input", True):
        # x W + b = (x - b_dec) W + (b + b_dec W)
        shift = weights["b_dec"] @ weights["W_enc"]
        if "b_gate" in weights:
            weights["b_gate"] = weights["b_gate"] + shift
            weights["b_mag"] = weights["b_mag"] + shift * weights["r_mag"].exp()
        else:
            weights["b_enc"] = weights["b_enc"] + shift
    if fields.get("rescale_acts_by_decoder_norm"):
        # The k largest are chosen after multiplying by the rows' lengths, which are divided out again afterwards.
        lengths = weights["W_dec"].norm(dim=1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * lengths, weights["b_enc"] * lengths
        weights["W_dec"] = weights["W_dec"] / torch.where(lengths > 0, lengths, 1.0)[:, None]
    for factor in scaling:
        if torch.allclose(factor.double(), torch.ones((), dtype=torch.float64)):
            continue  # for some versions it was always there
        if not fields.get("finetuning_scaling_factor"):
            raise FluxIRError(
                f"the weights beside {path} have a scaling factor, which its config says they have not",
                hint="set finetuning_scaling_factor in the config to true, if it was fine-tuned",
            )
        weights["W_dec"] = weights["W_dec"] * factor.double()[:, None]  # of features, after they were encoded
    renamed = {"b_gate": "b_enc", "topk_threshold": "threshold"}
    return {renamed.get(name, name): tensor for name, tensor in weights.items()}
