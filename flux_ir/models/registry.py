"""Every model this program knows, as data. A new checkpoint is one more `ModelSpec`: nothing else compares names.

Next: `checkpoints.locate`, which finds a spec's files, and `suite`, which loads them.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.architecture import AnyParams
from flux_ir.models.autoencoder import AutoEncoderParams
from flux_ir.models.flux1.transformer import FluxParams
from flux_ir.models.flux2.autoencoder import Flux2AutoEncoderParams
from flux_ir.models.flux2.transformer import Flux2Params
from flux_ir.sites import Site, all_sites, text_sites

ASSETS = Path(__file__).with_name("assets")
PARAMS_FILE = "params.json"
PROVENANCE_FILE = "provenance.json"

ScheduleShift = Literal["none", "linear", "empirical"]
"""none: the times are even. linear: they move as the picture grows (FLUX.1). empirical: as it grows, and the more the
fewer steps there are (FLUX.2)."""


@dataclass(frozen=True)
class ModelSpec:
    """One checkpoint: its shape, where its files come from, and how it is meant to be sampled."""

    name: str
    flux: AnyParams
    autoencoder: AutoEncoderParams
    repo_id: str | None
    """The hub's repository, which holds the single files and the diffusers layout; None: not on the hub."""
    transformer_file: str
    autoencoder_file: str
    transformer_env: tuple[str, ...]
    """Environment variables that may name the transformer's file or folder; the first one set counts.

    A variable of this model alone comes before one that every model reads.
    """
    autoencoder_env: tuple[str, ...]
    text_tokens: int
    """Length every prompt is padded to for T5."""
    t5_layers: int
    clip_layers: int
    clip_tokens: int
    """Length every prompt is padded to for CLIP."""
    default_steps: int
    schedule_shift: ScheduleShift
    """How the times of the Euler steps move towards noise: see `ScheduleShift`."""
    default_guidance: float
    default_side_px: int
    licence: str
    gated: bool
    """Whether the hub asks for a token and an accepted licence."""
    t5_repo_id: str | None = None
    """An open repository with the same T5, used if the hub's cache has it; likewise for CLIP."""
    clip_repo_id: str | None = None
    assets: Path | None = None
    """The folder in the package that holds every file of the model; None: not shipped."""
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Hex digest of each shipped file, by its path in `assets`."""
    reference_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height [px] that reference pictures are fitted to; empty: the model takes no reference picture."""
    lacks: str | None = None
    """What this program lacks to run the whole model, as the end of a sentence; None: nothing."""

    @property
    def takes_reference(self) -> bool:
        """Whether a reference picture can be given, whose tokens stand behind those of the image (Kontext)."""
        return bool(self.reference_sizes)

    @property
    def sites(self) -> list[Site]:
        """Every site: of the text encoders, then of the transformer, in depth order."""
        return [
            *text_sites(self.t5_layers, self.clip_layers),
            *all_sites(self.flux.depth, self.flux.depth_single_blocks, cond=self.takes_reference),
        ]

    def text_shape(self, site: Site) -> tuple[int, int]:
        """Tokens and width of a site of a text encoder, of one prompt."""
        if site.kind == "t5":
            return self.text_tokens, self.flux.context_in_dim
        return self.clip_tokens, self.flux.vec_in_dim


# The autoencoder is the same in every published FLUX.1 repository.
_AUTOENCODER = AutoEncoderParams(
    resolution=256,
    in_channels=3,
    ch=128,
    out_ch=3,
    ch_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    z_channels=16,
    scale_factor=0.3611,
    shift_factor=0.1159,
)

_DEV_FLUX = FluxParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=True,
)

_DEV = ModelSpec(
    name="flux-dev",
    flux=_DEV_FLUX,
    autoencoder=_AUTOENCODER,
    repo_id="black-forest-labs/FLUX.1-dev",
    transformer_file="flux1-dev.safetensors",
    autoencoder_file="ae.safetensors",
    transformer_env=("FLUX_DEV", "FLUX_MODEL"),
    autoencoder_env=("FLUX_AE", "AE"),
    text_tokens=512,
    t5_layers=24,
    clip_layers=12,
    clip_tokens=77,
    default_steps=50,
    schedule_shift="linear",
    default_guidance=2.5,
    default_side_px=256,
    licence="FLUX.1 [dev] Non-Commercial License",
    gated=True,
    t5_repo_id="google/t5-v1_1-xxl",
    clip_repo_id="openai/clip-vit-large-patch14",
)

