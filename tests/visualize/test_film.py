"""What a film draws: the right picture, enlarged sharply, with its caption; broken pictures stop it or are left out."""

import pytest
from PIL import Image, ImageChops

from flux_ir.errors import FluxIRError
from flux_ir.visualize.film import GAP_COLOUR, GAP_PX, Film
from flux_ir.visualize.frames import Cell, Frame
from flux_ir.visualize.pictures import PictureReader

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)]


def make_frames(folder, sizes=((512, 320),), count=4):
    """Frames of one picture per size, each of one colour; those of a second size are darker."""
    frames = []
    for index in range(count):
        pictures = []
        for place, size in enumerate(sizes):
            path = folder / f"{place}_{index}.jpg"
            Image.new("RGB", size, tuple(value // (place + 1) for value in COLOURS[index])).save(path, quality=95)
            pictures.append(path)
        frames.append(Frame(Cell(0, "double", index), tuple(pictures)))
    return frames


def make_film(frames, *, skip_broken=False, **options):
    return Film(frames, PictureReader(skip_broken=skip_broken), font_size=24, **options)


def near(pixel, colour):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 4


def test_frames_come_in_order_and_again(tmp_path):
    film = make_film(make_frames(tmp_path))
    for _ in range(2):
        drawn = list(film)
        assert [frame.size for frame in drawn] == [film.size_px] * 4 == [(512, 320)] * 4
        assert all(near(frame.getpixel((500, 300)), colour) for frame, colour in zip(drawn, COLOURS, strict=True))


def test_every_frame_has_its_own_caption_and_all_have_the_same_box(tmp_path):
    frames = make_frames(tmp_path)
    same_picture = [Frame(frame.cell, frames[0].pictures) for frame in frames]
    one, two, *_ = make_film(same_picture)
    difference = ImageChops.difference(one, two).getbbox()
    assert difference is not None
    left, top, right, bottom = make_film(frames).style.box.edges
    assert left < difference[0] < difference[2] < right
    assert top < difference[1] < difference[3] < bottom


def test_tiny_pictures_grow_by_a_whole_factor_and_stay_sharp(tmp_path):
    path = tmp_path / "tiny.png"
    tiny = Image.new("RGB", (16, 16))
    tiny.putpixel((15, 15), (255, 255, 255))
    tiny.save(path)
    (frame,) = make_film([Frame(Cell(0, "double", 0), (path,))])
    factor = frame.width // 16
    assert frame.size == (16 * factor, 16 * factor)
    assert factor > 8
    corner = frame.crop((frame.width // 2, frame.height // 2, frame.width, frame.height))
    assert sorted(corner.getcolors()) == [(factor**2, (255, 255, 255)), (63 * factor**2, (0, 0, 0))]


def test_two_generations_stand_side_by_side_at_the_same_height(tmp_path):
    film = make_film(make_frames(tmp_path, sizes=((512, 512), (128, 256))), labels=("seed 1", "seed 2"))
    first, *_ = film
    assert film.size_px == first.size == (512 + GAP_PX + 256, 512)
    assert near(first.getpixel((500, 256)), COLOURS[0])
    assert first.getpixel((512 + GAP_PX // 2, 256)) == GAP_COLOUR
    assert near(first.getpixel((770, 256)), tuple(value // 2 for value in COLOURS[0]))


def test_labels_are_drawn_below_their_own_picture(tmp_path):
    frames = make_frames(tmp_path, sizes=((512, 512), (512, 512)))
    plain, labelled = (next(iter(make_film(frames, labels=labels))) for labels in ((), ("seed 1", "seed 2")))
    left, top, right, _ = ImageChops.difference(plain, labelled).getbbox()
    assert top > 450
    assert left < 20
    assert right > 512 + GAP_PX


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a picture")
    else:
        Image.new("RGB", (16, 16)).save(path)


SPOILT = ["missing", "truncated", "empty", "text", "size"]


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_picture_stops_the_film_and_is_named(how, tmp_path):
    frames = make_frames(tmp_path)
    spoil(frames[2].pictures[0], how)
    with pytest.raises(FluxIRError, match=r"cannot show .*0_2\.jpg: \S") as raised:
        list(make_film(frames))
    assert "--skip_broken" in raised.value.hint


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_picture_can_be_skipped_and_is_remembered(how, tmp_path):
    frames = make_frames(tmp_path)
    spoil(frames[2].pictures[0], how)
    film = make_film(frames, skip_broken=True)
    drawn = list(film)
    assert [
        near(frame.getpixel((500, 300)), colour) for frame, colour in zip(drawn, COLOURS[:2] + COLOURS[3:], strict=True)
    ]
    assert list(film.reader.left_out) == [frames[2].pictures[0]]
    assert film.reader.left_out[frames[2].pictures[0]]


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_frame_whose_second_picture_is_broken_is_skipped_whole(how, tmp_path):
    frames = make_frames(tmp_path, sizes=((512, 512), (512, 512)))
    spoil(frames[0].pictures[1], how)
    assert len(list(make_film(frames, skip_broken=True))) == 3


def test_a_broken_first_picture_does_not_settle_the_size(tmp_path):
    frames = make_frames(tmp_path)
    spoil(frames[0].pictures[0], "truncated")
    film = make_film(frames, skip_broken=True)
    assert film.size_px == (512, 320)
    assert len(list(film)) == 3


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_film_of_broken_pictures_alone_is_refused(how, tmp_path):
    frames = make_frames(tmp_path)
    for frame in frames:
        spoil(frame.pictures[0], how)
    with pytest.raises(FluxIRError, match="every one was left out"):
        make_film(frames, skip_broken=True)


def test_thumbnails_show_the_colours_of_every_picture_and_of_the_box(tmp_path):
    film = make_film(make_frames(tmp_path, sizes=((512, 320), (512, 320))))
    thumbnails = list(film.thumbnails(16))
    assert [thumbnail.size for thumbnail in thumbnails] == [(16, 16)] * 8
    assert near(thumbnails[0].getpixel((15, 15)), COLOURS[0])
    assert near(thumbnails[0].getpixel((0, 0)), tuple(round(0.35 * value) for value in COLOURS[0]))
    assert near(thumbnails[7].getpixel((15, 15)), tuple(value // 2 for value in COLOURS[3]))
