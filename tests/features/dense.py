"""Parts of scores made of dense activations, as the scoring pass would have left them."""

from itertools import pairwise

import numpy as np

from flux_ir.features.contents import ScorePart


def part_of(activations, start, steps, positions):
    """One part of activations [images, steps, tokens, d_sae]; the step numbers are `steps`."""
    n, _, tokens, _ = activations.shape
    image, step, token, feature = np.nonzero(activations)
    place = step * tokens + token
    order = np.lexsort((place, feature, image))
    image, place, feature = image[order], place[order], feature[order]
    value = activations[image, place // tokens, place % tokens, feature].astype(np.float32)
    first = np.flatnonzero(np.diff(image * 10**6 + feature, prepend=-1))
    row_ptr = np.append(first, len(image)).astype(np.int64)
    best = [lo + int(np.argmax(value[lo:hi])) for lo, hi in pairwise(row_ptr)]
    largest = np.array(best, np.int64)
    everything = activations.shape[1] * tokens
    return ScorePart(
        images=range(start, start + n),
        steps=steps,
        image_ptr=np.searchsorted(image[first], np.arange(n + 1)).astype(np.int64),
        feature=feature[first].astype(np.uint16),
        max=value[largest],
        mean=(np.add.reduceat(value, first) / everything).astype(np.float32) if len(first) else value,
        at_token=(place[largest] % tokens).astype(np.int32),
        at_step=np.array(steps)[place[largest] // tokens].astype(np.int16),
        row_ptr=row_ptr,
        place=place.astype(np.int32),
        value=value,
        error=np.zeros((n, len(steps), tokens), np.float32),
        norm=np.zeros((n, len(steps), tokens), np.float32),
        positions=np.broadcast_to(np.arange(tokens, dtype=np.int32), (n, tokens)) if positions is None else positions,
        centred=np.zeros((len(steps), 1)),
    )


def parts_of(activations, *, part=3, steps=None, positions=None):
    """A reader of all parts, each of so many images. Fewer axes than [images, steps, tokens, d_sae] lack the middle."""
    dense = np.asarray(activations)
    while dense.ndim < 4:
        dense = dense[:, None]
    steps = tuple(range(dense.shape[1])) if steps is None else steps

    def read():
        for start in range(0, len(dense), part):
            own = None if positions is None else positions[start : start + part]
            yield part_of(dense[start : start + part], start, steps, own)

    return read
