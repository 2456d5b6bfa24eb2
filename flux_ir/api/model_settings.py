"""Which model, from which files, on which devices, in which precision: all work that runs a model asks this alike.

The settings of such work inherit these fields from `ModelSettings`, or from `PictureSettings` where pictures are
sampled, and settle them here. A new choice is a field of one of these two, an argument of the public functions, and a
flag in `commands.cli.shared`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from flux_ir.activations.blocks import changed_by, loras_of, other_model, quantize_of
from flux_ir.api.arguments import check_words
from flux_ir.api.progress import Note, Watch
from flux_ir.collecting.collection import weights_digest
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import AnyParams
from flux_ir.models.checkpoints.inspect import WeightSource
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.checkpoints.locate_text import EncoderSource
from flux_ir.models.checkpoints.lora.names import PART_NAMES
from flux_ir.models.checkpoints.lora.read import check_recorded
from flux_ir.models.compute_dtype import ComputeDtype, DtypeWord, choose_dtype
from flux_ir.models.flux1.attention import AttentionWord, attention_backend, attention_kernels
from flux_ir.models.memory import Limits, best_offload
from flux_ir.models.placement import MultiGpuWord, OffloadWord, Placement, plan
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import ModelSpec, get_spec
from flux_ir.models.split import with_parts_beside
from flux_ir.models.suite import Suite
from flux_ir.recording.hooks import is_outside
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sampling.generate import check_size
from flux_ir.sampling.pictures import PictureGiven, RunPictures, settle_pictures
from flux_ir.sampling.schedule import schedule_of
from flux_ir.sites import Site
from flux_ir.steering.regions import Grid


class Machine(NamedTuple):
    """Where a model computes, in which dtype, whether its blocks are compiled, and by which kernel they attend."""

    placement: Placement
    compute: ComputeDtype
    compiled: bool = False
    attention: AttentionWord = "auto"

    def __str__(self) -> str:
        compiled = ", blocks compiled" if self.compiled else ""
        attention = "" if self.attention == "auto" else f", {self.attention} attention"
        return f"{', '.join(self.placement.devices)} ({self.placement.reason}), {self.compute}{compiled}{attention}"

    def notes(self, sites: Iterable[Site] = ()) -> list[str]:
        """What a user must know of this choice, where these sites are recorded or changed."""
        notes = [] if self.compute.warning is None else [f"note: {self.compute.warning}"]
        inside = {f"{site.kind}.{site.block}": None for site in sites if self.compiled and not is_outside(site)}
        if inside:
            notes.append(f"note: not compiled, because of sites inside them: {', '.join(inside)}")
        return notes


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is run, and how: the arguments of `load_model`. What is None is settled by the machine."""

    model: str | Suite | None = "flux-schnell"
    """The name of one, or a loaded one, which has settled all that follows. None: that of the run or captures."""
    dtype: DtypeWord = "auto"
    device: str | None = None
    multi_gpu: MultiGpuWord = False
    offload: OffloadWord = False
    compile: bool = False
    """Whether the transformer's blocks are compiled, each by itself: see `models.compiled`."""
    attention: AttentionWord = "auto"
    """The kernel that computes the transformer's attention; auto: what PyTorch chooses."""
    vram_gb: float | None = None
    """What the GPU may be filled with, and `memory_gb` the host memory of this process; None: see `memory`."""
    memory_gb: float | None = None
    checkpoint: str | Path | None = None
    ae_checkpoint: str | Path | None = None
    lora: str | Path | Sequence[str | Path] | None = None
    """Files merged into the transformer, in this order."""
    lora_strength: float | Sequence[float] | None = None
    """One for all or one for each; None: 1."""
    quantize: Method | None = None
    """How the transformer's blocks are kept as codes; None: as the run or the captures were made, else not at all."""

    @property
    def spec(self) -> ModelSpec:
        """What is known of the model. Raises FluxIRError for an unknown name."""
        return self.model.spec if isinstance(self.model, Suite) else get_spec(str(self.model))

    def model_choices(self) -> dict[str, Any]:
        """All of these but the model itself, by name: `load_model` and other settings take them as arguments."""
        return {field.name: getattr(self, field.name) for field in fields(ModelSettings) if field.name != "model"}

    def other_choices(self) -> dict[str, Any]:
        """What these settings hold beside the model and these choices, by name."""
        of_model = {field.name for field in fields(ModelSettings)}
        return {name: value for name, value in vars(self).items() if name not in of_model}

    def choices_made(self) -> dict[str, Any]:
        """Those of them that differ from their defaults."""
        defaults = ModelSettings().model_choices()
        return {name: value for name, value in self.model_choices().items() if value != defaults[name]}

    def settle_machine(self, *, recorded: torch.dtype | None = None, ranks: Ranks | None = None) -> Machine:
        """Where the model computes and in which dtype: as it was loaded, or as the settings and the devices say.

        `recorded` is the dtype of what is read again. Each of several `ranks` has the whole model on its own GPU.

        Raises FluxIRError for words and devices that are unknown, for `multi_gpu` with several ranks, and for what a
        loaded model has settled.
        """
        check_words(ModelSettings, self.model_choices())
        if self.model is not None:
            check_runs(self.spec)
        if isinstance(self.model, Suite):
            if made := self.choices_made():
                raise FluxIRError(
                    f"a loaded model is used as it is: got {', '.join(made)} as well",
                    hint="pass them to load_model, or pass the model by its name",
                )
            compute = ComputeDtype(self.model.dtype, "as the model was loaded")
            return Machine(self.model.placement, compute, self.model.compiled, self.model.attention)
        if ranks is not None and ranks.world_size > 1 and self.multi_gpu:
            raise FluxIRError(
                f"--multi_gpu is for one process that has several GPUs: got {ranks.world_size} processes",
                hint="leave out --multi_gpu, or start without torchrun",
            )
        device = str(ranks.device(self.device)) if ranks is not None and ranks.world_size > 1 else self.device
        placement = plan(torch.cuda.device_count(), device=device, multi_gpu=self.multi_gpu, offload=self.offload)
        flux = None if self.model is None else self.spec.flux  # None: it is not known yet which model that will be
        placement = placement if flux is None else with_parts_beside(placement, flux)
        compute = choose_dtype(self.dtype, placement.devices, recorded=recorded, ranks=ranks)
        if flux is not None:
            vram, memory = (None if gb is None else int(gb * 10**9) for gb in (self.vram_gb, self.memory_gb))
            limits = Limits(vram, memory)
            placement = best_offload(placement, flux, compute.dtype, limits, self.offload, quantize=self.quantize)
        if self.compile:
            check_can_compile(placement)
        if flux is not None:
            check_attends(self.attention, flux, placement, compute.dtype)
        return Machine(placement, compute, self.compile, self.attention)

    def suite(
        self,
        machine: Machine,
        progress: Watch,
        *,
        text: bool = True,
        autoencoder: bool = True,
        sharded_over: int = 1,
    ) -> Suite:
        """The loaded model; or by its name: its files are found (or fetched) and checked, and no part is loaded.

        Without `text` or `autoencoder` this part is not looked for. The transformer is sharded over so many ranks.
        """
        if isinstance(self.model, Suite):
            return self.model

        def announce(line: str) -> None:
            progress(Note(line))

        source = locate_model(
            self.spec,
            self.checkpoint,
            self.ae_checkpoint,
            lora=self.lora,
            lora_strength=self.lora_strength,
            text=text,
            autoencoder=autoencoder,
            announce=announce,
        )
        source = source._replace(quantize=self.quantize)
        for lora in source.loras if not text else ():
            if changed := [PART_NAMES[part] for part in lora.parts if part != "transformer"]:
                changed_parts = " and ".join(changed)
                announce(f"note: no prompt is encoded: what {lora.path.name} changes of {changed_parts} has no effect")
        return Suite(
            self.spec,
            source,
            machine.placement,
            machine.compute.dtype,
            announce=announce,
            sharded_over=sharded_over,
            compiled=machine.compiled,
            attention=machine.attention,
        )


