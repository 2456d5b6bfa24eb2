"""A model in hand: load it, encode prompts, walk from noise to a picture step by step, decode.

    model = load_model("flux-tiny")
    text = encode_prompt(model, "a red circle")
    *_, last = sample(model, text, seed=7)
    pixels = decode(model, last.after)

`capture` does all of this in one call; here every part can be looked at and changed on the way (`Recorder`,
`Intervention`).
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flux_ir.api.arguments import check_words
from flux_ir.api.model_settings import BegunPictureSettings, ModelSettings, PictureSettings, SettledPicture
from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.models import text as text_models
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import ModelSpec, get_spec
from flux_ir.models.suite import ModelPart, Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling import generate
from flux_ir.sampling.denoise import Step
from flux_ir.sampling.generate import Inputs, check_size, noise_for, prepare
from flux_ir.sampling.pictures import PictureGiven, read_given
from flux_ir.shapes import PackedLatent, Pixels

# Names of the two tensors in a file of embeddings: ours are diffusers', and those of the reference code are read too.
TXT_KEYS = ("prompt_embeds", "txt")
POOLED_KEYS = ("pooled_prompt_embeds", "vec", "y")


def load_model(
    name: str,
    *,
    parts: Collection[ModelPart] = get_args(ModelPart),
    device: str | None = None,
    multi_gpu: MultiGpuWord = False,
    offload: OffloadWord = False,
    compile: bool = False,
    attention: AttentionWord = "auto",
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    quantize: Method | None = None,
    progress: Watch = unwatched,
) -> Suite:
    """A whole model: text encoders, transformer and autoencoder.

    `parts` are loaded now, the others when they are first needed. `device` None is the first GPU, or the CPU; `dtype`
    auto is bfloat16 where the device has it, else float32. `Recorder`, `Intervention` and `spliced` take the model as
    it is; `model.flux` is its transformer. `lora`, one file or several, is merged into it and the text encoders with
    `lora_strength`, one number or one for each (None: 1). `quantize` keeps the blocks of the transformer as codes of 4
    or 8 bits, made once and cached, and widens each when it computes.

    Raises FluxIRError for an unknown name, and for weights that are missing or do not fit.
    """
    check_words(load_model, {"parts": parts, "dtype": dtype})
    settings = ModelSettings(
        model=get_spec(name).name,
        device=device,
        multi_gpu=multi_gpu,
        offload=offload,
        compile=compile,
        attention=attention,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        quantize=quantize,
    )
    machine = settings.settle_machine()
    suite = settings.suite(machine, progress)
    for note in (f"{suite.spec.name} on {machine}", *machine.notes()):
        progress(Note(note))
    for part in follow(progress, "load", dict.fromkeys(parts), total=len(set(parts))):
        suite.load_part(part)
    return suite


@torch.no_grad()
def encode_prompt(model: Suite, prompt: str | Sequence[str], *, save_to: str | Path | None = None) -> TextEmbedding:
    """What the transformer is told of a prompt, or of several: `txt` from T5, [prompts, tokens, d], and `y` from CLIP.

    `save_to` names a .safetensors file to write as well: of one prompt, it is what `capture` takes as `prompt_embeds`.

    Raises FluxIRError for a model that is only named.
    """
    check_loaded(model)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    with model.text_encoders() as encoders:
        embedding = text_models.encode(encoders.t5, encoders.clip, prompts)
    if save_to is not None:
        save_prompt_embeds(embedding, save_to, prompt=prompts[0] if len(prompts) == 1 else None)
    return embedding


def sample(
    model: Suite,
    text: TextEmbedding | str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    init_image: PictureGiven | None = None,
    strength: float | None = None,
    reference_image: PictureGiven | None = None,
    keep_reference_size: bool = False,
) -> Iterator[Step]:
    """The Euler steps from noise to picture, one model call each: `step.before`, `step.velocity`, `step.after`.

    The last step's `after` is the finished latent, which `decode` makes a picture of. Several prompts are sampled
    together, each from its own noise: `seed` is one number, from which they count up, or one for each. Sizes are in px;
    None is the model's own size, number of steps or guidance. Latents are packed: [batch, tokens, 4 x channels].

    With `init_image` only the last `strength` of the steps are run, and keep their numbers: pass the first of them to
    `Recorder` and `Intervention` as `first_step`, which counts from 0 else. The four last arguments are those of
    `capture`.

    Raises FluxIRError for a model that is only named, and for sizes that are no multiple of 16.
    """
    check_loaded(model)
    settings = BegunPictureSettings(
        model=model,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        init_image=init_image,
        strength=strength,
        reference_image=reference_image,
        keep_reference_size=keep_reference_size,
    )
    picture = settings.settle_picture()
    embedding = text if isinstance(text, TextEmbedding) else encode_prompt(model, text)
    prompts = embedding.txt.shape[0]
    seeds = list(range(seed, seed + prompts)) if isinstance(seed, int) else list(seed)
    width, height = picture.grid
    noise = noise_for(seeds, height, width, model.placement.transformer, model.dtype)
    inputs = prepare(noise, embedding, height, width)
    if picture.given.given():
        with model.autoencoder() as autoencoder:
            inputs = picture.given.encoded(autoencoder, picture.timesteps).put_into(inputs)
    return _steps(model, inputs, picture)


def _steps(model: Suite, inputs: Inputs, picture: SettledPicture) -> Iterator[Step]:
    # A generator of its own, so that `sample` raises when it is called and not when its first step is asked for.
    with model.transformer() as flux:
        yield from generate.sample(flux, inputs, picture.timesteps, picture.guidance, first_step=picture.first_step)


def encode(model: Suite, picture: PictureGiven | Sequence[PictureGiven]) -> PackedLatent:
    """Pictures as packed latents, [batch, tokens, 4 x channels]: the twin of `decode`.

    A picture is a file, a picture of Pillow, or pixels as `decode` gives them: uint8 [batch, height, width, 3]. The
    latent is the mean one, so that a picture always has the same. It can be compared with the steps of `sample`.

    Raises FluxIRError for a model that is only named, and for pictures whose sides are no multiples of 16 or differ.
    """
    check_loaded(model)
    given: Sequence[PictureGiven] = [picture] if isinstance(picture, PictureGiven) else picture
    if isinstance(picture, Tensor) and picture.ndim == 4:
        given = [picture[row : row + 1] for row in range(len(picture))]
    pictures = [read_given(one, "picture") for one in given]
    if len(sizes := {(one.width, one.height) for one in pictures}) != 1:
        raise FluxIRError(
            f"pictures that are encoded together have one size: got {len(sizes)}", hint="encode them one by one"
        )
    check_size(pictures[0].height, pictures[0].width)
    with model.autoencoder() as autoencoder:
        return generate.encode(autoencoder, torch.cat([one.pixels for one in pictures]))


def decode(model: Suite, latent: PackedLatent, *, width: int | None = None, height: int | None = None) -> Pixels:
    """Latents as pictures: uint8 [batch, height, width, 3] on the CPU. Sizes in px; None is the model's own.

    Raises FluxIRError for a latent that is not of this size.
    """
    check_loaded(model)
    check_latent(latent)
    grid = PictureSettings(model=model, width=width, height=height).settle_picture().grid
    if latent.shape[1] != grid.tokens:
        raise FluxIRError(
            f"a picture of {grid.width} x {grid.height} px has {grid.tokens} image tokens: got a latent of "
            f"{latent.shape[1]}",
            hint="pass the width and height it was sampled with",
        )
    with model.autoencoder() as autoencoder:
        return generate.decode(autoencoder, latent, grid.height, grid.width, model.dtype)


def check_loaded(model: object) -> None:
    """Raises FluxIRError for anything but a loaded model."""
    if not isinstance(model, Suite):
        raise FluxIRError(
            f"the model must be loaded: got {model!r}", hint='model = flux_ir.load_model("flux-tiny") loads one'
        )


def check_latent(latent: object) -> None:
    """Raises FluxIRError for anything but a packed latent."""
    if not isinstance(latent, Tensor) or latent.ndim != 3:
        got = list(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__
        raise FluxIRError(
            f"a latent must be a tensor [batch, tokens, channels]: got {got}", hint="pass step.after of the last step"
        )


class PromptEmbeds(NamedTuple):
    """A prompt's embedding from a file, and the prompt itself if the file says it."""

    text: TextEmbedding
    prompt: str | None


