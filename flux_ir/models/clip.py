"""CLIP's picture half: as a source of activations, stopped before its last layer, or whole, to compare pictures by.

The checkpoint is a folder as transformers saves it, or one of the hub's that is fetched once. The text half is in
`text.clip`, with the layers that both are made of.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.checkpoints import hub
from flux_ir.models.checkpoints.hub import Announce
from flux_ir.models.checkpoints.paths import first_file, shards_present
from flux_ir.models.checkpoints.pretrained import WEIGHTS, load_pretrained, read_config, read_params, unreadable
from flux_ir.models.text.clip import ClipLayers, ClipParams
from flux_ir.models.text.t5 import blank_embedding
from flux_ir.shapes import Image as Images
from flux_ir.shapes import Pooled, Tokens

TokenChoice = Literal["cls", "patches", "all"]

WHAT = "the CLIP model"
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PIXELS = ("preprocessor_config.json", "processor_config.json")  # the second is how transformers 5 saves it
_TOKENIZERS = ("tokenizer.json", "vocab.json")
# What the hub's repositories of this family hold; a tokenizer.json needs none of the older tokenizer files.
_HUB_FILES = ("config.json", _PIXELS[0], "tokenizer_config.json", _TOKENIZERS[0], WEIGHTS[0])


@dataclass(frozen=True)
class ClipVisionParams(ClipParams):
    """The shape of one picture tower."""

    MODEL_TYPES: ClassVar = ("clip_vision_model", "clip")
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    """The length of both sides [px]."""
    patch_size: int = 32

    @property
    def patches(self) -> int:
        """How many a picture is cut into."""
        return (self.image_size // self.patch_size) ** 2


class ClipVision(nn.Module):
    """The picture tower up to its last layer but one, which tells most about the parts of a picture."""

    def __init__(self, params: ClipVisionParams) -> None:
        super().__init__()
        self.params = params
        self.embeddings = PatchEmbeddings(params)
        self.pre_layrnorm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)  # so the checkpoints spell it
        self.encoder = ClipLayers(params, params.num_hidden_layers - 1, causal=False)

    def forward(self, pixels: Images) -> Tokens:
        """What the last layer would be given (`hidden_states[-2]`): the class token, then one token per patch.

        Raises FluxIRError for pictures of another size than the tower was trained on.
        """
        side = self.params.image_size
        if pixels.shape[-2:] != (side, side):
            height, width = pixels.shape[-2:]
            raise FluxIRError(
                f"CLIP's pictures must be {side} x {side} px: got {width} x {height}",
                hint="crop_size in preprocessor_config.json must be the image_size of config.json",
            )
        weight = self.pre_layrnorm.weight
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels.to(weight.device, weight.dtype))))


class ClipPicture(nn.Module):
    """The whole picture tower: pictures in the space that CLIP's pictures and texts share."""

    def __init__(self, params: ClipVisionParams, projection_dim: int) -> None:
        super().__init__()
        self.params = params
        self.embeddings = PatchEmbeddings(params)
        self.pre_layrnorm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)
        self.encoder = ClipLayers(params, params.num_hidden_layers, causal=False)
        self.post_layernorm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)
        self.visual_projection = nn.Linear(params.hidden_size, projection_dim, bias=False)

    def forward(self, pixels: Images) -> Pooled:
        """One vector per picture, of any length: their cosines are what CLIP was trained on."""
        weight = self.pre_layrnorm.weight
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels.to(weight.device, weight.dtype))))
        return self.visual_projection(self.post_layernorm(tokens[:, 0]))


class PatchEmbeddings(nn.Module):
    """Patches and their positions, behind a class token."""

    def __init__(self, params: ClipVisionParams) -> None:
        super().__init__()
        dim, side = params.hidden_size, params.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(params.num_channels, dim, side, stride=side, bias=False)
        self.position_embedding = blank_embedding(1 + params.patches, dim)

    def forward(self, pixels: Images) -> Tokens:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        first = repeat(self.class_embedding, "d -> b 1 d", b=len(patches))
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Preprocessing(NamedTuple):
    """From a picture of any size to the square that CLIP was trained on, as its checkpoint says."""

    shortest_side_px: int
    crop_px: tuple[int, int]
    """Height and width."""
    resample: int
    """How Pillow reduces pictures: 3 is bicubic."""
    mean: tuple[float, ...]
    """The mean of each channel, of values in [0, 1]."""
    std: tuple[float, ...]


def tokens_of(params: ClipVisionParams, choice: TokenChoice) -> int:
    """How many tokens a picture has: one for its class, one per patch, or both kinds."""
    return {"cls": 1, "patches": params.patches, "all": 1 + params.patches}[choice]


def choose_tokens(tokens: Tensor, choice: TokenChoice) -> Tensor:
    """The class token [images, 1, d], the patches, or all, of what `ClipVision` gives."""
    return {"cls": tokens[:, :1], "patches": tokens[:, 1:], "all": tokens}[choice]


