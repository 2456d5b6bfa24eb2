"""Pictures that a run is given: one that it begins with (image to image), one that it refers to (Kontext).

They are read, checked and fitted before any weight is loaded; `generate.encode` makes latents of them later.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.registry import ModelSpec
from flux_ir.sampling.generate import Inputs, check_size, encode
from flux_ir.sampling.latents import TOKEN_PX, image_ids
from flux_ir.sampling.schedule import first_step
from flux_ir.shapes import CondLatent, PackedLatent, Pixels

PictureGiven = str | Path | Image.Image | Tensor
"""A file, a picture of Pillow, or pixels uint8 [1, height, width, 3] as `decode` gives them."""
DEFAULT_STRENGTH = 0.6
_DEEP = ("I", "F")  # modes of 16 and more bits, which Pillow would cut off at 255


class GivenPicture(NamedTuple):
    """A picture as it enters the autoencoder."""

    pixels: Pixels
    """uint8 [1, height, width, 3]."""
    path: str | None
    """The file it was read from; None: it was handed over."""

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.pixels.shape[2])

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.pixels.shape[1])

    @property
    def size(self) -> str:
        """Its size in words."""
        return f"{self.width} x {self.height} px"

    def digest(self) -> str:
        """16 hex digits that stand for its pixels, whatever file they come from."""
        size = f"{self.width} x {self.height} ".encode()
        return hashlib.sha256(size + self.pixels.numpy().tobytes()).hexdigest()[:16]

    def resized(self, width: int, height: int) -> "GivenPicture":
        """The same in another size [px], stretched to it; itself, if it has that size."""
        if (width, height) == (self.width, self.height):
            return self
        picture = Image.fromarray(self.pixels[0].numpy()).resize((width, height), Image.Resampling.LANCZOS)
        return self._replace(pixels=_pixels_of(picture))

    def image(self) -> Image.Image:
        """The picture, to be saved."""
        return Image.fromarray(self.pixels[0].numpy())

    def described(self) -> dict[str, Any]:
        """What the metadata of a run say of it."""
        return {"digest": self.digest(), "path": self.path, "width": self.width, "height": self.height}


def read_given(given: PictureGiven, flag: str) -> GivenPicture:
    """The picture that is given, turned as its EXIF data say. `flag` names it in messages.

    Raises FluxIRError for what is no picture, is partly transparent, or has more than 8 bits per channel.
    """
    if isinstance(given, Tensor):
        if given.dtype != torch.uint8 or given.ndim != 4 or given.shape[0] != 1 or given.shape[3] != 3:
            raise FluxIRError(
                f"--{flag} as a tensor must be one picture, uint8 [1, height, width, 3]: "
                f"got {given.dtype} {list(given.shape)}",
                hint="pass what decode gives, or the path of a file",
            )
        return GivenPicture(given.cpu(), None)
    if isinstance(given, Image.Image):
        return GivenPicture(_pixels_of(_checked(given, flag, "the picture")), None)
    try:
        with Image.open(given) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            return GivenPicture(_pixels_of(_checked(picture, flag, str(given))), str(Path(given).absolute()))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FluxIRError(
            f"cannot read the picture of --{flag} in {given}: {error}", hint="name a PNG or JPEG file"
        ) from error


def _checked(picture: Image.Image, flag: str, where: str) -> Image.Image:
    if picture.mode.startswith(_DEEP):
        raise FluxIRError(
            f"--{flag} takes pictures of 8 bits per channel: {where} has the mode {picture.mode}",
            hint="save it with 8 bits per channel",
        )
    if picture.has_transparency_data and _least_opaque(picture) < 255:
        raise FluxIRError(
            f"--{flag} takes opaque pictures: {where} has transparent pixels", hint="flatten it onto a background"
        )
    return picture.convert("RGB")


def _least_opaque(picture: Image.Image) -> float:
    lowest, _ = picture.convert("RGBA").getchannel("A").getextrema()
    return float(lowest)  # type: ignore[arg-type]


def _pixels_of(picture: Image.Image) -> Pixels:
    return torch.from_numpy(np.array(picture))[None]


def nearest_size(width: int, height: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The size among these whose proportions are nearest to a picture's."""
    return min(sizes, key=lambda size: abs(size[0] / size[1] - width / height))


