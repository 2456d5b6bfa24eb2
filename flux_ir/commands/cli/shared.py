"""Flags that several commands have in common: each is declared here, once, and a command's options inherit it.

Defaults that belong to a model are None here and are asked of its `ModelSpec` when the command runs: the registry needs
torch, and `--help` does not wait for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, Options, option

PICTURE, KEEP, READ, MACHINE = "the picture", "what is recorded", "what is shown", "model and machine"
MEASURED, KNOWN = "what is measured", "what is known"
LARGEST_SEED = 2**63 - 1
WHERE, COMPARED = "Where and when", "What it is compared with"
_OF_THE_MODEL = "the model's own"


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """What is sampled, but for its prompt and its noise."""

    model: str = option(
        "flux-schnell", help="flux-schnell, flux-dev, flux-dev-krea, flux-dev-kontext or flux-tiny", group=PICTURE
    )
    width: int | None = option(
        None, help="width", unit="px", group=PICTURE, multiple_of=16, minimum=16, default_text=_OF_THE_MODEL
    )
    height: int | None = option(
        None, help="height", unit="px", group=PICTURE, multiple_of=16, minimum=16, default_text=_OF_THE_MODEL
    )
    num_steps: int | None = option(None, help="Euler steps", group=PICTURE, default_text=_OF_THE_MODEL)
    guidance: float | None = option(
        None,
        help="guidance strength, for the guidance-distilled dev family",
        group=PICTURE,
        default_text=_OF_THE_MODEL,
    )


@dataclass(frozen=True, kw_only=True)
class GivenPictureOptions(PictureOptions):
    """What is sampled, where it may begin with a picture or refer to one."""

    init_image: Path | None = option(
        None,
        help="a picture to begin with (image to image): the run has its size",
        group=PICTURE,
        default_text="noise alone",
        elsewhere=("image", "img", "init_img"),
    )
    reference_image: Path | None = option(
        None,
        help="a picture that flux-dev-kontext is told beside the prompt",
        group=PICTURE,
        default_text="none",
        elsewhere=("img_cond_path", "image_ref"),
    )
    keep_reference_size: bool = option(
        False, help="do not fit the reference picture to a size the model was trained on", group=PICTURE
    )


@dataclass(frozen=True, kw_only=True)
class BegunPictureOptions(GivenPictureOptions):
    """The same with how much of the schedule is run, where `strength` means nothing else."""

    strength: float | None = option(
        None,
        help="with --init_image: the share of the steps that is run, above 0 to 1; at 1 nothing of it is left",
        group=PICTURE,
        default_text="0.6",
    )


@dataclass(frozen=True, kw_only=True)
class OnePictureOptions(BegunPictureOptions):
    """One picture, from one noise."""

    seed: int | None = option(
        None,
        help="seed of the noise: the same seed gives the same picture",
        group=PICTURE,
        maximum=LARGEST_SEED,
        default_text="drawn at random and recorded",
    )


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Options):
    """A prompt, by itself."""

    prompt: str | None = option(
        None, help="what to draw", group=PICTURE, free_text=True, default_text='"a beautiful landscape"'
    )


@dataclass(frozen=True, kw_only=True)
class EmbeddedPromptOptions(PromptOptions):
    """A prompt, or what the text encoders made of one."""

    prompt_embeds: Path | None = option(
        None, help="the prompt's embeddings in its place", group=PICTURE, default_text="the prompt is encoded"
    )


@dataclass(frozen=True, kw_only=True)
class RegionOptions(Options):
    """A part of the picture."""

    region: tuple[int, ...] | None = option(
        None,
        help="a rectangle of the picture: left,top,right,bottom",
        unit="px",
        group=WHERE,
        default_text="all tokens",
    )
    mask: Path | None = option(
        None,
        help="a picture that is bright, or a .npy map that is high, in the region",
        group=WHERE,
        default_text="all tokens",
    )
    above: float = option(0.5, help="with --mask: where it is more than this", group=WHERE)


@dataclass(frozen=True, kw_only=True)
class NameOptions(Options):
    """What the folder of results is called."""

    name: str | None = option(None, help="name of the folder", group=MACHINE, default_text="follows from the settings")


@dataclass(frozen=True, kw_only=True)
class EditedRunsOptions(NameOptions):
    """Which runs are made with an edit, and where what is found goes."""

    steps: tuple[int, ...] | None = option(
        None, help="at which steps, counted from 0", group=WHERE, default_text="every step"
    )
    seed: int = option(0, help="seed of the first noise", group=COMPARED)


@dataclass(frozen=True, kw_only=True)
class EditOptions(Options):
    """What is changed while pictures are made."""

    edit: Path | None = option(
        None,
        help="a file of edits to make pictures with, such as the edit.json of flux-ir steer",
        group=PICTURE,
        default_text="nothing is changed",
    )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where it is computed."""

    device: str | None = option(
        None,
        help="cpu, cuda or cuda:N",
        group=MACHINE,
        default_text="a GPU, under torchrun one for each process; the CPU where there is none",
    )