def locate_clip(clip: str, *, announce: Announce | None = None) -> Path:
    """The folder of a CLIP checkpoint: the folder of this name, or the hub's repository, fetched unless cached.

    Raises FluxIRError for a folder that lacks something, and for a name that is neither.
    """
    folder = Path(clip).expanduser()
    if folder.is_dir():
        if lacking := _lacking(folder):
            raise FluxIRError(f"{WHAT} in {folder} is incomplete: {lacking}", hint="fetch the whole folder again")
        return folder
    if folder.exists() or not _REPO_ID.fullmatch(clip):
        raise FluxIRError(
            f"--clip must be a folder or a repository of the hub: got {clip!r}",
            hint="name a folder that exists, or a repository such as openai/clip-vit-large-patch14",
        )
    config = hub.cached(clip, "config.json")
    if config is not None and not _lacking(config.parent):
        return config.parent
    try:
        files = [hub.download(clip, name, announce) for name in _HUB_FILES]
    except FluxIRError as error:  # its hint is about the transformer's flags
        raise FluxIRError(error.message, hint="or name a local copy of the whole folder with --clip") from error
    return files[0].parent


def load_vision(folder: Path, device: torch.device | str, dtype: torch.dtype) -> ClipVision:
    """The picture half of the checkpoint, ready to run. Raises FluxIRError for one that is broken or lacks weights."""
    params = read_params(ClipVisionParams, folder, what=WHAT, section="vision_config")
    last = (f"encoder.layers.{params.num_hidden_layers - 1}.", "post_layernorm.")  # `ClipVision` stops before it
    other = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    aliases = {"vision_model.": ""}
    return load_pretrained(
        ClipVision, params, folder, device, dtype, what=WHAT, aliases=aliases, left_out=(*other, *last)
    )


def load_picture_tower(folder: Path, device: torch.device | str, dtype: torch.dtype) -> ClipPicture:
    """The picture half whole, with its projection, ready to run. Raises FluxIRError likewise."""
    params = read_params(ClipVisionParams, folder, what=WHAT, section="vision_config")
    size = read_config(folder, what=WHAT).get("projection_dim", 512)
    other = ("text_model.", "text_projection.", "logit_scale")
    kind, aliases = partial(ClipPicture, projection_dim=size), {"vision_model.": ""}
    return load_pretrained(kind, params, folder, device, dtype, what=WHAT, aliases=aliases, left_out=other)


def read_preprocessing(folder: Path) -> Preprocessing:
    """What the checkpoint says of its pictures. Raises FluxIRError for a file that says something else than CLIP's."""
    path = first_file(folder, _PIXELS)
    if path is None:
        raise unreadable(folder, f"no {_PIXELS[0]}", what=WHAT)
    said = read_json(path)
    said = said.get("image_processor", said)
    steps = ("do_resize", "do_center_crop", "do_normalize")
    if skipped := [name for name in steps if said.get(name) is False]:
        raise unreadable(folder, f"{path.name} leaves out {', '.join(skipped)}, which CLIP does", what=WHAT)
    try:
        crop = said["crop_size"]
        return Preprocessing(
            shortest_side_px=_side(said["size"], "shortest_edge"),
            crop_px=(_side(crop, "height"), _side(crop, "width")),
            resample=int(said.get("resample", Image.Resampling.BICUBIC)),
            mean=tuple(map(float, said["image_mean"])),
            std=tuple(map(float, said["image_std"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(folder, f"{path.name} has no usable {error}", what=WHAT) from error


def read_pixels(content: Path | bytes, preprocessing: Preprocessing, *, where: str = "the picture") -> Tensor:
    """A picture file as CLIP takes it: float32 [3, height, width], upright, reduced, cut to its middle, normalised.

    `where` says in messages what the bytes are of. Raises FluxIRError for content that is no picture, or is cut short.
    """
    try:
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise broken_image(content if isinstance(content, Path) else where, error) from error
    short = min(picture.size)
    width, height = (int(preprocessing.shortest_side_px * side / short) for side in picture.size)
    picture = picture.resize((width, height), preprocessing.resample)
    rows, columns = preprocessing.crop_px
    top, left = (height - rows) // 2, (width - columns) // 2
    picture = picture.crop((left, top, left + columns, top + rows))
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    values = (np.asarray(picture, np.float32) / 255 - mean) / std
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def broken_image(where: Path | str, error: BaseException) -> FluxIRError:
    """One line on a file that Pillow cannot read."""
    return FluxIRError(
        f"{where} must be a picture that can be read: {error}",
        hint="mend it or take it out, then run the same command again",
    )


def _lacking(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return "no config.json"
    weights = first_file(folder, WEIGHTS)
    if weights is None or not shards_present(weights):
        return f"no weights ({' or '.join(WEIGHTS[:2])}, with all shards)"
    if not first_file(folder, _PIXELS):
        return f"no {_PIXELS[0]}"
    return None if first_file(folder, _TOKENIZERS) else f"no tokenizer ({' or '.join(_TOKENIZERS)})"


def _side(size: int | Mapping[str, int], name: str) -> int:
    """A side in pixels: older checkpoints give one number for all."""
    return int(size if isinstance(size, int) else size[name])
