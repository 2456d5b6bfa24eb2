"""Pictures to shards: the same bytes after any interruption, captions beside them, and what is wrong by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flux_ir.collecting import clip_images
from flux_ir.collecting.captions import read_captions
from flux_ir.collecting.clip_images import ClipCollection, Networks, check_images, collect_images, image_names
from flux_ir.errors import FluxIRError
from flux_ir.models.clip import Preprocessing

SIDE_PX, D = 8, 6


class CountingVision(torch.nn.Module):
    """Tokens that say which picture they are of: every value is the mean of its pixels plus the token's number."""

    d = D

    def __init__(self, *, stop_after=None):
        super().__init__()
        self.calls, self.stop_after = 0, stop_after

    def tokens(self, choice):
        return {"cls": 1, "patches": 4, "all": 5}[choice]

    def forward(self, pixels):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return pixels.mean((1, 2, 3))[:, None, None] + torch.arange(5.0)[:, None].expand(len(pixels), 5, D)


PIXELS = Preprocessing(SIDE_PX, (SIDE_PX, SIDE_PX), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def pictures(tmp_path):
    """A folder of 7 grey pictures, two of them deeper, each of its own brightness."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(7):
        name = f"more/{number}.png" if number > 4 else f"{number}.png"
        Image.fromarray(np.full((10, 12 + number, 3), 30 * number, np.uint8)).save(folder / name)
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture
def make(pictures, tmp_path):
    """Makes a collection: shards of two batches of two pictures, one of them last."""

    def collection(name="out", tokens="all", dtype=torch.float32, captions=None, batch_size=2):
        bytes_per_image = {"cls": 1, "patches": 4, "all": 5}[tokens] * D * dtype.itemsize
        names = image_names(pictures)
        shard_bytes = 4 * bytes_per_image
        output = tmp_path / name
        return ClipCollection(pictures, names, captions, "a/clip", tokens, dtype, batch_size, output, shard_bytes)

    return collection


def collect(collection, vision=None):
    return list(collect_images(collection, Networks(vision or CountingVision(), PIXELS, None)))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_are_sorted_paths_with_slashes_and_pictures_only(pictures):
    assert image_names(pictures) == [*(f"{number}.png" for number in range(5)), "more/5.png", "more/6.png"]


@pytest.mark.parametrize(("tokens", "first"), [("cls", 0), ("patches", 1), ("all", 0)])
def test_shards_hold_the_tokens_in_the_order_of_the_index(make, tokens, first):
    collection = make(tokens=tokens)
    collect(collection)
    rows = [json.loads(line) for line in (collection.output_dir / "index.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == list(collection.names)
    for number, row in enumerate(rows):
        values = load_file(collection.output_dir / row["shard"])["activations"]
        assert values.shape[1:] == (collection_tokens(tokens), D)
        torch.testing.assert_close(values[row["row"], 0, 0], torch.tensor(30 * number / 255 + first))


def collection_tokens(tokens):
    return {"cls": 1, "patches": 4, "all": 5}[tokens]


def test_the_count_grows_batch_by_batch(make):
    assert [done.images for done in collect(make())] == [2, 4, 6, 7]


@pytest.mark.parametrize("stop_after", range(4))
def test_after_an_interruption_the_folder_has_the_same_bytes(make, stop_after):
    collect(make("whole"))
    stopped = make("stopped")
    with pytest.raises(KeyboardInterrupt):
        collect(stopped, CountingVision(stop_after=stop_after))
    assert not (stopped.output_dir / "index.jsonl").exists()
    vision = CountingVision()
    assert collect(stopped, vision)[-1].earlier == 4 * (stop_after // 2)
    assert files(stopped.output_dir) == files(make("whole").output_dir)


def test_what_is_done_is_not_computed_again(make):
    collect(make())
    vision = CountingVision()
    collect(make(), vision)
    assert vision.calls == 0


def test_a_broken_shard_is_moved_aside_and_made_again(make):
    collection = make()
    collect(collection)
    before = files(collection.output_dir)
    shard = collection.file("images", 1)
    shard.write_bytes(shard.read_bytes()[:-5])
    collect(collection)
    after = files(collection.output_dir)
    assert len(after.pop("images/000001.safetensors.broken")) == len(before["images/000001.safetensors"]) - 5
    assert after == before


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(make, pictures):
    collect(make())
    with pytest.raises(FluxIRError, match="other settings: tokens is all there and cls here; shard_bytes"):
        collect(make(tokens="cls"))
    (pictures / "0.png").unlink()
    with pytest.raises(FluxIRError, match="images is 7 there and 6 here"):
        collect(make())


def test_a_picture_that_is_cut_short_is_named_and_nothing_is_left_out(make, pictures):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(pictures / "more" / "5.png")
    cut = pictures / "more" / "5.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    collection = make()
    check_images(pictures, collection.names)  # its header is whole
    with pytest.raises(FluxIRError, match=r"more/5\.png must be a picture that can be read"):
        collect(collection)
    assert not (collection.output_dir / "index.jsonl").exists()


def test_files_that_are_no_pictures_are_all_named_before_anything_is_computed(pictures):
    (pictures / "2.png").write_text("no picture")
    with pytest.raises(FluxIRError, match=r"2\.png must be a picture"):
        check_images(pictures, image_names(pictures))
    (pictures / "3.png").write_bytes(b"")
    with pytest.raises(FluxIRError, match=r"2 of 7 files .*: 2\.png, 3\.png"):
        check_images(pictures, image_names(pictures))


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(FluxIRError, match="must hold pictures"):
        image_names(tmp_path)
    with pytest.raises(FluxIRError, match="--images must be a folder"):
        image_names(tmp_path / "missing")


def test_memory_does_not_grow_with_the_number_of_shards(make):
    collection = make()
    assert [len(members) for members in collection.shards(5 * D * 4)] == [4, 3]
    assert clip_images.SHARD_BYTES <= 2**28
    assert [len(members) for members in collection.shards(2**30)] == [2, 2, 2, 1]  # one batch at least


NAMES = ["a.jpg", "b/c.png"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("c.jsonl", '{"image": "b/c.png", "caption": "two, or more"}\n\n{"file_name": "a.jpg", "text": "one"}\n'),
        ("c.csv", 'image,caption\nb/c.png,"two, or more"\na.jpg,one\n'),
        ("c.txt", "b/c.png\ttwo, or more\na.jpg\tone\n"),
        ("c.txt", "one\ntwo, or more\n"),
    ],
)
def test_captions_are_read_from_every_kind_of_file(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert read_captions(tmp_path / file, NAMES) == ["one", "two, or more"]


def test_captions_are_read_from_a_text_file_beside_each_picture(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b" / "c.txt").write_text("two, or more")
    assert read_captions(tmp_path, NAMES) == ["one", "two, or more"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FluxIRError, match=r"there is no .*a\.txt"):
        read_captions(tmp_path, NAMES)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("c.jsonl", '{"image": "a.jpg", "caption": "one"}\n{"image": ', r"c\.jsonl, line 2: .*no JSON"),
        ("c.jsonl", "[1]\n", r"line 1: .*got list"),
        ("c.jsonl", '{"image": "a.jpg"}\n', r"line 1: .*got image"),
        ("c.jsonl", '{"image": "a.jpg", "caption": "one"}\n' * 2, r"line 2: .*a\.jpg has a caption already"),
        ("c.jsonl", '{"image": "a.jpg", "caption": "one"}\n', r"has none for b/c\.png"),
        ("c.csv", "picture,words\na.jpg,one\n", r"line 2: .*got picture, words"),
        ("c.txt", "a.jpg\tone\nb/c.png two\n", r"line 2: .*no tab"),
        ("c.txt", "one\n", r"has 1, --images has 2"),
        ("c.pdf", "one\n", r"must be a \.jsonl, \.csv or \.txt file"),
    ],
)
def test_captions_that_are_wrong_are_named_by_their_line(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(FluxIRError, match=message):
        read_captions(tmp_path / file, NAMES)


def test_a_missing_or_unreadable_file_of_captions_is_one_line(tmp_path):
    with pytest.raises(FluxIRError, match="cannot read the captions"):
        read_captions(tmp_path / "none.csv", NAMES)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    with pytest.raises(FluxIRError, match="must be UTF-8 text"):
        read_captions(tmp_path / "latin.txt", NAMES)


def test_captions_of_other_pictures_do_no_harm(tmp_path, pictures):
    shutil.rmtree(pictures / "more")
    names = image_names(pictures)
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{name},x\n" for name in [*names, "other.png"]))
    assert read_captions(tmp_path / "c.csv", names) == ["x"] * 5
