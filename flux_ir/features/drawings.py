"""What a feature draws by itself: two pictures of each.

*Read out*: every token is b_dec, which stands for the mean token, plus the feature's direction, scaled to the root mean
square distance of tokens from their mean. The model's last layer turns these tokens into a velocity, and -v is decoded:
v = noise - picture, and there is no noise here. That is the lens, which says least at early sites.

*Icon*: an empty prompt is sampled with the site's update replaced, on every token at every step, by k x the feature's
mean activation x its direction (the feature icon of Surkov et al., 2025). The rest of the network is as it was.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import normalize

from flux_ir.features.folder import FeatureFolder
from flux_ir.files import complete_file
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Change, Intervention
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import Inputs, decode, noise_for, prepare, sample
from flux_ir.shapes import Pixels
from flux_ir.sites import Site, Stream


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What all features are drawn on: the same size, schedule, noise and empty prompt."""

    width: int
    height: int
    timesteps: tuple[float, ...]
    guidance: float
    step: int
    """Whose time the direction is read out at."""
    seed: int

    def inputs(self, empty: TextEmbedding, count: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        """One noise and one text for so many features."""
        noise = noise_for([self.seed] * count, self.height, self.width, device, dtype)
        text = TextEmbedding(*(part.expand(count, *part.shape[1:]) for part in empty))
        return prepare(noise, text, self.height, self.width)


def reads_out(site: Site) -> bool:
    """Whether the last layer can read tokens of this site: image tokens as blocks put them out or add to them."""
    return site.stream != "txt" and site.part in (None, "update") and not site.per_prompt


@torch.no_grad()
def read_out(
    model: Transformer,
    autoencoder: AutoEncoder,
    directions: Float[Tensor, "features d"],
    mean: Float[Tensor, "d"],
    length: float,
    canvas: Canvas,
    empty: TextEmbedding,
) -> Pixels:
    """The picture of each direction, [features, height, width, 3]: every token is mean + length x unit direction.

    `length` is in the unit of activations.
    """
    device, dtype = model.img_in.weight.device, model.dtype
    inputs = canvas.inputs(empty, len(directions), device, dtype)
    token = mean + length * normalize(directions.float(), dim=1)
    tokens = token.to(device, dtype)[:, None].expand(-1, inputs.img.shape[1], -1).contiguous()
    times, guidance = (per_sample(value, inputs.img) for value in (canvas.timesteps[canvas.step], canvas.guidance))
    vec = model.conditioning(times, inputs.y, guidance)
    return decode(autoencoder, -model.read_out(tokens, vec), canvas.height, canvas.width, dtype)


@torch.no_grad()
def icons(
    model: Transformer,
    autoencoder: AutoEncoder,
    site: Site,
    amounts: Float[Tensor, "features d"] | None,
    canvas: Canvas,
    empty: TextEmbedding,
) -> Pixels:
    """The picture of the empty prompt with each of these vectors in place of what the block adds at `site`, on every
    token and at every step; of a part of a block before its gate, in place of that part. None: the untouched picture.
    """
    device, dtype = model.img_in.weight.device, model.dtype
    inputs = canvas.inputs(empty, 1 if amounts is None else len(amounts), device, dtype)
    edits: dict[str | Site, Change] = {}
    if amounts is not None:
        rows = amounts.to(device, dtype)[:, None]
        edits = {
            replace(site, part="update") if site.part is None else site: lambda value, step: rows.expand(value.shape)
        }
    with Intervention(model, edits):
        *_, last = sample(model, inputs, list(canvas.timesteps), canvas.guidance)
    return decode(autoencoder, last.after, canvas.height, canvas.width, dtype)


class Studio(NamedTuple):
    """All that it takes to draw the features of one site."""

    model: Transformer
    autoencoder: AutoEncoder
    site: Site
    """A site of one stream."""
    directions: Float[Tensor, "d_sae d"]
    """W_dec."""
    amounts: Float[Tensor, "d_sae"]
    """The length of each feature's vector in its icon."""
    mean: Float[Tensor, "d"]
    """b_dec: what the autoencoder gives for a token without features."""
    length: float
    """`token_length`."""
    canvas: Canvas
    empty: TextEmbedding

    def draw(self, features: Sequence[int]) -> list[Image.Image]:
        """One picture of each: what its direction reads out as, and beside it its icon."""
        rows = self.directions[list(features)]
        icon = icons(
            self.model,
            self.autoencoder,
            self.site,
            rows * self.amounts[list(features), None].to(rows),
            self.canvas,
            self.empty,
        )
        panels = [icon]
        if reads_out(self.site):
            parts = (self.model, self.autoencoder, rows, self.mean, self.length, self.canvas, self.empty)
            panels.insert(0, read_out(*parts))
        return [
            Image.fromarray(np.concatenate([panel[i].numpy() for panel in panels], axis=1)) for i in range(len(rows))
        ]

    def untouched(self) -> Image.Image:
        """What the empty prompt draws by itself: what icons are to be compared with."""
        picture = icons(self.model, self.autoencoder, self.site, None, self.canvas, self.empty)
        return Image.fromarray(picture[0].numpy())


UNTOUCHED = "untouched"


def draw_missing(studio: Studio, folder: Path, features: Sequence[int], batch: int, digest: str) -> Iterator[int]:
    """Draws the features whose pictures are not in the folder, or were made with another `digest`: {feature}.png each,
    and untouched.png. Yields how many are there, batch by batch.

    Batches are always cut from all features, missing or not: the bits of a picture depend on what is in its batch.
    """
    if not is_drawn(folder / f"{UNTOUCHED}.png", digest):
        _write(folder / f"{UNTOUCHED}.png", studio.untouched(), digest)
    done = 0
    for start in range(0, len(features), batch):
        some = features[start : start + batch]
        missing = [feature for feature in some if not is_drawn(folder / f"{feature}.png", digest)]
        if missing:
            pictures = dict(zip(some, studio.draw(some), strict=True))
            for feature in missing:
                _write(folder / f"{feature}.png", pictures[feature], digest)
        done += len(some)
        yield done


def is_drawn(path: Path, digest: str) -> bool:
    """Whether a picture is there and was made with these settings."""
    try:
        with Image.open(path) as picture:
            return bool(picture.info.get(_KEY) == digest)
    except (FileNotFoundError, UnidentifiedImageError):
        return False


def _write(path: Path, picture: Image.Image, digest: str) -> None:
    note, encoded = PngInfo(), BytesIO()
    note.add_text(_KEY, digest)
    picture.save(encoded, format="PNG", pnginfo=note)
    with complete_file(path) as beside:
        beside.write_bytes(encoded.getbuffer())


_KEY = "flux_ir"


def token_length(folder: FeatureFolder, stream: Stream) -> float:
    """The root mean square distance of tokens from their mean over all images and steps, in the unit of activations."""
    squares = count = 0.0
    for part in folder.scores(stream):
        there = np.broadcast_to((part.positions >= 0)[:, None], part.norm.shape)
        squares, count = squares + float(part.norm[there].sum(dtype=np.float64)), count + int(there.sum())
    return math.sqrt(squares / max(count, 1))