def check_runs(spec: ModelSpec) -> None:
    """Raises FluxIRError for a model that is known, and of which something cannot be run yet."""
    if spec.lacks is not None:
        raise FluxIRError(
            f"{spec.name} cannot be run yet: {spec.lacks}",
            hint="`flux-ir weights FILE` says what a file of it holds; flux_ir.models has its networks",
        )


def check_attends(kernel: AttentionWord, flux: AnyParams, placement: Placement, dtype: torch.dtype) -> None:
    """Raises FluxIRError for a kernel of attention that a device of the transformer lacks."""
    for device in dict.fromkeys([placement.transformer, *placement.blocks]) if kernel != "auto" else ():
        there = attention_kernels(flux.num_heads, flux.head_dim, device, dtype)
        if kernel not in there:
            name = str(dtype).removeprefix("torch.")
            raise FluxIRError(
                f"--attention {kernel} is not there on {device} for heads of {flux.head_dim} channels in {name}: "
                f"{' and '.join(there)} are",
                hint="leave --attention out, and PyTorch chooses",
            )


def check_can_compile(placement: Placement) -> None:
    """Raises FluxIRError where blocks cannot be compiled, for whichever model."""
    if placement.offload == "blocks":
        raise FluxIRError(
            "--compile needs blocks that stay where they are, and these come one after the other",
            hint="leave out --compile, or --offload",
        )
    from flux_ir.models.compiled import check_compiles  # the compiler takes seconds to import

    check_compiles(placement.transformer)


