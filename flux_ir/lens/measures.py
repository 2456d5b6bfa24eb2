"""Numbers beside the pictures: how far each block's answer is from the final one. float32 or better throughout."""

import math

import numpy as np
from torch import Tensor

from flux_ir.shapes import Pixels

EPSILON = 1e-12


def cosine(of: Tensor, to: Tensor) -> float:
    """Cosine of the angle between two tensors, taken as one long vector each."""
    a, b = of.double().flatten(), to.double().flatten()
    return (a @ b / (a.norm() * b.norm()).clamp_min(EPSILON)).item()


def relative_distance(of: Tensor, to: Tensor) -> float:
    """||of - to|| / ||to||: 0 where they are equal, 1 where `of` is as far off as zero would be."""
    a, b = of.double().flatten(), to.double().flatten()
    return ((a - b).norm() / b.norm().clamp_min(EPSILON)).item()


def psnr_db(of: Pixels, to: Pixels) -> float | None:
    """Peak signal-to-noise ratio [dB] between pictures of bytes; None for equal ones, whose ratio is infinite."""
    # In numpy, which keeps to one core: the others are decoding meanwhile.
    mean_squared_error = float(np.square(np.subtract(of.numpy(), to.numpy(), dtype=np.float64)).mean())
    return None if mean_squared_error == 0 else 10 * math.log10(255**2 / mean_squared_error)


def json_number(value: float | None) -> float | str | None:
    """`value` rounded to six digits for a JSON file, which has no number for infinity or NaN: these are told as text.

    None, which stands for what was not measured or for the ratio of equal pictures, stays apart from them.
    """
    if value is None or math.isfinite(value):
        return None if value is None else float(f"{value:.6g}")
    return str(value)
