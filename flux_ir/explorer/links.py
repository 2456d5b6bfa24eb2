"""How the page finds its pictures: as files beside it, or as text inside it.

An address in the page's JSON is a relative URL, or `#id` of an element whose text is the picture in base64.
"""

import os
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from flux_ir.explorer.data import Lens, Run
from flux_ir.layout import complete_file

CELL = "{kind}_block_{block}"  # filled in by the page's script, like {step}


class Beside:
    """Relative links to the run folders, and thumbnails in a folder named after the page."""

    def __init__(self, target: Path) -> None:
        self.page_folder = target.parent
        self.files = target.with_name(f"{target.stem}_files")
        self.written: set[Path] = set()

    def picture(self, run: Run) -> str | None:
        """The address of the finished picture, if it is still there."""
        path = run.folder.image()
        return self._url(path) if path.exists() else None

    def pictures(self, run: Run, lens: Lens) -> str:
        """A pattern for the addresses of all decoded pictures."""
        return f"{self._url(run.folder.decoded(lens))}/step_{{step}}/{CELL}.jpg"

    def band(self, run: Run, lens: Lens, index: int, jpeg: bytes) -> str:
        """Store one band of thumbnails, and give its address."""
        path = self.files / f"{run.folder.generation_id}_{lens}_{index}.jpg"
        with complete_file(path) as beside:
            beside.write_bytes(jpeg)
        self.written.add(path)
        return self._url(path)

    def first(self) -> Iterator[str]:
        """Elements that the page needs before it can draw anything: none."""
        yield from ()

    def rest(self) -> Iterator[str]:
        """Elements that can wait until the page is drawn: none."""
        yield from ()

    def remove_stale(self) -> None:
        """Delete the thumbnails of an earlier page of this name that the new one does not use."""
        pattern = "[0-9a-f]" * 8 + "_*_*.jpg"
        for path in set(self.files.glob(pattern)) - self.written:
            path.unlink()

    def _url(self, path: Path) -> str:
        return quote(Path(os.path.relpath(path, self.page_folder)).as_posix())


class Inside:
    """Every picture inside the page: one file to send, as large as all of them and a third more."""

    def __init__(self) -> None:
        self.early: list[tuple[str, bytes]] = []
        self.late: list[tuple[Run, Lens]] = []

    def picture(self, run: Run) -> str | None:
        path = run.folder.image()
        return self._early(run.folder.generation_id, path.read_bytes()) if path.exists() else None

    def pictures(self, run: Run, lens: Lens) -> str:
        self.late.append((run, lens))
        return f"#{run.folder.generation_id}_{lens}_step_{{step}}_{CELL}"

    def band(self, run: Run, lens: Lens, index: int, jpeg: bytes) -> str:
        return self._early(f"{run.folder.generation_id}_{lens}_{index}", jpeg)

    def first(self) -> Iterator[str]:
        """The thumbnails and the finished pictures."""
        for name, jpeg in self.early:
            yield _element(name, jpeg)

    def rest(self) -> Iterator[str]:
        """The decoded pictures, read one at a time."""
        for run, lens in self.late:
            for (block, step), path in run.pictures[lens].items():
                cell = CELL.format(kind=block.kind, block=block.number)
                yield _element(f"{run.folder.generation_id}_{lens}_step_{step}_{cell}", path.read_bytes())

    def _early(self, name: str, jpeg: bytes) -> str:
        self.early.append((name, jpeg))
        return f"#{name}"


Links = Beside | Inside


def _element(name: str, jpeg: bytes) -> str:
    return f'<script type="text/plain" id="{name}">{b64encode(jpeg).decode("ascii")}</script>\n'
