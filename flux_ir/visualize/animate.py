"""GIF and MP4, written one frame at a time: a film of any length takes the memory of a few frames.

Pillow keeps every frame of a GIF until the last has come, so here it writes one GIF per frame, and of all but the first
only the frame is kept. MP4 goes through the ffmpeg that comes with imageio-ffmpeg.
"""

import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO

import imageio_ffmpeg
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.visualize.palette import Palette

_LOOP_FOR_EVER = b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"
_END_OF_GIF = b";"


def write_gif(frames: Iterable[Image.Image], palette: Palette, path: Path, fps: float) -> int:
    """Write a GIF that loops for ever, and give the number of its frames. All frames have one size.

    Raises FluxIRError if there is none.
    """
    count = 0
    with complete_file(path) as beside, beside.open("wb") as file:
        for frame, delay in zip(frames, delays(fps)):  # noqa: B905 (delays never end)
            alone = _gif_of_one(palette.apply(frame), delay)
            file.write(alone[: -len(_END_OF_GIF)] if count == 0 else alone[_header_bytes(alone) : -len(_END_OF_GIF)])
            count += 1
        if count == 0:
            raise _nothing_to_show()
        file.write(_END_OF_GIF)
    return count


def delays(fps: float) -> Iterator[int]:
    """How long each frame of a GIF is shown, in its unit of 10 ms: rounded so that no error adds up over the film."""
    shown_until = 0
    for frame in range(1, 2**63):
        until = round(100 * frame / fps)
        yield until - shown_until
        shown_until = until


def write_mp4(frames: Iterable[Image.Image], path: Path, fps: float) -> int:
    """Write H.264 that browsers and QuickTime play, and give the number of its frames. All frames have one size.

    Odd sizes get one more row or column of black, since 4:2:0 colour needs even ones. Raises FluxIRError if there is no
    frame, or if ffmpeg fails.
    """
    count = 0
    coming = iter(frames)
    first = next(coming, None)
    if first is None:
        raise _nothing_to_show()
    width, height = first.width + first.width % 2, first.height + first.height % 2
    with complete_file(path) as beside, _ffmpeg((width, height), fps, beside) as pixels:
        frame: Image.Image | None = first
        while frame is not None:
            pixels.write(frame.crop((0, 0, width, height)).tobytes())
            count += 1
            frame = next(coming, None)
    return count


@contextmanager
def _ffmpeg(size_px: tuple[int, int], fps: float, path: Path) -> Iterator[IO[bytes]]:
    """A pipe that takes RGB frames. At the end the file is complete; on any exception ffmpeg is stopped."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            _ffmpeg_command(size_px, fps, path),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C is for us: ffmpeg would stop by itself, and call what it has a film
        )
        assert process.stdin is not None
        ended_early = False
        try:
            try:
                yield process.stdin
                process.stdin.close()
            except BrokenPipeError:
                ended_early = True  # its last words say why
            if process.wait() != 0 or ended_early:
                complaints.seek(0)
                raise _ffmpeg_failed(path, complaints.read().decode(errors="replace"))
        finally:
            process.kill()
            process.wait()


def _ffmpeg_command(size_px: tuple[int, int], fps: float, path: Path) -> list[str]:
    width, height = size_px
    rate = str(Fraction(fps).limit_denominator(100_000))
    # sRGB pixels to BT.709, and tagged so: players guess by the size otherwise, and reds turn out orange.
    # As a filter: newer versions of ffmpeg take the tags of the frames and leave out what only the encoder was told.
    colour = "scale=out_color_matrix=bt709:out_range=tv"
    tags = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"
    return [
        *(_ffmpeg_program(), "-v", "error", "-y"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", rate, "-i", "-"),
        *("-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p"),
        *("-vf", f"{colour},{tags}"),
        *("-movflags", "+faststart", "-f", "mp4", str(path)),  # the name ends in .partial, so the format is said
    ]


def _ffmpeg_program() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise FluxIRError(
            "an MP4 needs ffmpeg: none is installed",
            hint="name one with IMAGEIO_FFMPEG_EXE, or use --output_format gif",
        ) from error


def _ffmpeg_failed(path: Path, complaints: str) -> FluxIRError:
    last = complaints.strip().splitlines()[-1:] or ["it gave no reason"]
    return FluxIRError(
        f"ffmpeg could not write {path.with_suffix('')}: {last[0]}",
        hint="free some space if the disk is full; --output_format gif does without ffmpeg",
    )


def _gif_of_one(indexed: Image.Image, delay: int) -> bytes:
    """A whole GIF with one frame, shown for `delay` times 10 ms and then left in place: the next covers it whole."""
    file = BytesIO()
    indexed.save(file, "GIF", optimize=False, interlace=0, loop=0, duration=10 * delay, disposal=1)
    return file.getvalue()


def _header_bytes(gif: bytes) -> int:
    """How long everything is that stands before the first frame: size, palette, and that the film loops for ever."""
    # Pillow writes header and screen (6 + 7 bytes), the palette padded to a power of two, and the loop, in this order;
    # frames after the first do without, and so share the palette of the first.
    colour_bits = (gif[10] & 0b111) + 1
    return 13 + 3 * 2**colour_bits + len(_LOOP_FOR_EVER)


def _nothing_to_show() -> FluxIRError:
    return FluxIRError("a film needs at least one frame: every picture was left out", hint="decode the capture again")