_KREA = replace(
    _DEV,
    name="flux-dev-krea",
    repo_id="black-forest-labs/FLUX.1-Krea-dev",
    transformer_file="flux1-krea-dev.safetensors",
    transformer_env=("FLUX_KREA_DEV", "FLUX_KREA", "FLUX_MODEL"),
)

# Sizes of about one megapixel that Kontext was trained on, in steps of 16 px: from tall to wide.
_KONTEXT_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)

_KONTEXT = replace(
    _DEV,
    name="flux-dev-kontext",
    repo_id="black-forest-labs/FLUX.1-Kontext-dev",
    transformer_file="flux1-kontext-dev.safetensors",
    transformer_env=("FLUX_KONTEXT_DEV", "FLUX_KONTEXT", "FLUX_MODEL"),
    default_steps=30,
    default_side_px=1024,
    reference_sizes=_KONTEXT_SIZES,
)

_SCHNELL = replace(
    _DEV,
    name="flux-schnell",
    flux=replace(_DEV_FLUX, guidance_embed=False),
    repo_id="black-forest-labs/FLUX.1-schnell",
    transformer_file="flux1-schnell.safetensors",
    transformer_env=("FLUX_SCHNELL", "FLUX_MODEL"),
    text_tokens=256,
    default_steps=4,
    schedule_shift="none",
    licence="Apache-2.0",
)

_KLEIN_4B = ModelSpec(
    name="flux2-klein-4b",
    flux=Flux2Params(
        in_channels=128,
        context_in_dim=7680,
        hidden_size=3072,
        num_heads=24,
        depth=5,
        depth_single_blocks=20,
        guidance_embed=False,
    ),
    autoencoder=Flux2AutoEncoderParams(
        resolution=256,
        in_channels=3,
        ch=128,
        out_ch=3,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=32,
    ),
    repo_id="black-forest-labs/FLUX.2-klein-4B",
    transformer_file="flux-2-klein-4b.safetensors",
    autoencoder_file="vae/diffusion_pytorch_model.safetensors",  # the single file is in the gated repository of dev
    transformer_env=("KLEIN_4B_MODEL_PATH", "FLUX_MODEL"),
    autoencoder_env=("AE_MODEL_PATH",),
    text_tokens=512,
    t5_layers=0,
    clip_layers=0,
    clip_tokens=0,
    default_steps=4,
    schedule_shift="empirical",
    default_guidance=1.0,
    default_side_px=1024,
    licence="Apache-2.0",
    gated=False,
    lacks="its text encoder, Qwen3-4B, is not read",
)

_KLEIN_4B_BASE = replace(
    _KLEIN_4B,
    name="flux2-klein-4b-base",
    repo_id="black-forest-labs/FLUX.2-klein-base-4B",
    transformer_file="flux-2-klein-base-4b.safetensors",
    transformer_env=("KLEIN_4B_BASE_MODEL_PATH", "FLUX_MODEL"),
    default_steps=50,
    default_guidance=4.0,
    lacks="its text encoder, Qwen3-4B, is not read, and its guidance needs two forward passes a step",
)

_KLEIN_9B = replace(
    _KLEIN_4B,
    name="flux2-klein-9b",
    flux=Flux2Params(
        in_channels=128,
        context_in_dim=12288,
        hidden_size=4096,
        num_heads=32,
        depth=8,
        depth_single_blocks=24,
        guidance_embed=False,
    ),
    repo_id="black-forest-labs/FLUX.2-klein-9B",
    transformer_file="flux-2-klein-9b.safetensors",
    transformer_env=("KLEIN_9B_MODEL_PATH", "FLUX_MODEL"),
    licence="FLUX Non-Commercial License",
    gated=True,
    lacks="its text encoder, Qwen3-8B, is not read",
)

