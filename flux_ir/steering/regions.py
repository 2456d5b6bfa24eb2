"""Where an edit reaches: a rectangle, a mask that is drawn, a map above a threshold, or tokens by their numbers.

A region is kept as it was given and becomes token numbers when the size of the picture is known. Next: `edits`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from flux_ir.errors import FluxIRError
from flux_ir.sampling.latents import TOKEN_PX

Mask = Bool[np.ndarray, "tokens"]


class Grid(NamedTuple):
    """The image tokens of a picture of `width` x `height` px: `rows` x `columns`, numbered along the rows."""

    width: int
    height: int

    @property
    def rows(self) -> int:
        return self.height // TOKEN_PX

    @property
    def columns(self) -> int:
        return self.width // TOKEN_PX

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Region:
    """The part of a stream that an edit changes. Exactly one of the first four is given.

    Raises FluxIRError for none of them or several, and for a rectangle without a pixel.
    """

    rectangle: tuple[int, int, int, int] | None = None
    """left, top, right, bottom [px], right and bottom not included: every token that it touches."""
    image: str | Path | None = None
    """A picture, bright where the edit reaches: scaled to one brightness in [0, 1] per token, by the mean."""
    map: str | Path | None = None
    """A .npy file of numbers [rows, columns], one per token, or a whole multiple of that: then their mean."""
    tokens: tuple[int, ...] | None = None
    """Tokens by number, from 0, of the image or (on a site of text) of the text."""
    above: float = 0.5
    """With an image or a map: the tokens that have more than this."""

    def __post_init__(self) -> None:
        kinds = [field.name for field in fields(self) if field.name != "above"]
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise FluxIRError(
                f"a region is one of a rectangle, an image, a map and tokens: got {', '.join(given) or 'none of them'}",
                hint='write {"rectangle": [left, top, right, bottom]} in pixels, for example',
            )
        if self.rectangle is not None:
            left, top, right, bottom = self.rectangle
            if not (0 <= left < right and 0 <= top < bottom):
                raise FluxIRError(
                    "a rectangle is left, top, right, bottom in pixels, and has at least one: "
                    f"got {left}, {top}, {right}, {bottom}",
                    hint="count from the top left corner of the picture; right and bottom are not included",
                )
        if self.tokens is not None and any(token < 0 for token in self.tokens):
            raise FluxIRError(f"tokens are counted from 0: got {min(self.tokens)}", hint="leave it out")

    @property
    def of_image(self) -> bool:
        """Whether it is a place on the picture, which text tokens have not."""
        return self.tokens is None

    def mask(self, stream: Literal["img", "txt"], tokens: int, grid: Grid) -> Mask:
        """Which of a stream's `tokens` are in it.

        Raises FluxIRError for a region that is outside the picture or the text, that is of another stream, and for
        files that cannot be read or do not fit.
        """
        if self.tokens is not None:
            return self._numbered(stream, tokens)
        if stream == "txt":
            raise FluxIRError(
                "a place on the picture is no region of text tokens",
                hint='name image sites such as double.3.img, or give {"tokens": [0, 1]}',
            )
        if self.rectangle is not None:
            return self._rectangle(grid)
        return (self._image(grid) if self.image is not None else self._map(grid)).reshape(-1) > self.above

    def _numbered(self, stream: str, tokens: int) -> Mask:
        assert self.tokens is not None
        beyond = [token for token in self.tokens if token >= tokens]
        if beyond:
            what = "text" if stream == "txt" else "picture"
            raise FluxIRError(
                f"the {what} has {tokens} tokens, from 0 to {tokens - 1}: got token {beyond[0]}",
                hint="count image tokens along the rows of the picture, 16 px each",
            )
        mask = np.zeros(tokens, dtype=bool)
        mask[list(self.tokens)] = True
        return mask

    def _rectangle(self, grid: Grid) -> Mask:
        assert self.rectangle is not None
        left, top, right, bottom = self.rectangle
        if right > grid.width or bottom > grid.height:
            raise FluxIRError(
                f"a rectangle lies within the picture of {grid.width} x {grid.height} px: "
                f"got {left}, {top}, {right}, {bottom}",
                hint=f"right is at most {grid.width} and bottom at most {grid.height}",
            )
        mask = np.zeros((grid.rows, grid.columns), dtype=bool)
        mask[top // TOKEN_PX : -(-bottom // TOKEN_PX), left // TOKEN_PX : -(-right // TOKEN_PX)] = True
        return mask.reshape(-1)

    def _image(self, grid: Grid) -> np.ndarray:
        assert self.image is not None
        try:
            with Image.open(self.image) as picture:
                gray = picture.convert("L").convert("F")  # as floats: a mean of bytes would be rounded
        except (OSError, UnidentifiedImageError) as error:
            raise FluxIRError(
                f"cannot read the picture of a region in {self.image}: {error}", hint="name a PNG or JPEG file"
            ) from error
        if gray.width * grid.rows != gray.height * grid.columns:
            raise FluxIRError(
                f"the picture of a region must be as wide and high as the picture, {grid.width} x {grid.height} px, "
                f"or have its proportions: {self.image} has {gray.width} x {gray.height}",
                hint="cut it to the picture's proportions",
            )
        return np.asarray(gray.resize((grid.columns, grid.rows), Image.Resampling.BOX), dtype=np.float32) / 255

    def _map(self, grid: Grid) -> np.ndarray:
        assert self.map is not None
        try:
            values = np.load(self.map, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise FluxIRError(
                f"cannot read the map of a region in {self.map}: {error}", hint="write it with numpy.save"
            ) from error
        shape = values.shape
        finite = "" if np.isfinite(values).all() else ", not all of them finite"
        if len(shape) != 2 or shape[0] % grid.rows or shape[1] % grid.columns or finite:
            raise FluxIRError(
                f"the map of a region must be finite numbers [{grid.rows}, {grid.columns}], or a whole multiple of it: "
                f"{self.map} has {list(shape)}{finite}",
                hint="one number per token of 16 px",
            )
        down, across = shape[0] // grid.rows, shape[1] // grid.columns
        parts = values.astype(np.float64).reshape(grid.rows, down, grid.columns, across)
        return parts.mean(axis=(1, 3))

    def to_json(self) -> dict[str, Any]:
        """Its fields that are given, as JSON can say them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.image is None and self.map is None:
            del values["above"]
        return {
            name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            for name, value in values.items()
            if value is not None
        }