def save_prompt_embeds(embedding: TextEmbedding, path: str | Path, *, prompt: str | None = None) -> None:
    """Write an embedding as .safetensors, under diffusers' names."""
    tensors = {TXT_KEYS[0]: embedding.txt.cpu().contiguous(), POOLED_KEYS[0]: embedding.y.cpu().contiguous()}
    with complete_file(Path(path)) as beside:
        beside.write_bytes(save(tensors, {} if prompt is None else {"prompt": prompt}))


def read_prompt_embeds(path: str | Path, spec: ModelSpec) -> PromptEmbeds:
    """The embedding of one prompt: T5's as `prompt_embeds` or `txt`, CLIP's as `pooled_prompt_embeds`, `vec` or `y`.

    Raises FluxIRError for a file that cannot be read, and for tensors this model does not take.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            found = [name for keys in (TXT_KEYS, POOLED_KEYS) for name in keys if name in names]
            if len(found) != 2 or found[0] not in TXT_KEYS or found[1] not in POOLED_KEYS:
                raise FluxIRError(
                    f"{path} must hold one of {', '.join(TXT_KEYS)} and one of {', '.join(POOLED_KEYS)}: got "
                    f"{', '.join(names) or 'nothing'}",
                    hint="flux_ir.encode_prompt(model, prompt, save_to=FILE) writes such a file",
                )
            txt, y = (file.get_tensor(name) for name in found)
    except (OSError, SafetensorError) as error:
        raise FluxIRError(
            f"cannot read the prompt's embedding in {path}: {error}", hint="name a complete .safetensors file"
        ) from error
    flux = spec.flux
    _check_embedding(path, found[0], txt, ("1", "tokens", str(flux.context_in_dim)), spec)
    _check_embedding(path, found[1], y, ("1", str(flux.vec_in_dim)), spec)
    return PromptEmbeds(TextEmbedding(txt, y), metadata.get("prompt"))


def _check_embedding(path: str | Path, name: str, value: Tensor, shape: tuple[str, ...], spec: ModelSpec) -> None:
    fits = len(shape) == value.ndim and all(
        side == "tokens" or int(side) == size for side, size in zip(shape, value.shape, strict=True)
    )
    if not fits or value.numel() == 0 or not value.is_floating_point():
        raise FluxIRError(
            f"{name} in {path} must be floats [{', '.join(shape)}] for {spec.name}: "
            f"got {value.dtype} {list(value.shape)}",
            hint="encode one prompt with the text encoders of this model",
        )
    if not value.isfinite().all():
        raise FluxIRError(f"{name} in {path} must be finite: it has NaN or infinite values", hint="encode it again")