@dataclass(frozen=True, kw_only=True)
class ActivationsOptions(Options):
    """What an autoencoder is used on."""

    captures: Path = option(REQUIRED, help="the activations: a collection, captures, or an array", group=MEASURED)


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(ActivationsOptions, DeviceOptions):
    """One autoencoder whose features are scored, and what the folder of what is found is called."""

    sae: Path = option(REQUIRED, help="the folder of an autoencoder, of whichever program", group=MEASURED)
    site: str | None = option(
        None,
        help="the site to score on, for an autoencoder that does not say one of these captures",
        group=MEASURED,
        default_text="the one it was trained on",
        elsewhere=("layer", "hook_point", "block"),
    )
    steps: tuple[int, ...] | None = option(
        None,
        help="the steps to score at, counted from 0",
        group=MEASURED,
        default_text="those the autoencoder was trained on",
        elsewhere=("timestep", "timesteps"),
    )
    name: str | None = option(
        None, help="the name of the folder below --output_dir", group=MACHINE, default_text="the autoencoder's"
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(AutoencoderOptions):
    """The same, for the folder of features."""

    pictures: Path | None = option(
        None,
        help="the folder of pictures that CLIP's activations were collected from, to show them",
        group=MEASURED,
        default_text="what flux-ir collect or capture kept",
    )
    output_dir: Path = option(Path("features"), help="where the folders of features are", group=MACHINE)


@dataclass(frozen=True, kw_only=True)
class TokensOptions(Options):
    """How much of labelled captures is read."""

    max_tokens: int = option(2**19, help="most tokens of each collection; whole prompts are drawn", group=KNOWN)


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(TokensOptions):
    """What is known about pictures, and how much of it is used."""

    labels: Path | None = option(
        None,
        help="labels of other pictures: .csv or .jsonl with a column id or prompt, or a folder of masks CONCEPT/ID.png",
        group=KNOWN,
        default_text="the captions of flux-tiny, and where the judge finds their objects",
    )
    least_positives: int = option(
        200, help="fewest positives, and negatives, to report on; half of them to pick with", group=KNOWN
    )
    bootstrap: int = option(200, help="draws of prompts for the intervals; 0: no intervals", group=KNOWN)


@dataclass(frozen=True, kw_only=True)
class FolderOptions(Options):
    """The features of one autoencoder."""

    features: Path = option(REQUIRED, help="the folder of features that flux-ir score-features left", group=MEASURED)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    """Where a model is run, and in which precision."""

    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        help="what the model computes in; auto: bfloat16 where the device has it, else (or if recorded so) float32",
        group=MACHINE,
    )


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(Options):
    """For machines with little memory."""

    offload: bool | Literal["parts", "blocks"] = option(
        False,
        help="parts: on the GPU while they are needed; blocks: weights come block by block; True: what fits best",
        group=MACHINE,
    )
    vram_gb: float | None = option(
        None,
        help="GPU memory to stay within where blocks are streamed",
        unit="GB",
        default_text="what is free",
        group=MACHINE,
    )
    memory_gb: float | None = option(
        None,
        help="host memory to stay within where blocks are streamed",
        unit="GB",
        default_text="as little as can be",
        group=MACHINE,
    )


