"""Features over their pictures, from stored maps: overlays one by one, and the lines of contact sheets.

What is drawn on pixels, and the colours, are in `visualize`. All pictures of a feature have one scale: that of its
strongest examples, so it is the same in whichever of its pictures is drawn, and however many of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux_ir.features.embeddings import open_picture
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.selection import Selection
from flux_ir.sites import Stream
from flux_ir.visualize.feature_sheet import FeatureLine, SheetPicture, number_lines
from flux_ir.visualize.heatmap import OPACITY, overlay, scale_top


def values_of(folder: FeatureFolder, feature: int, image: int, step: int | None = None) -> NDArray[np.float32]:
    """The activation of a feature on an image, [rows, columns], 0 where no token was kept.

    At one step (the sampler's number), or the largest over all steps.
    """
    maps = np.nan_to_num(folder.map(feature, image))
    return maps.max(axis=0) if step is None else maps[folder.steps.index(step)]


def scale_of(folder: FeatureFolder, feature: int, percentile: float = 100.0) -> float | None:
    """The value with the strongest colour in all pictures of a feature: a percentile of the values above 0 in its maps
    on its strongest images, by default the largest. None for a dead feature.
    """
    images = folder.examples().top[feature]
    maps = [values_of(folder, feature, image).ravel() for image in images[images >= 0].tolist()]
    return scale_top(np.concatenate(maps), percentile) if maps else None


def draw_overlay(
    folder: FeatureFolder,
    feature: int,
    image: int,
    *,
    top: float | None = None,
    step: int | None = None,
    smooth: bool = False,
    opacity: float = OPACITY,
) -> Image.Image:
    """The picture of a generation with a feature over it. `top` None is `scale_of` the feature.

    Raises FluxIRError for a generation without a picture.
    """
    picture, values = open_picture(folder, image), values_of(folder, feature, image, step)
    top = scale_of(folder, feature) if top is None else top
    return picture if top is None else overlay(picture, values, top, smooth=smooth, opacity=opacity)


def sheet_line(
    folder: FeatureFolder,
    feature: int,
    examples: int,
    *,
    percentile: float = 100.0,
    label: str = "",
    selection: Selection | None = None,
    images: Sequence[int] | None = None,
    more: Sequence[SheetPicture] = (),
) -> FeatureLine:
    """The line of a feature on a contact sheet: its numbers, and its `examples` strongest images, or these `images`.

    `more` are pictures to the right of them. Raises FluxIRError for a generation without a picture.
    """
    table = folder.examples()
    chosen = [image for image in table.top[feature].tolist() if image >= 0] if images is None else list(images)
    strength = dict(zip(table.top[feature].tolist(), table.top_value[feature].tolist(), strict=True))
    cells = []
    for image in chosen[:examples]:
        values = values_of(folder, feature, image)
        value = strength.get(image, float(values.max()))
        cells.append(SheetPicture(open_picture(folder, image), values, f"{value:.3g}", folder.images[image].prompt))
    cells += [SheetPicture(None, None, "", "")] * (examples - len(cells))
    numbers = feature_numbers(folder, feature, selection)
    top = scale_of(folder, feature, percentile)
    return FeatureLine(f"feature {feature}", label, numbers, top, [*cells, *more])


def feature_numbers(
    folder: FeatureFolder, feature: int, selection: Selection | None = None, stream: Stream = "img"
) -> list[str]:
    """The numbers of a feature on its sheet: those of the table, and those of the selection that were computed."""
    table = folder.table(stream)
    images = 100 * float(table.images[feature]) / folder.settings.images
    numbers = [("on", images, f"% of images, {100 * float(table.frequency[feature]):.2g}% of tokens")]
    numbers += [("mean when active", float(table.mean_active[feature]), "")]
    if selection is not None:
        selected: Mapping[str, Any] = {
            name: float(selection.column(stream, name)[feature])
            for name in ("coherence", "coherence_q", "stability", "effect")
        }
        tested = f" (q {selected['coherence_q']:.2g})" if selected["coherence_q"] == selected["coherence_q"] else ""
        numbers += [("coherence", selected["coherence"], tested)]
        numbers += [("stability", selected["stability"], ""), ("effect", selected["effect"], "")]
    return number_lines(numbers)
