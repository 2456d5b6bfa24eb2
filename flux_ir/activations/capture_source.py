"""Captures as training data: a collection of any size, finished or not, or files that belong together."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from flux_ir.activations.alike import Alike
from flux_ir.activations.capture_file import CaptureFile
from flux_ir.activations.capture_rows import Generations, Row, rows_of
from flux_ir.activations.open_file import CAN_READ
from flux_ir.activations.token_blocks import Generation, TokenBlock, leading_txt, token_positions
from flux_ir.errors import FluxIRError
from flux_ir.recording.store import Capture, load_capture
from flux_ir.sites import Site

# Brings a file of a collection that is elsewhere, by its name: its local path.
Fetch = Callable[[str], Path]

_OPEN_FILES = 8  # at once, in each way of reading: readers take all they want of a file before the next
_FILES_SOON = 128  # announced and not read yet: more than any reader announces (`sae.chunks`)

_F = TypeVar("_F")


class _Layout(NamedTuple):
    """What captures of one source have in common."""

    model: str | None
    sites: list[Site]
    steps: list[int]
    widths: dict[Site, int]
    tokens: dict[Site, int]


class CaptureSource:
    """Activations in capture files, opened when they are read. A few stay open, mapped."""

    def __init__(self, root: Path, rows: Sequence[Row], *, fetch: Fetch | None = None) -> None:
        self._root, self._rows, self._fetch = root, rows, fetch
        # joining paths by pathlib costs more than opening a file
        self._folder = "" if root == Path() else f"{root}{os.sep}"
        self._open: OrderedDict[int, Capture] = OrderedDict()
        self._files: OrderedDict[int, CaptureFile] = OrderedDict()
        self._soon: OrderedDict[int, CaptureFile] = OrderedDict()
        self._lock = Lock()
        self._first = self._capture(0)
        self._alike = Alike(self._first)
        layout = _layout(self._first)
        self.sites: list[Site] = layout.sites
        self.steps: list[int] = layout.steps
        self.model: str | None = layout.model
        self.generations: Sequence[Generation] = Generations(root, rows)

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> "CaptureSource":
        """The captures in these files, in their order. All are opened once: they must fit together."""
        first: tuple[Path, _Layout] | None = None
        rows = []
        for file in files:
            capture = load_capture(file)
            layout, metadata = _layout(capture), capture.metadata
            first = first or (file, layout)
            _check_same(*first, file, layout)
            name = metadata.get("generation_id") or file.stem
            rows.append(Row(name, metadata.get("prompt") or "", str(file), metadata.get("used_txt")))
        return cls(Path(), rows)

    @classmethod
    def of_collection(cls, folder: Path, *, fetch: Fetch | None = None) -> "CaptureSource":
        """The generations of a collection that are finished. With `fetch` the folder holds its indexes alone."""
        rows = rows_of(folder)
        if not rows:
            raise FluxIRError(
                f"the collection {folder} holds no finished generation yet",
                hint="let flux-ir collect go on for a while",
            )
        return cls(folder, rows, fetch=fetch)

    def d(self, site: Site | None) -> int:
        """The width of a site."""
        return self._shape(site)[2]

    def tokens(self, site: Site | None) -> int:
        """Tokens of a site per generation and step."""
        return self._shape(site)[1]

    def read(self, generation_index: int, site: Site | None, step: int) -> TokenBlock:
        """One block, mapped from its file."""
        site, row, capture = _named(site), self._rows[generation_index], self._capture(generation_index)
        if capture.shape(site) != self._shape(site):
            raise FluxIRError(
                f"all captures must have the same sizes: {site} is {list(capture.shape(site))} in {capture.path} and "
                f"{list(self._shape(site))} in {self.generations[0].path}",
                hint="keep captures of different sizes in different folders",
            )
        values, scale = capture.read_stored(site, step)
        txt_tokens = capture.context(step).txt_tokens
        return TokenBlock(
            values=values[0],
            scale=None if scale is None else scale[0],
            site=site,
            step=step,
            generation=row.id,
            prompt=row.prompt,
            positions=token_positions(site, txt_tokens, capture.img_positions, values.shape[1]),
            txt_tokens=leading_txt(site, txt_tokens),
            used_txt=row.used_txt,
        )

    def announce(self, generation_index: int, sites: Sequence[Site | None], step: int, *, again: bool = False) -> None:
        """These will be read soon: they begin to be fetched from the disk. Remote files are left alone."""
        if self._fetch is not None:
            return
        with self._lock:
            file = self._files.pop(generation_index, None) or self._soon.get(generation_index)
        file = file or self._opened(generation_index)
        if file is not None:
            _keep(self._soon, generation_index, file, _FILES_SOON, self._lock)
            self._alike.announce(file, [_named(site) for site in sites], step, again=again)

    def forget(self) -> None:
        """What was announced and not read yet will not be."""
        with self._lock:
            self._soon.clear()

    def read_together(self, generation_index: int, sites: Sequence[Site | None], step: int) -> list[TokenBlock]:
        """One block for each site, all read into memory at once. May be called by several threads."""
        row, file = self._rows[generation_index], self._file(generation_index)
        alike = file is not None and self._alike.is_like(file)
        read = self._alike.read(file, [_named(site) for site in sites], step) if file is not None and alike else None
        if read is None:
            return [self.read(generation_index, site, step) for site in sites]
        return [
            TokenBlock(
                values=one.values,
                scale=one.scale,
                site=site,
                step=step,
                generation=row.id,
                prompt=row.prompt,
                positions=one.positions,
                txt_tokens=one.txt_tokens,
                used_txt=row.used_txt,
            )
            for site, one in zip(sites, read, strict=True)
        ]

    def _shape(self, site: Site | None) -> tuple[int, ...]:
        return self._first.shape(_named(site))

    def _local(self, path: str) -> Path:
        return self._root / path if self._fetch is None else self._fetch(path)

    def _capture(self, index: int) -> Capture:
        with self._lock:
            found = self._open.get(index)
        if found is None:
            found = load_capture(self._local(self._rows[index].path))
        _keep(self._open, index, found, _OPEN_FILES, self._lock)
        return found

    def _file(self, index: int) -> CaptureFile | None:
        """A file to read from without mapping it; None: it cannot be opened."""
        with self._lock:
            file = self._files.get(index) or self._soon.pop(index, None)
        file = file or self._opened(index)
        if file is not None:
            _keep(self._files, index, file, _OPEN_FILES, self._lock)
        return file

    def _opened(self, index: int) -> CaptureFile | None:
        if not CAN_READ:
            return None
        name = self._rows[index].path
        return self._alike.opened(self._folder + name if self._fetch is None else str(self._fetch(name)))


def _keep(files: OrderedDict[int, _F], index: int, file: _F, most: int, lock: Lock) -> None:
    """As the one used last. What was used longest ago goes."""
    with lock:
        files[index] = file
        files.move_to_end(index)
        while len(files) > most:
            files.popitem(last=False)


def _named(site: Site | None) -> Site:
    if site is None:
        raise FluxIRError("captures are read by site: got None", hint="name a site such as double.18.img")
    return site


def _layout(capture: Capture) -> _Layout:
    shapes = {site: capture.shape(site) for site in capture.sites}
    batch = max(shape[0] for shape in shapes.values())
    if batch != 1:
        raise FluxIRError(
            f"a capture to train on holds one picture: {capture.path} holds {batch}", hint="capture them one by one"
        )
    return _Layout(
        model=capture.metadata.get("model"),
        sites=list(capture.sites),
        steps=list(capture.steps),
        widths={site: shape[2] for site, shape in shapes.items()},
        tokens={site: shape[1] for site, shape in shapes.items()},
    )


def _check_same(first: Path, expected: _Layout, file: Path, found: _Layout) -> None:
    """Raises FluxIRError for the first thing in which a capture differs from the first one."""
    for word, one, other in zip(_Layout._fields, expected, found, strict=True):
        if one != other:
            raise FluxIRError(
                f"all captures of a folder must have the same {word}: {file} has {_short(other)}, {first} has "
                f"{_short(one)}",
                hint="keep different captures in different folders",
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = sorted(set(value.values()))
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value[:4])) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
