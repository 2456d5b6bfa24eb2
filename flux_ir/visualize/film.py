"""A film of frames: the pictures of each, side by side where there are several, with the caption drawn on top.

One frame is in memory at a time. A film can be gone through several times (a GIF needs its colours before its frames).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.visualize.frames import Frame
from flux_ir.visualize.overlay import Box, draw_caption, draw_label, enlargement, fit_captions, fit_label, shade
from flux_ir.visualize.pictures import PictureReader

GAP_PX = 8  # between pictures side by side
GAP_COLOUR = (24, 24, 28)


class FilmPanel(NamedTuple):
    """Where one generation's pictures stand in the frame, and the size that their files have [px]."""

    natural_px: tuple[int, int]
    edges: tuple[int, int, int, int]

    @property
    def size_px(self) -> tuple[int, int]:
        """The size at which the pictures are shown."""
        left, top, right, bottom = self.edges
        return right - left, bottom - top


class Film:
    """Iterating draws the frames, in order. `frames` are those whose pictures are there; all have `size_px`.

    `labels` name the generations and are drawn below their pictures; none are needed where there is only one.
    Raises FluxIRError if a picture is missing, unless the reader skips such, and if no frame is left.
    """

    def __init__(
        self, frames: Sequence[Frame], reader: PictureReader, *, font_size: int, labels: Sequence[str] = ()
    ) -> None:
        self.reader = reader
        self.frames = [frame for frame in frames if all(map(reader.check_present, frame.pictures))]
        captions = [frame.cell.captions for frame in self.frames]
        self.panels = _arrange(self._natural_sizes(), captions, font_size)
        self.style = fit_captions(captions, *self.panels[0].size_px, font_size)
        self.labels: list[tuple[str, Box]] = [
            fit_label(label, panel.edges, font_size) for label, panel in zip(labels, self.panels, strict=bool(labels))
        ]

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of every frame."""
        _, _, right, bottom = self.panels[-1].edges
        return right, bottom

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Image.Image]:
        """The frames, without those whose pictures turn out to be broken."""
        for frame in self.frames:
            pictures = [
                self.reader.read(path, size_px=panel.natural_px)
                for path, panel in zip(frame.pictures, self.panels, strict=True)
            ]
            whole = [picture for picture in pictures if picture is not None]
            if len(whole) == len(pictures):
                yield self._draw(frame, whole)

    def thumbnails(self, side_px: int) -> Iterator[Image.Image]:
        """Every picture at a glance, `side_px` wide and high: its colours, not mixed, and a box without text."""
        for frame in self.frames:
            for path, panel in zip(frame.pictures, self.panels, strict=True):
                picture = self.reader.read(path, size_px=panel.natural_px, draft_px=4 * side_px)
                if picture is not None:
                    yield self._glance(picture, side_px)

    def _glance(self, picture: Image.Image, side_px: int) -> Image.Image:
        small = picture.resize((side_px, side_px), Image.Resampling.NEAREST)
        width, height = self.panels[0].size_px
        _, _, right, bottom = self.style.box.edges
        small.paste(shade(small.crop((0, 0, -(-side_px * right // width), -(-side_px * bottom // height)))))
        return small

    def _draw(self, frame: Frame, pictures: Sequence[Image.Image]) -> Image.Image:
        if len(pictures) == 1:
            drawn = _enlarged(pictures[0], self.panels[0].size_px)
        else:
            drawn = Image.new("RGB", self.size_px, GAP_COLOUR)
            for picture, panel in zip(pictures, self.panels, strict=True):
                drawn.paste(_enlarged(picture, panel.size_px), panel.edges[:2])
        draw_caption(drawn, frame.cell.captions, self.style)
        for line, box in self.labels:
            draw_label(drawn, line, box)
        return drawn

    def _natural_sizes(self) -> list[tuple[int, int]]:
        """The size of each generation's pictures: that of the first which can be read."""
        sizes = []
        for column in zip(*(frame.pictures for frame in self.frames), strict=True):
            readable = (picture for path in column if (picture := self.reader.read(path)) is not None)
            sizes += [picture.size for picture in islice(readable, 1)]
        if not sizes or len(sizes) < len(self.frames[0].pictures):
            raise FluxIRError(
                "there must be a picture to show: every one was left out", hint="decode the capture again"
            )
        return sizes


def _arrange(
    natural_sizes: Sequence[tuple[int, int]], captions: Sequence[Sequence[str]], font_size: int
) -> list[FilmPanel]:
    """Side by side and equally high, all enlarged by the same factor if their captions could not be read else."""
    height = max(height for _, height in natural_sizes)
    widths = [round(width * height / own_height) for width, own_height in natural_sizes]
    factor = enlargement(captions, widths[0], height, font_size)
    panels, left = [], 0
    for natural_px, width in zip(natural_sizes, widths, strict=True):
        panels.append(FilmPanel(natural_px, (left, 0, left + width * factor, height * factor)))
        left += width * factor + GAP_PX
    return panels


def _enlarged(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """The picture at this size: pixels stay sharp squares where it grows by a whole factor."""
    if picture.size == size_px:
        return picture
    whole = all(new % old == 0 for new, old in zip(size_px, picture.size, strict=True))
    return picture.resize(size_px, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