@dataclass(frozen=True, kw_only=True)
class CompileOptions(Options):
    """Whether the transformer's blocks are compiled."""

    compile: bool = option(
        False,
        help="compile the transformer's blocks: a minute once, for long work; the bits are others",
        group=MACHINE,
    )


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """Which kernel computes attention."""

    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = option(
        "auto",
        help="PyTorch's kernel for the transformer's attention; auto: the one it chooses; bits depend on it",
        group=MACHINE,
        elsewhere=("attn_implementation", "sdpa_backend", "attention_backend"),
    )


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """How pictures are made."""

    batch_size: int = option(8, help="pictures that a GPU makes together", group=MACHINE)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Where the weights are."""

    checkpoint: Path | None = option(
        None,
        help="the transformer's weights: a .safetensors file or a diffusers folder",
        group=MACHINE,
        default_text="those the capture was made with, if there is one; else environment, package, hub",
    )
    ae_checkpoint: Path | None = option(
        None, help="the autoencoder's weights, likewise", group=MACHINE, default_text="likewise"
    )


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(Options):
    """What is merged into the weights."""

    lora: tuple[Path, ...] | None = option(
        None,
        help="LoRAs to merge into the weights, in this order",
        group=MACHINE,
        default_text="none, or that of the run",
        elsewhere=("loras", "lora_path", "lora_weights", "adapter"),
    )
    lora_strength: tuple[float, ...] | None = option(
        None,
        help="how strongly: one number for all LoRAs, or one for each",
        group=MACHINE,
        default_text="1",
        elsewhere=("lora_scale", "lora_weight"),
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Options):
    """How weights are kept."""

    quantize: Literal["nf4", "int8", "fp8"] | None = option(
        None,
        help="keep the transformer's blocks as codes of 4 or 8 bits, and widen each when it computes",
        group=MACHINE,
        default_text="as the run was made, else not at all",
        elsewhere=("quantization", "load_in_4bit", "load_in_8bit"),
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(
    ComputeOptions,
    CompileOptions,
    AttentionOptions,
    OffloadOptions,
    CheckpointOptions,
    LoRAOptions,
    QuantizeOptions,
):
    """How a model is loaded by one process: the fields of `api.model_settings.ModelSettings`."""

    multi_gpu: bool | Literal["blocks"] = option(
        False,
        help="True: each part of the model on one of the GPUs; blocks: the transformer's blocks on all of them",
        group=MACHINE,
    )


@dataclass(frozen=True, kw_only=True)
class RunsOptions(Options):
    """Where run folders are."""

    output_dir: Path = option(Path("output"), help="where the runs' folders are", group=MACHINE)


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunsOptions):
    """One run folder."""

    generation_id: str = option(
        REQUIRED, help="the run: the name of its folder below --output_dir, or latest", group=READ
    )


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Options):
    """How block outputs are read."""

    lens: Literal["euler", "x0", "both", "tuned", "jacobian", "jacobian_summed"] = option(
        "both",
        help="euler: the state the sampler would go to; x0: the clean image the block believes in; the others: x0, "
        "through --fitted_lens",
        group=READ,
    )
    fitted_lens: Path | None = option(
        None,
        help="what --lens tuned, jacobian and jacobian_summed read through: a folder of flux-ir train-lens",
        group=READ,
        default_text="none",
    )


@dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """Which steps of the sampler."""

    steps: tuple[int, ...] | None = option(
        None, help="which steps, counted from 0", group=KEEP, default_text="every step there is"
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """A question asked before the work."""

    plan: bool = option(
        False,
        help="only say what it would take: tokens and bytes, and which small run tells time and memory",
        group=MACHINE,
    )