class SettledPicture(NamedTuple):
    """What pictures are sampled with, nothing left open."""

    grid: Grid
    timesteps: list[float]
    guidance: float
    given: RunPictures = RunPictures()
    """The pictures that a run begins with, or refers to."""

    @property
    def num_steps(self) -> int:
        """Euler steps of the whole schedule."""
        return len(self.timesteps) - 1

    @property
    def first_step(self) -> int:
        """The first of them that is run: not 0 where a run begins with a picture."""
        return self.given.first_step(self.num_steps)


@dataclass(frozen=True, kw_only=True)
class PictureSettings(ModelSettings):
    """What pictures are sampled with, but for prompts and seeds. What is None is the model's own."""

    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None

    def picture_choices(self) -> dict[str, Any]:
        """These without the model's, by name: other settings take them as arguments."""
        of_model = {field.name for field in fields(ModelSettings)}
        return {
            field.name: getattr(self, field.name) for field in fields(PictureSettings) if field.name not in of_model
        }

    def settle_picture(self) -> SettledPicture:
        """The model's own size [px], steps and guidance where nothing else is asked for.

        Raises FluxIRError for sizes that are no multiple of 16.
        """
        spec, given = self.spec, self.settle_given()
        width, height = given.side_px(self.width, self.height, spec)
        check_size(height, width)
        num_steps = spec.default_steps if self.num_steps is None else self.num_steps
        grid = Grid(width, height)
        timesteps = schedule_of(spec, num_steps, grid.tokens)
        guidance = spec.default_guidance if self.guidance is None else self.guidance
        return SettledPicture(grid, timesteps, guidance, given)

    def settle_given(self) -> RunPictures:
        """The pictures that the work is given: none, but for work that takes some."""
        return RunPictures()


@dataclass(frozen=True, kw_only=True)
class GivenPictureSettings(PictureSettings):
    """The same for work that may begin with a picture, or refer to one."""

    init_image: PictureGiven | None = None
    """What the run begins with, in the size of the run. None: noise alone."""
    reference_image: PictureGiven | None = None
    """What models such as flux-dev-kontext are told beside the prompt."""
    keep_reference_size: bool = False
    """Whether `reference_image` keeps its size; if not, it is fitted to one that the model was trained on."""

    @property
    def strength_flag(self) -> str:
        """The name of the field that says how much of the schedule is run on `init_image`."""
        return "strength"

    def given_as_json(self) -> dict[str, Any]:
        """The pictures as plain JSON values: each by the path of its file."""
        pictures = {name: getattr(self, name) for name in ("init_image", "reference_image")}
        return {
            name: "given" if picture is not None and not isinstance(picture, str | Path) else picture and str(picture)
            for name, picture in pictures.items()
        }

    def settle_given(self) -> RunPictures:
        """The pictures, read and fitted. Raises FluxIRError for what cannot be done with them."""
        return settle_pictures(
            self.spec,
            init_image=self.init_image,
            strength=getattr(self, self.strength_flag),
            reference_image=self.reference_image,
            keep_reference_size=self.keep_reference_size,
            flag=self.strength_flag,
        )


@dataclass(frozen=True, kw_only=True)
class BegunPictureSettings(GivenPictureSettings):
    """The same with how much of the schedule is run on `init_image`, where `strength` means nothing else."""

    strength: float | None = None
    """Above 0 to 1. None: 0.6."""


