"""Seconds per 100 frames and peak memory of our GIF and MP4 writers, beside imageio's plain `mimsave` of the same film.

    uv run python benchmarks/animate_speed.py [--side_px 1024] [--frames 100] [--repeats 3]

Both sides read the same decoded pictures and draw the same captions, in the same run and by turns; each measurement is
a process of its own, so that its peak memory is its own. ffmpeg's memory is counted in: where the writer takes more
than ffmpeg does, too high, for the system counts a program it starts as no smaller than the one that started it. At the
end, films of one, two and four times the length show whether memory grows with it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from flux_ir.commands.report import peak_host_bytes
from flux_ir.visualize.animate import write_gif, write_mp4
from flux_ir.visualize.film import Film
from flux_ir.visualize.frames import Cell, Frame
from flux_ir.visualize.palette import film_palette, thumbnail_side
from flux_ir.visualize.pictures import PictureReader

FPS = 2.0
WAYS = ("ours", "mimsave")
FORMATS = ("gif", "mp4")


def main() -> None:
    """Print one line per writer and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side_px", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "FORMAT", "FOLDER", "FRAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, suffix, folder, frames = options.measure
        print(json.dumps(measure(way, suffix, Path(folder), int(frames))))
        return
    from measure import machine  # loads torch, which would count among what is measured

    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), options.side_px, options.frames)
        compare(Path(folder), options.frames, options.repeats)


def compare(folder: Path, frames: int, repeats: int) -> None:
    """Measure by turns, print medians and ratios, then memory at two lengths."""
    print(f"{'':<12}{'s per 100 frames':>18}{'peak memory':>14}{'file':>10}")
    for suffix in FORMATS:
        results = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                results[way].append(run(way, suffix, folder, frames))
        seconds = {way: statistics.median(result["seconds"] for result in results[way]) for way in WAYS}
        for way in WAYS:
            last = results[way][-1]
            print(
                f"{way + ' ' + suffix:<12}{100 * seconds[way] / frames:>18.2f}"
                f"{last['peak_bytes'] / 1e6:>11.0f} MB{last['file_bytes'] / 1e6:>7.1f} MB"
            )
        print(f"{suffix}: ours takes {seconds['ours'] / seconds['mimsave']:.2f} of mimsave's time")
    for suffix in FORMATS:
        peaks = {count: run("ours", suffix, folder, count)["peak_bytes"] for count in (frames, 2 * frames, 4 * frames)}
        print(f"{suffix}: " + ", ".join(f"{count} frames {peak / 1e6:.0f} MB" for count, peak in peaks.items()))


def run(way: str, suffix: str, folder: Path, frames: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", way, suffix, str(folder), str(frames)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(way: str, suffix: str, folder: Path, count: int) -> dict[str, float]:
    """Time from the decoded pictures to the finished film [s], and memory of this process and of ffmpeg [bytes]."""
    target = folder / f"{way}.{suffix}"
    write = write_ours if way == "ours" else write_with_mimsave
    if way == "mimsave":
        import imageio.v2  # noqa: F401 (loading it is not what is timed)
    pictures = len(list(folder.glob("*.jpg")))
    frames = [
        Frame(Cell(index // 57, "single", index % 57), (folder / f"{index % pictures}.jpg",)) for index in range(count)
    ]
    start = time.perf_counter()
    write(Film(frames, PictureReader(skip_broken=False), font_size=24), target)
    seconds = time.perf_counter() - start
    peak = (peak_host_bytes() or 0) + 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "peak_bytes": peak, "file_bytes": target.stat().st_size}


def write_ours(film: Film, target: Path) -> None:
    """What `flux-ir visualize` does."""
    if target.suffix == ".gif":
        write_gif(film, film_palette(film.thumbnails(thumbnail_side(len(film)))), target, FPS)
    else:
        write_mp4(film, target, FPS)


def write_with_mimsave(film: Film, target: Path) -> None:
    """The short way: all frames in a list, and one call."""
    import imageio.v2 as imageio
    import numpy as np

    frames = [np.asarray(frame) for frame in film]
    if target.suffix == ".gif":
        imageio.mimsave(target, frames, duration=1000 / FPS, loop=0)
    else:
        imageio.mimsave(target, frames, fps=FPS)


def make_pictures(folder: Path, side_px: int, count: int) -> None:
    """Soft coloured clouds that grow finer from frame to frame, as decoded pictures do from block to block."""
    for index in range(count):
        detail_px = 4 + index % 57
        bands = [Image.effect_noise((detail_px, detail_px), 90) for _ in "RGB"]
        cloud = Image.merge("RGB", bands).resize((side_px, side_px), Image.Resampling.BICUBIC)
        cloud.save(folder / f"{index}.jpg", quality=95)


if __name__ == "__main__":
    main()