_KLEIN_9B_BASE = replace(
    _KLEIN_9B,
    name="flux2-klein-9b-base",
    repo_id="black-forest-labs/FLUX.2-klein-base-9B",
    transformer_file="flux-2-klein-base-9b.safetensors",
    transformer_env=("KLEIN_9B_BASE_MODEL_PATH", "FLUX_MODEL"),
    default_steps=50,
    default_guidance=4.0,
    lacks="its text encoder, Qwen3-8B, is not read, and its guidance needs two forward passes a step",
)

_DEV_2 = replace(
    _KLEIN_4B,
    name="flux2-dev",
    flux=Flux2Params(
        in_channels=128,
        context_in_dim=15360,
        hidden_size=6144,
        num_heads=48,
        depth=8,
        depth_single_blocks=48,
        guidance_embed=True,
    ),
    repo_id="black-forest-labs/FLUX.2-dev",
    transformer_file="flux2-dev.safetensors",
    autoencoder_file="ae.safetensors",
    transformer_env=("FLUX2_MODEL_PATH", "FLUX_MODEL"),
    default_steps=50,
    default_guidance=4.0,
    licence="FLUX Non-Commercial License",
    gated=True,
    lacks="its text encoder, Mistral Small 3.2, is not read",
)

_FLUX1 = (_SCHNELL, _DEV, _KREA, _KONTEXT)
_FLUX2 = (_KLEIN_4B, _KLEIN_4B_BASE, _KLEIN_9B, _KLEIN_9B_BASE, _DEV_2)
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in (*_FLUX1, *_FLUX2)}
"""The published models. The facts of those in the package stand beside their weights and are read on demand."""
PACKAGED_MODELS: dict[str, Path] = {"flux-tiny": ASSETS / "flux-tiny"}
"""Models that ship in the package, and their folders."""


def model_names() -> list[str]:
    """Every name `get_spec` takes, the default first."""
    return [*MODELS, *PACKAGED_MODELS]


def get_spec(name: str) -> ModelSpec:
    """The model of this name. Raises FluxIRError with the nearest name, or if a packaged model is not there."""
    if name in MODELS:
        return MODELS[name]
    if name in PACKAGED_MODELS:
        return packaged_spec(name, PACKAGED_MODELS[name])
    near = difflib.get_close_matches(str(name), model_names(), n=1, cutoff=0.0)
    raise FluxIRError(
        f"--model must be one of {', '.join(model_names())}: got {name!r}", hint=f"did you mean {near[0]}?"
    )


def packaged_spec(name: str, folder: Path) -> ModelSpec:
    """The model whose files all stand in `folder`: `params.json` says what it is, `provenance.json` has the digests."""
    if not (folder / PARAMS_FILE).is_file():
        raise FluxIRError(
            f"{name} ships in the package, but its weights are not there: no {folder / PARAMS_FILE}",
            hint="install the package again, or make them in a checkout: `python -m recipes.flux_tiny.train`",
        )
    t5 = read_json(folder / "t5" / "config.json", required=("num_layers",))
    clip = read_json(folder / "clip" / "config.json", required=("num_hidden_layers", "max_position_embeddings"))
    facts = read_json(folder / PARAMS_FILE, required=("flux", "autoencoder", "text_tokens", "default_steps"))
    provenance = read_json(folder / PROVENANCE_FILE, required=("files",))
    autoencoder = AutoEncoderParams(**facts["autoencoder"])
    return ModelSpec(
        name=name,
        flux=FluxParams(**facts["flux"]),
        autoencoder=autoencoder,
        repo_id=None,
        transformer_file="transformer.safetensors",
        autoencoder_file="ae.safetensors",
        transformer_env=(name.upper().replace("-", "_"), "FLUX_MODEL"),
        autoencoder_env=("FLUX_AE",),
        text_tokens=facts["text_tokens"],
        t5_layers=t5["num_layers"],
        clip_layers=clip["num_hidden_layers"],
        clip_tokens=clip["max_position_embeddings"],
        default_steps=facts["default_steps"],
        schedule_shift="linear" if facts.get("shifts_schedule") else "none",
        default_guidance=2.5,
        default_side_px=autoencoder.resolution,
        licence="Apache-2.0",
        gated=False,
        assets=folder,
        sha256=provenance["files"],
        reference_sizes=tuple((width, height) for width, height in facts.get("reference_sizes", ())),
    )