Settings = TypeVar("Settings", bound=ModelSettings)


def with_loras(settings: Settings, recorded: Sequence[Mapping[str, Any]]) -> Settings:
    """The same with the LoRAs that a run was made with, unless others are named or the model is a loaded one.

    `recorded` is what the run says of them. Raises FluxIRError where a file is gone or is another one by now.
    """
    if not recorded or settings.lora is not None or isinstance(settings.model, Suite):
        return settings
    for lora in recorded:
        check_recorded(lora)
    paths, strengths = [lora["path"] for lora in recorded], [lora["strength"] for lora in recorded]
    return replace(settings, lora=paths, lora_strength=strengths)


def as_captured(settings: Settings, source: object) -> Settings:
    """The same with the LoRAs and the quantisation that the model of a source had, unless others are asked for.

    Raises FluxIRError where the file of a LoRA is gone or is another one by now.
    """
    settings = with_loras(settings, loras_of(source))
    if settings.quantize is not None or isinstance(settings.model, Suite):
        return settings
    return replace(settings, quantize=quantize_of(source))


def note_other_model(name: str, sae: SparseAutoencoder, now: Mapping[str, Any], here: str, progress: Watch) -> None:
    """Notes an autoencoder that was trained on its model with other LoRAs, or quantised otherwise, than `now`.

    It can be used: but what it says is of another model. `now` is what `changed_by` gives; `here` leads to it.
    """
    data = sae.metadata.get("data")
    if isinstance(data, Mapping) and (told := other_model(data, now)) is not None:
        progress(Note(f"note: {name} was trained on {told[0]}, and {here} {told[1]}"))


def note_trained_on_others(saes: Mapping[str, SparseAutoencoder], suite: Suite, progress: Watch) -> None:
    """The same for autoencoders, by their names, that are used in this model."""
    now = changed_by([lora.to_json() for lora in suite.source.loras], suite.source.quantize)
    for name, sae in saes.items():
        note_other_model(name, sae, now, "it is used in", progress)


def provenance_of(suite: Suite, machine: Machine) -> dict[str, Any]:
    """What the metadata of a run say of the model that made it: precision, devices, files."""
    source, flux = suite.source, suite.spec.flux
    text = {} if source.text is None else source.text._asdict()
    blocks = {"blocks": list(machine.placement.blocks)} if machine.placement.blocks else {}
    weights = {"transformer": source.transformer, "autoencoder": source.autoencoder, **text}
    made_of: dict[str, Any] = {"loras": [lora.to_json() for lora in source.loras]} if source.loras else {}
    if source.quantize is not None:
        made_of["quantize"] = source.quantize
    return made_of | {
        "dtype": machine.compute.name,
        "dtype_reason": machine.compute.reason,
        "devices": {name: getattr(machine.placement, name) for name in Placement.PARTS} | blocks,
        "offload": machine.placement.offload,
        "compiled": suite.compiled,
        "attention": suite.attention,
        "sdpa": attention_backend(
            flux.num_heads, flux.head_dim, machine.placement.transformer, machine.compute.dtype, suite.attention
        ),
        "files": {part: _described(file) for part, file in weights.items() if file},
    }


def _described(file: WeightSource | EncoderSource) -> dict[str, Any]:
    """A file of weights, what led to it and, for weights that were widened, how many are stored as what."""
    kinds = file.stored_as
    return {"path": str(file.path.absolute()), "origin": file.origin} | ({"stored_as": kinds} if kinds else {})


def identity_of_pictures(suite: Suite, picture: SettledPicture) -> dict[str, Any]:
    """What the bits of every picture depend on, whatever it shows: the name of a folder of pictures follows from it."""
    others: dict[str, Any] = {"compiled": True} if suite.compiled else {}
    if suite.attention != "auto":
        others["attention"] = suite.attention
    return others | {
        "model": suite.spec.name,
        "weights": weights_digest(suite.source, autoencoder=True),
        "size": list(picture.grid),
        "timesteps": picture.timesteps,
        "guidance": picture.guidance,
        **picture.given.identity(),
        "dtype": str(suite.dtype),
        "device": torch.device(suite.placement.transformer).type,
    }