def region_of(given: object) -> Region | None:
    """A region as JSON says it, or as it is. Raises FluxIRError for fields that it does not have."""
    if given is None or isinstance(given, Region):
        return given
    known = {field.name for field in fields(Region)}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise FluxIRError(
            f"a region has some of {', '.join(sorted(known))}: got {given!r}",
            hint='write {"rectangle": [left, top, right, bottom]} in pixels, for example',
        )
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Region(**values)


def given_region(rectangle: object, mask: str | Path | None, above: float) -> Region | None:
    """The region as people give it: left, top, right, bottom [px], or a file. Raises FluxIRError for anything else."""
    if rectangle is not None and mask is not None:
        raise FluxIRError("a region is a rectangle or a mask: got both", hint="leave one of them out")
    if rectangle is not None:
        sides = list(rectangle) if isinstance(rectangle, list | tuple) else []
        if len(sides) != 4 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
            raise FluxIRError(
                f"a region is left, top, right, bottom in px, whole numbers: got {rectangle!r}",
                hint="0,0,64,128 is the left half of a picture of 128 x 128 px",
            )
        return Region(rectangle=tuple(sides))
    if mask is not None:
        is_map = Path(mask).suffix == ".npy"
        return Region(map=mask, above=above) if is_map else Region(image=mask, above=above)
    return None