class RunPictures(NamedTuple):
    """The pictures of one run: each None, if it has none."""

    init: GivenPicture | None = None
    """What it begins with."""
    strength: float = 1.0
    """How much of the schedule is run on `init`: 1 keeps nothing of it."""
    reference: GivenPicture | None = None
    """What it refers to, in the size it is encoded in."""
    reference_given: str | None = None
    """The reference's size as it was given, where it was fitted to another."""

    @property
    def cond_tokens(self) -> int:
        """How many tokens the reference has."""
        return 0 if self.reference is None else image_ids(1, self.reference.height, self.reference.width).shape[1]

    def first_step(self, num_steps: int) -> int:
        """The first step that is run."""
        return 0 if self.init is None else first_step(num_steps, self.strength)

    def side_px(self, width: int | None, height: int | None, spec: ModelSpec) -> tuple[int, int]:
        """Width and height [px] of the run: as asked for, or those of its picture, or the model's own.

        Raises FluxIRError for a picture to begin with that has another size, or one that is no multiple of 16 px.
        """
        like = self.init or (self.reference if width is None and height is None else None)
        own = (spec.default_side_px,) * 2 if like is None else (like.width, like.height)
        width, height = (own if side is None else side for side, own in zip((width, height), own, strict=True))
        if self.init is None or (self.init.width, self.init.height) == (width, height):
            if self.init is not None and (width % TOKEN_PX or height % TOKEN_PX):
                across, down = (max(TOKEN_PX, side // TOKEN_PX * TOKEN_PX) for side in (width, height))
                raise FluxIRError(
                    f"--init_image must have sides that are multiples of {TOKEN_PX} px: got {self.init.size}",
                    hint=f"cut it to {across} x {down} px: nothing is cut or scaled unasked",
                )
            return width, height
        raise FluxIRError(
            f"--init_image must have the size of the run, {width} x {height} px: got {self.init.size}",
            hint=f"scale it, or pass --width {self.init.width} --height {self.init.height}",
        )

    def notes(self, timesteps: Sequence[float]) -> list[str]:
        """What is worth knowing before the run begins."""
        notes, num_steps = [], len(timesteps) - 1
        if self.init is not None:
            first = self.first_step(num_steps)
            which = f"steps {first} to {num_steps - 1}" if first < num_steps - 1 else f"step {first} alone"
            notes.append(
                f"begun with a picture of {self.init.size} at strength {self.strength:g}: {which} of {num_steps}, "
                f"from t {timesteps[first]:.3g}"
            )
            if first == 0:
                notes.append("note: all steps are run, so nothing of --init_image is left: a lower strength keeps more")
        if self.reference_given is not None and self.reference is not None:
            notes.append(
                f"note: the reference picture of {self.reference_given} is fitted to {self.reference.size}, "
                "one of the sizes the model was trained on (--keep_reference_size leaves it as it is)"
            )
        return notes

    def described(self, timesteps: Sequence[float]) -> dict[str, Any]:
        """What the metadata of the run say of them, by the names of the arguments; nothing, where there are none."""
        said: dict[str, Any] = {}
        if self.init is not None:
            first = self.first_step(len(timesteps) - 1)
            begun = {"strength": self.strength, "first_step": first, "t": timesteps[first]}
            said["init_image"] = {**self.init.described(), **begun}
        if self.reference is not None:
            said["reference_image"] = self.reference.described()
        return said

    def identity(self) -> dict[str, Any]:
        """What the bits of a run depend on: nothing, where there are no pictures."""
        digests: dict[str, Any] = {name: picture.digest() for name, picture in self.given().items()}
        return digests if self.init is None else digests | {"strength": self.strength}

    def given(self) -> dict[str, GivenPicture]:
        """Those that there are, by the names of the arguments."""
        pictures = {"init_image": self.init, "reference_image": self.reference}
        return {name: picture for name, picture in pictures.items() if picture is not None}

    def encoded(self, autoencoder: AutoEncoder, timesteps: Sequence[float]) -> "EncodedPictures":
        """Their latents, for a run of this schedule."""
        first = self.first_step(len(timesteps) - 1)
        return EncodedPictures(
            first,
            timesteps[first],
            None if self.init is None else encode(autoencoder, self.init.pixels),
            self.reference,
            None if self.reference is None else encode(autoencoder, self.reference.pixels),
        )


class EncodedPictures(NamedTuple):
    """The latents of a run's pictures, and where in the schedule it begins with them."""

    first_step: int = 0
    t: float = 1.0
    init: PackedLatent | None = None
    reference: GivenPicture | None = None
    cond: CondLatent | None = None

    def put_into(self, inputs: Inputs) -> Inputs:
        """The inputs of the first step that is run, with the pictures in them: the same ones for every prompt."""
        if self.init is not None:
            inputs = inputs.begun_with(self.init, self.t)
        if self.reference is not None and self.cond is not None:
            inputs = inputs.with_reference(self.cond, self.reference.height, self.reference.width)
        return inputs


def settle_pictures(
    spec: ModelSpec,
    *,
    init_image: PictureGiven | None = None,
    strength: float | None = None,
    reference_image: PictureGiven | None = None,
    keep_reference_size: bool = False,
    flag: str = "strength",
) -> RunPictures:
    """The pictures of a run of this model. Raises FluxIRError for what cannot be done with them.

    `flag` is the name of `strength` in messages.
    """
    if init_image is None and strength is not None:
        raise FluxIRError(
            f"--{flag} says how much of a picture is changed: got {strength:g}, and no --init_image",
            hint=f"pass the --init_image as well, or leave --{flag} out",
        )
    if reference_image is None and keep_reference_size:
        raise FluxIRError("--keep_reference_size is of a --reference_image: got none", hint="leave it out")
    if reference_image is not None and not spec.takes_reference:
        raise FluxIRError(
            f"{spec.name} takes no reference picture: got --reference_image",
            hint="--model flux-dev-kontext takes one; --init_image begins with a picture in every model",
        )
    init = None if init_image is None else read_given(init_image, "init_image")
    strength = DEFAULT_STRENGTH if strength is None else strength
    first_step(1, strength, flag)  # raises for a strength that is none
    if reference_image is None:
        return RunPictures(init, strength)
    given = read_given(reference_image, "reference_image")
    if keep_reference_size:
        try:
            check_size(given.height, given.width)
        except FluxIRError as error:
            raise FluxIRError(
                f"a reference picture that keeps its size has sides of multiples of {TOKEN_PX} px: got {given.size}",
                hint="leave --keep_reference_size out, and it is fitted",
            ) from error
        return RunPictures(init, strength, given)
    fitted = given.resized(*nearest_size(given.width, given.height, spec.reference_sizes))
    return RunPictures(init, strength, fitted, None if fitted is given else given.size)
