"""GIF and MP4 are decoded again: how many frames, which, in what order, for how long, in which colours."""

import re
import subprocess
import weakref
from itertools import islice

import imageio_ffmpeg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from flux_ir.errors import FluxIRError
from flux_ir.visualize.animate import delays, write_gif, write_mp4
from flux_ir.visualize.palette import film_palette


def squares(count, size=(48, 32)):
    """Frames of one colour each, all far from each other: which is which can be seen."""
    for index in range(count):
        yield Image.new("RGB", size, colour_of(index))


def colour_of(index):
    return (index * 37 % 256, index * 91 % 256, index * 151 % 256)


def palette_for(frames):
    return film_palette(frame.resize((8, 8), Image.Resampling.NEAREST) for frame in frames)


def read_gif(path):
    """The frames in RGB, and the time each is shown [ms]."""
    with Image.open(path) as film:
        frames, times = [], []
        for index in range(film.n_frames):
            film.seek(index)
            frames.append(film.convert("RGB"))
            times.append(film.info["duration"])
    return frames, times


def read_mp4(path):
    """The frames in RGB, and what the file says about itself."""
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    return [Image.frombytes("RGB", about["size"], frame) for frame in reader], about


def colour_tags(path):
    """What the stream itself says of its colours, by the names of H.264: 2 would be unspecified."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "trace", "-i", str(path)]
    command += ["-c", "copy", "-bsf:v", "trace_headers", "-f", "null", "-"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    tags = re.findall(r"(colour_primaries|transfer_characteristics|matrix_coefficients) +\d+ = (\d+)", told)
    return {name: int(value) for name, value in tags}


def distance(picture, colour):
    """The largest difference of any pixel and channel from a colour."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, colour))
    return max(high for _, high in difference.getextrema())


def test_a_gif_has_every_frame_in_order(tmp_path):
    path = tmp_path / "film.gif"
    assert write_gif(squares(57), palette_for(squares(57)), path, 2.0) == 57
    frames, times = read_gif(path)
    assert times == [500] * 57
    assert [frame.size for frame in frames] == [(48, 32)] * 57
    assert max(distance(frame, colour_of(index)) for index, frame in enumerate(frames)) <= 8


def test_equal_frames_in_a_gif_are_not_merged(tmp_path):
    path = tmp_path / "film.gif"
    still = [Image.new("RGB", (16, 16), (9, 9, 9))] * 5
    write_gif(still, palette_for(still), path, 4.0)
    assert read_gif(path)[1] == [250] * 5


def test_a_gif_loops_for_ever(tmp_path):
    path = tmp_path / "film.gif"
    write_gif(squares(3), palette_for(squares(3)), path, 2.0)
    with Image.open(path) as film:
        assert film.info["loop"] == 0
    assert path.read_bytes()[-1:] == b";"


@pytest.mark.parametrize(
    ("fps", "first"), [(3.0, [330, 340, 330]), (2.5, [400] * 3), (30.0, [30, 40, 30]), (50, [20] * 3)]
)
def test_a_gif_at_a_fractional_rate_is_as_long_as_it_should_be(fps, first, tmp_path):
    path = tmp_path / "film.gif"
    write_gif(squares(20), palette_for(squares(20)), path, fps)
    times = read_gif(path)[1]
    assert times[:3] == first
    assert sum(times) == 10 * round(100 * 20 / fps)


@given(st.floats(0.01, 50), st.integers(1, 300))
def test_rounding_of_frame_times_never_adds_up(fps, count):
    times = list(islice(delays(fps), count))
    assert sum(times) == round(100 * count / fps)
    assert max(times) - min(times) <= 1


def test_one_palette_serves_all_frames_so_that_nothing_flickers(tmp_path):
    gradient = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    film = [frame for square in squares(20, (64, 64)) for frame in (gradient, square)]
    path = tmp_path / "film.gif"
    write_gif(film, palette_for(film), path, 2.0)
    frames, _ = read_gif(path)
    assert all(ImageChops.difference(frames[0], frame).getbbox() is None for frame in frames[::2])


def test_an_mp4_has_every_frame_in_order(tmp_path):
    path = tmp_path / "film.mp4"
    assert write_mp4(squares(57), path, 2.0) == 57
    frames, about = read_mp4(path)
    assert len(frames) == 57
    assert max(distance(frame, colour_of(index)) for index, frame in enumerate(frames)) <= 10
    assert about["duration"] == pytest.approx(28.5, abs=0.01)


def test_an_mp4_is_what_browsers_and_quicktime_play(tmp_path):
    path = tmp_path / "film.mp4"
    write_mp4(squares(3), path, 2.0)
    about = read_mp4(path)[1]
    assert about["codec"] == "h264"
    assert about["pix_fmt"].startswith("yuv420p(tv, bt709")
    assert colour_tags(path) == {
        "colour_primaries": 1,
        "transfer_characteristics": 1,
        "matrix_coefficients": 1,
    }  # BT.709
    content = path.read_bytes()
    assert content[4:8] == b"ftyp"
    assert content.index(b"moov") < content.index(b"mdat"), "it cannot be played before it is loaded whole"


@pytest.mark.parametrize(("fps", "seconds"), [(0.5, 40.0), (2.5, 8.0), (3.0, 6.67), (23.976, 0.83)])
def test_an_mp4_is_as_long_as_it_should_be(fps, seconds, tmp_path):
    path = tmp_path / "film.mp4"
    write_mp4(squares(20), path, fps)
    frames, about = read_mp4(path)
    assert len(frames) == 20
    assert about["duration"] == pytest.approx(seconds, abs=0.02)


@pytest.mark.parametrize("size", [(47, 31), (48, 31), (47, 32), (1, 1)])
def test_odd_sizes_are_made_even_without_scaling(size, tmp_path):
    path = tmp_path / "film.mp4"
    write_mp4(squares(2, size), path, 2.0)
    frames, about = read_mp4(path)
    width, height = size
    assert about["size"] == (width + width % 2, height + height % 2)
    assert len(frames) == 2


def write(frames, path):
    if path.suffix == ".gif":
        return write_gif(frames, palette_for(squares(3)), path, 2.0)
    return write_mp4(frames, path, 2.0)


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_few_frames_are_in_memory_at_a_time(name, tmp_path):
    seen, most = [], 0

    def frames():
        nonlocal most
        for frame in squares(40):
            seen.append(weakref.ref(frame))
            most = max(most, sum(one() is not None for one in seen))
            yield frame
            del frame

    write(frames(), tmp_path / name)
    assert most <= 3


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_a_film_that_fails_half_way_leaves_nothing_behind_and_what_there_was_untouched(name, tmp_path):
    def failing():
        yield from squares(3)
        raise FluxIRError("the fourth picture is broken")

    path = tmp_path / name
    path.write_bytes(b"an earlier film")
    with pytest.raises(FluxIRError, match="fourth picture"):
        write(failing(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"an earlier film"


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_a_film_without_frames_is_refused(name, tmp_path):
    with pytest.raises(FluxIRError, match="at least one frame"):
        write(iter(()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_refuses_is_told_in_its_words(tmp_path):
    path = tmp_path / "film.mp4"
    with pytest.raises(FluxIRError, match=r"ffmpeg could not write .*film\.mp4: \S") as raised:
        write_mp4(squares(3, (20_000, 2)), path, 2.0)
    assert "partial" not in raised.value.message
    assert list(tmp_path.iterdir()) == []


def test_no_ffmpeg_is_left_running_after_a_failure(tmp_path):
    def failing():
        yield from squares(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mp4(failing(), tmp_path / "film.mp4", 2.0)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running
