"""Reading decoded pictures, one at a time: a missing or broken one stops the work, or is left out and remembered."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from flux_ir.errors import FluxIRError

_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on a damaged file


class PictureReader:
    """Opens pictures. `left_out` says why for each that could not be read: only filled with `skip_broken`."""

    def __init__(self, *, skip_broken: bool) -> None:
        self.skip_broken = skip_broken
        self.left_out: dict[Path, str] = {}

    def check_present(self, path: Path) -> bool:
        """Whether the file is there, without opening it. Raises FluxIRError if not, unless such files are skipped."""
        if path not in self.left_out and not path.is_file():
            self._leave_out(path, "it is missing")
        return path not in self.left_out

    def read(
        self, path: Path, *, size_px: tuple[int, int] | None = None, draft_px: int | None = None
    ) -> Image.Image | None:
        """The picture in RGB, or None if it is left out. Raises FluxIRError naming the file, unless such are skipped.

        `size_px` is the size it must have, if any. With `draft_px` it may be smaller, though at least that wide and
        high where it is: a JPEG decodes several times faster at an eighth of its size.
        """
        if path in self.left_out:
            return None
        try:
            with Image.open(path) as picture:
                if size_px is not None and picture.size != size_px:
                    found, wanted = (f"{width} x {height} px" for width, height in (picture.size, size_px))
                    raise ValueError(f"it is {found}, the others are {wanted}")
                if draft_px is not None:
                    picture.draft("RGB", (draft_px, draft_px))
                return picture.convert("RGB")
        except FileNotFoundError:
            self._leave_out(path, "it is missing")
        except UnidentifiedImageError:
            self._leave_out(path, "it is not a picture")
        except _BROKEN as error:
            self._leave_out(path, str(error) or type(error).__name__)
        return None

    def _leave_out(self, path: Path, reason: str) -> None:
        if not self.skip_broken:
            raise FluxIRError(
                f"cannot show {path}: {reason}",
                hint="decode the capture again with flux-ir lens, or go on without it with --skip_broken",
            )
        self.left_out[path] = reason
