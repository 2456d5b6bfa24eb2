"""The capture file, open for reading: a tensor is mapped from it when it is asked for, and nothing else is touched.

`load_capture` opens one. `plan` says what is in the dictionary, `file_format` how the file holds it.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.layout import newest_capture
from flux_ir.recording.file_format import Archive, StoredTensor
from flux_ir.recording.plan import ScaleOf, Shape, stored_sites, stored_tensor
from flux_ir.recording.recorder import check_step
from flux_ir.recording.stored_dtype import READ_AS, dequantised
from flux_ir.shapes import PackedLatent, Pooled, Tokens
from flux_ir.sites import Site, as_site, nearest_names


class CapturedStep(NamedTuple):
    """What a step began with, and where it went: state before it, pooled text, from and to flow time.

    More than the `StepContext` that a sink is given: times and guidance come from the capture's plan.
    """

    img: PackedLatent
    y: Pooled
    t_curr: float
    t_prev: float
    guidance: float
    txt_tokens: int


class StoredSite(NamedTuple):
    """Where the file holds one site at one step: the tensors of its values and, for float8, of their scales.

    `tokens` are the site's among those of the tensors: half of them, if the site is half of a single block.
    """

    values: StoredTensor
    scale: StoredTensor | None
    tokens: slice


class Capture:
    """A capture file, open for reading. Tensors are mapped from the file when they are asked for.

    Steps are numbered as the sampler numbered them, also where only some were kept.
    """

    def __init__(self, path: Path, archive: Archive) -> None:
        self.path = path
        self.archive, self._contents = archive, archive.contents
        self._context = self._contents["denoising_context"]
        self.metadata: dict[str, Any] = self._contents["metadata"]
        self.sites: list[Site] = stored_sites(self._contents)
        """What is stored of the transformer. The halves of a stored single block can be read as well."""
        self.text_sites: list[Site] = sorted(map(Site.parse, self._contents.get("text_sites", {})))
        """The layers of the text encoders that are stored: they are read without a step."""
        count = len(self._context["timestep_pairs"])
        # The original program keeps every step, and its files do not say which.
        self.steps: list[int] = list(self.metadata.get("captured_steps", range(count)))
        self._index = {step: index for index, step in enumerate(self.steps)}
        self._known = frozenset(self.sites)

    def __repr__(self) -> str:
        model, dtype = self.metadata["model"], str(self.dtype).removeprefix("torch.")
        sites = len(self.sites) + len(self.text_sites)
        return f"<capture of {model}: {sites} sites, steps {_listed(self.steps)}, {dtype}, {self.path}>"

    @property
    def dtype(self) -> torch.dtype:
        """What `read` gives: the dtype of the file, but bfloat16 for float8 with scales."""
        return READ_AS if "scales" in self._contents else self.stored_dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the sites' values in the file."""
        dtype: torch.dtype = self._stored((*self.sites, *self.text_sites)[0], 0).dtype
        return dtype

    @property
    def img_positions(self) -> Tensor | None:
        """The places on the image grid, row by row, of the image tokens that were kept: int32. None: all of them."""
        if "token_positions" not in self._contents:
            return None
        return self.archive.tensor(stored_tensor(self._contents, "token_positions", None))

    def shape(self, site: str | Site) -> Shape:
        """[batch, tokens, width] of one site, as at the first kept step."""
        site = as_site(site)
        batch, tokens, width = self._stored(site, 0).shape
        if site.per_prompt:
            return batch, tokens, width
        txt_tokens = self._context["txt_seq_len"][0]
        if site not in self._known:  # a half
            tokens = txt_tokens if site.stream == "txt" else tokens - txt_tokens
        return batch, tokens, width

    def read(self, site: str | Site, step: int | None = None) -> Tokens:
        """One site at one step: [batch, tokens, width], mapped from the file; float8 with scales becomes bfloat16.

        Layers of the text encoders (`t5.12`) have no step. Raises FluxIRError for a site or a step that was not
        captured.
        """
        return dequantised(*self.read_stored(site, step))

    def read_stored(self, site: str | Site, step: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The values as the file holds them, mapped from it, and the scales [batch, tokens] of float8 values."""
        stored = self.stored_site(as_site(site), step)
        values = self.archive.tensor(stored.values)[:, stored.tokens]
        return values, None if stored.scale is None else self.archive.tensor(stored.scale)[:, stored.tokens]

    def stored_site(self, site: Site, step: int | None) -> StoredSite:
        """Where the file holds one site at one step. Raises FluxIRError for a site or a step that was not captured."""
        check_step(site, step)
        if step is None:
            scale = stored_tensor(self._contents, ScaleOf(site), None) if "text_scales" in self._contents else None
            return StoredSite(self._stored(site, 0), scale, slice(None))
        index, scale = self._index_of(step), None
        values = self._stored(site, index)
        if "scales" in self._contents:
            stored = site if site in self._known else site.whole
            scale = stored_tensor(self._contents, ScaleOf(stored), index)
        return StoredSite(values, scale, self._tokens(site, index))

    def _stored(self, site: Site, index: int) -> StoredTensor:
        """What holds the site, or the single block it is half of. Raises FluxIRError if it was not captured."""
        stored = site if site in self._known else site.whole
        if stored not in self._known and site not in self.text_sites:
            sites = (*self.text_sites, *self.sites)
            raise FluxIRError(
                f"{site} was not captured in {self.path}, which holds {len(sites)} sites",
                hint=f"the nearest are {nearest_names(str(site), map(str, sites))}",
            )
        found: StoredTensor = stored_tensor(self._contents, stored, None if site.per_prompt else index)
        return found

    def _tokens(self, site: Site, index: int) -> slice:
        if site in self._known:
            return slice(None)
        txt_tokens = self._context["txt_seq_len"][index]
        return slice(txt_tokens) if site.stream == "txt" else slice(txt_tokens, None)

    def context(self, step: int) -> CapturedStep:
        """What one step began with."""
        index, stored = self._index_of(step), self._context
        img = self.archive.tensor(stored_tensor(self._contents, "img_state", index))
        y = self.archive.tensor(stored_tensor(self._contents, "y", index))
        t_curr, t_prev = stored["timestep_pairs"][index]
        return CapturedStep(img, y, t_curr, t_prev, float(stored["guidance"]), stored["txt_seq_len"][index])

    def check(self) -> None:
        """Raises FluxIRError unless there are sites, and as many tensors of each as there are steps."""
        lists = {part: self._context[part] for part in ("img_state", "y", "txt_seq_len", "timestep_pairs")}
        for group in ("double_blocks", "single_blocks", "sites", "scales"):
            lists |= {f"{group}.{name}": values for name, values in self._contents.get(group, {}).items()}
        wrong = {name: len(values) for name, values in lists.items() if len(values) != len(self.steps)}
        if wrong or not (self.sites or self.text_sites) or not self.steps:
            raise FluxIRError(
                f"{self.path} must hold one tensor per site and step: got {len(self.sites)} sites, "
                f"{len(self.steps)} steps, and other lengths of {wrong or 'nothing'}",
                hint="the file was not written by a finished capture: capture again",
            )

    def _index_of(self, step: int) -> int:
        if step not in self._index:
            raise FluxIRError(
                f"step {step} was not captured in {self.path}", hint=f"it holds the steps {_listed(self.steps)}"
            )
        return self._index[step]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 12 else f"{steps[0]} ... {steps[-1]} ({len(steps)} of them)"


def load_capture(path: Path | str) -> Capture:
    """Open a capture: the file itself, or the folder of its run (where there are several, the newest).

    Raises FluxIRError for a file that is missing, broken, or no capture.
    """
    file = newest_capture(Path(path)) if Path(path).is_dir() else Path(path)
    try:
        capture = Capture(file, Archive(file))
        capture.check()
    except OSError as error:
        hint = "name a file called capture_*.pt, or the folder of a run, such as output/GENERATION_ID"
        raise FluxIRError(f"cannot read the capture {file}: {error.strerror}", hint=hint) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        hint = "it is cut short or was never a capture: capture again"
        raise FluxIRError(f"{file} is not a complete capture file: {error}", hint=hint) from error
    except (KeyError, TypeError, AttributeError) as error:
        hint = "name a file called capture_*.pt, or the folder of a run"
        raise FluxIRError(f"{file} is a file of PyTorch, but no capture ({error!r})", hint=hint) from error
    return capture
