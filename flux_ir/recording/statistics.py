"""What a site's values are like, gathered while they are collected: mean, second moment, norms, outlier dimensions.

Everything is summed in float64 by NumPy, row by row, so that neither threads nor processes change a bit of a result:
sums over the same files in the same order are the same. The values are those a reader of the files gets.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.recording.stored_dtype import dequantised

OUTLIER_RATIO = 6.0
"""An outlier dimension has a root mean square of more than so many times the median dimension's (compare Dettmers et
al., 2022, LLM.int8(), whose outliers are values of 6 and more)."""

_CACHED_VALUES = 2**15  # summed at once, so that they stay in the cache; it is part of the order of the sums
_SUMS = ("count", "sum", "sum_of_squares", "sum_of_norms", "max_abs")


class SiteStatistics:
    """Sums over the tokens of one site at one step; `d` is the site's width."""

    def __init__(self, d: int) -> None:
        self.d = d
        self.count = 0
        self.sum: NDArray[np.float64] = np.zeros(d)
        self.sum_of_squares: NDArray[np.float64] = np.zeros(d)
        self.sum_of_norms = 0.0
        self.max_abs: NDArray[np.float32] = np.zeros(d, np.float32)

    def add(self, values: Tensor, scale: Tensor | None = None) -> None:
        """Count tokens [..., d] as a file holds them, with their scales [...] where they have such."""
        read = dequantised(values, scale).detach().cpu().reshape(-1, self.d)
        rows = max(1, _CACHED_VALUES // self.d)
        for first in range(0, len(read), rows):
            self._add(read[first : first + rows].double().numpy())

    def _add(self, tokens: NDArray[np.float64]) -> None:
        squares = tokens * tokens
        self.count += len(tokens)
        self.sum += tokens.sum(0)
        self.sum_of_squares += squares.sum(0)
        self.sum_of_norms += float(np.sqrt(squares.sum(1)).sum())
        self.max_abs = np.maximum(self.max_abs, np.sqrt(squares.max(0)).astype(np.float32))

    def merge(self, other: "SiteStatistics") -> None:
        """Count what `other` has counted, too. Sums are rounded, so the order of merging is part of the result."""
        self.count += other.count
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares
        self.sum_of_norms += other.sum_of_norms
        self.max_abs = np.maximum(self.max_abs, other.max_abs)

    @property
    def mean(self) -> Tensor:
        """[d], float64."""
        return torch.from_numpy(self.sum / self._tokens)

    @property
    def second_moment(self) -> Tensor:
        """The mean square of each dimension: [d], float64."""
        return torch.from_numpy(self.sum_of_squares / self._tokens)

    @property
    def mean_norm(self) -> float:
        """The mean length of a token."""
        return self.sum_of_norms / self._tokens

    @property
    def outlier_dims(self) -> Tensor:
        """The dimensions that are larger than the others: root mean square above 6 times the median one's. int64."""
        rms = self.second_moment.sqrt()
        return (rms > OUTLIER_RATIO * rms.median()).nonzero().flatten()

    def sums(self, prefix: str) -> dict[str, Tensor]:
        """The sums as tensors under `{prefix}/{name}`: all is read again from them."""
        sums: dict[str, Tensor] = {
            "count": torch.tensor(self.count),
            "sum": torch.from_numpy(self.sum.copy()),
            "sum_of_squares": torch.from_numpy(self.sum_of_squares.copy()),
            "sum_of_norms": torch.tensor(self.sum_of_norms, dtype=torch.float64),
            "max_abs": torch.from_numpy(self.max_abs.copy()),
        }
        return {f"{prefix}/{name}": tensor for name, tensor in sums.items()}

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """The sums, and what they say, likewise."""
        said = {
            "mean": self.mean,
            "second_moment": self.second_moment,
            "mean_norm": torch.tensor(self.mean_norm, dtype=torch.float64),
            "outlier_dims": self.outlier_dims,
        }
        return self.sums(prefix) | {f"{prefix}/{name}": tensor for name, tensor in said.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> "SiteStatistics":
        """What `sums` or `to_tensors` gave. Raises KeyError if it is not there."""
        count, total, squares, norms, largest = (tensors[f"{prefix}/{name}"] for name in _SUMS)
        read = cls(len(total))
        read.count, read.sum_of_norms = int(count), float(norms)
        read.sum, read.sum_of_squares = total.numpy().copy(), squares.numpy().copy()
        read.max_abs = largest.numpy().copy()
        return read

    @property
    def _tokens(self) -> int:
        return max(self.count, 1)  # of no tokens, everything is zero


def write_statistics(path: Path, statistics: Mapping[str, SiteStatistics]) -> None:
    """Write `stats.safetensors`: what stands under `{site}/step_{s}` becomes tensors `{site}/step_{s}/{name}`."""
    tensors: dict[str, Tensor] = {}
    for prefix, sums in sorted(statistics.items()):
        tensors |= sums.to_tensors(prefix)
    with complete_file(path) as beside:
        beside.write_bytes(save(tensors))


def read_statistics(path: Path) -> dict[str, SiteStatistics]:
    """What `write_statistics` wrote. Raises FluxIRError for a file that is missing or something else."""
    try:
        tensors = load_file(path)
        prefixes = sorted({name.rpartition("/")[0] for name in tensors})
        return {prefix: SiteStatistics.from_tensors(tensors, prefix) for prefix in prefixes}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FluxIRError(
            f"{path} holds no statistics of a collection: {error}",
            hint="it is the stats.safetensors that the collection wrote",
        ) from error
