"""Pictures to shards: the same bytes after any interruption, captions beside them, and what is wrong by name."""

import io
import json
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from flux_ir.activations.shards import read_shard
from flux_ir.collecting import clip_images
from flux_ir.collecting.clip_images import ClipCollection, ClipSettings, Networks
from flux_ir.collecting.image_sources import ShardedImages, check_images, open_images, read_captions
from flux_ir.collecting.storage import LocalStorage
from flux_ir.errors import FluxIRError
from flux_ir.models.clip import ClipVisionParams, Preprocessing
from flux_ir.recording.statistics import read_statistics

SIDE_PX, D = 8, 6


class CountingVision(torch.nn.Module):
    """Tokens that say which picture they are of: every value is the mean of its pixels plus the token's number."""

    params = ClipVisionParams(hidden_size=D, num_attention_heads=1, image_size=SIDE_PX, patch_size=SIDE_PX // 2)

    def __init__(self, *, stop_after=None):
        super().__init__()
        self.calls, self.stop_after = 0, stop_after
        self.device_of = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

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


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of four pictures: two batches of two."""
    monkeypatch.setattr(clip_images, "MOST_SHARD_IMAGES", 4)


@pytest.fixture
def make(pictures, tmp_path):
    """Makes a collection."""

    def collection(name="out", tokens="all", vision=None, source=None, **changes):
        settings = {"clip": "a/clip", "weights": "0f", "dtype": torch.float32, "store_dtype": torch.float32}
        settings = ClipSettings(tokens=tokens, batch_size=2, **(settings | changes))
        networks = Networks(vision or CountingVision(), PIXELS, None)
        source = source or open_images(pictures, None)
        return ClipCollection(LocalStorage(tmp_path / name), settings, source, networks)

    return collection


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def index_of(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_names_are_sorted_paths_with_slashes_and_pictures_only(pictures):
    assert open_images(pictures, None).names == [*(f"{number}.png" for number in range(5)), "more/5.png", "more/6.png"]


@pytest.mark.parametrize(("tokens", "first"), [("cls", 0), ("patches", 1), ("all", 0)])
def test_shards_hold_the_tokens_in_the_order_of_the_index(make, tmp_path, tokens, first):
    list(make(tokens=tokens).collect())
    rows = index_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [*(f"{number}.png" for number in range(5)), "more/5.png", "more/6.png"]
    for number, row in enumerate(rows):
        values = load_file(tmp_path / "out" / row["shard"])["clip.image"]
        assert values.shape[1:] == ({"cls": 1, "patches": 4, "all": 5}[tokens], D)
        torch.testing.assert_close(values[row["row"], 0, 0], torch.tensor(30 * number / 255 + first))
    shard = read_shard(tmp_path / "out/shards/000001.safetensors")
    assert shard.metadata["ids"] == [row["id"] for row in rows[4:]]
    assert shard.metadata["prompts"] == [""] * 3
    told = json.loads((tmp_path / "out/collection.json").read_text())
    assert (told["kind"], told["generations"], told["shards"], told["images_per_shard"]) == ("clip", 7, 2, 4)
    statistics = read_statistics(tmp_path / "out/stats.safetensors")["clip.image"]
    assert statistics.count == 7 * values.shape[1]


def test_the_count_grows_batch_by_batch(make):
    assert [done.images for done in make().collect()] == [2, 4, 6, 7]


@pytest.mark.parametrize("stop_after", range(4))
def test_after_an_interruption_the_folder_has_the_same_bytes(make, tmp_path, stop_after):
    list(make("whole").collect())
    with pytest.raises(KeyboardInterrupt):
        list(make("stopped", vision=CountingVision(stop_after=stop_after)).collect())
    assert not (tmp_path / "stopped/index.jsonl").exists()
    assert list(make("stopped").collect())[-1].earlier == 4 * (stop_after // 2)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_what_is_done_is_not_computed_again(make):
    list(make().collect())
    vision = CountingVision()
    list(make(vision=vision).collect())
    assert vision.calls == 0


@pytest.mark.parametrize("harm", [lambda content: content[:-5], lambda content: content[:-1] + b"x"])
def test_a_broken_shard_is_moved_aside_and_made_again(make, tmp_path, harm):
    list(make().collect())
    before = files(tmp_path / "out")
    shard = tmp_path / "out/shards/000001.safetensors"
    shard.write_bytes(harm(shard.read_bytes()))
    list(make().collect())
    after = files(tmp_path / "out")
    assert after.pop("broken/shards/000001.safetensors") == harm(before["shards/000001.safetensors"])
    assert after == before


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(make, pictures):
    list(make().collect())
    with pytest.raises(FluxIRError, match="other settings: tokens all there, cls now"):
        list(make(tokens="cls").collect())
    with pytest.raises(FluxIRError, match="other settings: weights 0f there, 0e now"):
        list(make(weights="0e").collect())
    (pictures / "0.png").unlink()
    with pytest.raises(FluxIRError, match="images 7 there, 6 now"):
        list(make().collect())


def test_arrays_of_an_earlier_version_are_not_gone_on_with(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/clip.json").write_text("{}")
    with pytest.raises(FluxIRError, match="as they were before shards"):
        list(make().collect())


def test_a_picture_that_is_cut_short_is_named_and_nothing_is_left_out(make, pictures, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(pictures / "more" / "5.png")
    cut = pictures / "more" / "5.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    check_images(open_images(pictures, None))  # its header is whole
    with pytest.raises(FluxIRError, match=r"more/5\.png must be a picture that can be read"):
        list(make().collect())
    assert not (tmp_path / "out/index.jsonl").exists()


def test_values_that_are_not_finite_are_never_kept(make, tmp_path):
    vision = CountingVision()
    vision.forward = lambda pixels: torch.full((len(pixels), 5, D), float("nan"))
    with pytest.raises(FluxIRError, match=r"clip.image holds NaN or infinity, first for .*0\.png"):
        list(make(vision=vision).collect())
    assert not list(tmp_path.glob("out/shards/*"))


def test_files_that_are_no_pictures_are_all_named_before_anything_is_computed(pictures):
    (pictures / "2.png").write_text("no picture")
    with pytest.raises(FluxIRError, match=r"2\.png must be a picture"):
        check_images(open_images(pictures, None))
    (pictures / "3.png").write_bytes(b"")
    with pytest.raises(FluxIRError, match=r"2 of 7 files .*: 2\.png, 3\.png"):
        check_images(open_images(pictures, None))


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(FluxIRError, match="must hold pictures"):
        open_images(tmp_path, None)
    with pytest.raises(FluxIRError, match="--images must be a folder"):
        open_images(tmp_path / "missing", None)


def test_shards_are_bounded_in_pictures_and_in_bytes(make, monkeypatch):
    assert [len(make().images_of(shard)) for shard in range(2)] == [4, 3]
    monkeypatch.setattr(clip_images, "MOST_SHARD_BYTES", 2 * 5 * D * 4)
    assert make().shard_images == 2
    monkeypatch.setattr(clip_images, "MOST_SHARD_BYTES", 1)
    assert make().shard_images == 1


# ---- Shards of other people


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), 30 * number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, numbers, *, caption="caption", image="image", struct=True):
    """CC3M's form: an image as a struct of bytes and path, or as bytes alone, and a caption."""
    pictures = [{"bytes": png(number), "path": f"{number}.png"} if struct else png(number) for number in numbers]
    columns = {image: pictures, caption: [f"number {number}" for number in numbers]}
    parquet.write_table(pa.table(columns), path, row_group_size=2)


def write_tar(path, numbers, *, broken=None, lacks_caption=None, as_json=False):
    """Webdataset: 000.png and 000.txt (or 000.json with a caption), one after the other."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            parts = {"png": b"no picture" if number == broken else png(number)}
            if number != lacks_caption:
                text = f"number {number}"
                parts |= {"json": json.dumps({"caption": text}).encode()} if as_json else {"txt": text.encode()}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards_of_others"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "write",
    [
        write_parquet,
        lambda path, numbers: write_parquet(path, numbers, struct=False, caption="text"),
        lambda path, numbers: write_tar(path.with_suffix(".tar"), numbers),
        lambda path, numbers: write_tar(path.with_suffix(".tar"), numbers, as_json=True),
    ],
)
def test_pictures_and_captions_are_read_in_order_from_any_number(shards, write):
    write(shards / "a.parquet", range(5))
    write(shards / "b.parquet", range(5, 8))
    source = open_images(shards, None)
    assert (len(source), source.has_captions) == (8, True)
    for start in (0, 3, 5, 7):
        pictures = list(source.pictures(start))
        assert [picture.caption for picture in pictures] == [f"number {number}" for number in range(start, 8)]
        assert [picture.content for picture in pictures] == [png(number) for number in range(start, 8)]
    assert len({picture.id for picture in source.pictures(0)}) == 8
    assert pictures[0].id.startswith("b/")


def test_a_collection_of_shards_of_others_goes_on_where_it_was_stopped(make, shards, tmp_path):
    write_tar(shards / "a.tar", range(3))
    write_tar(shards / "b.tar", range(3, 7))
    source = ShardedImages([shards / "a.tar", shards / "b.tar"])
    list(make("whole", source=source).collect())
    with pytest.raises(KeyboardInterrupt):
        list(make("stopped", source=source, vision=CountingVision(stop_after=3)).collect())
    assert list(make("stopped", source=source).collect())[-1].earlier == 4
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert [row["id"] for row in index_of(tmp_path / "whole")][2:4] == ["a/002", "b/003"]


def test_content_is_known_and_not_only_the_name(make, shards):
    write_parquet(shards / "a.parquet", range(4))
    list(make(source=open_images(shards, None)).collect())
    write_parquet(shards / "a.parquet", range(1, 5))
    with pytest.raises(FluxIRError, match="other settings: images_sha256"):
        list(make(source=open_images(shards, None)).collect())


def test_a_broken_picture_and_a_missing_caption_are_named_by_shard_and_key(make, shards):
    write_tar(shards / "a.tar", range(4), broken=2)
    with pytest.raises(FluxIRError, match=r"a\.tar, key 002 must be a picture that can be read"):
        list(make(source=open_images(shards, None)).collect())
    write_tar(shards / "a.tar", range(9), lacks_caption=7)
    with pytest.raises(FluxIRError, match=r"a\.tar.*(key 007|007)"):
        list(make("other", source=open_images(shards, None)).collect())
    write_parquet(shards / "a.parquet", range(2))
    table = parquet.read_table(shards / "a.parquet").set_column(1, "caption", pa.array(["x", None]))
    parquet.write_table(table, shards / "a.parquet")
    (shards / "a.tar").unlink()
    with pytest.raises(FluxIRError, match=r"a\.parquet, row 000001, must have text in its column 'caption'"):
        list(open_images(shards, None).pictures(0))


def test_an_absent_column_and_a_broken_shard_are_one_clear_line(shards):
    write_parquet(shards / "a.parquet", range(2), image="picture")
    with pytest.raises(FluxIRError, match=r"a\.parquet must have a column 'image': it has picture, caption"):
        open_images(shards, None)
    write_parquet(shards / "a.parquet", range(2))
    write_parquet(shards / "b.parquet", range(2), caption="words")
    with pytest.raises(FluxIRError, match=r"b\.parquet must have a column 'caption': it has image, words"):
        list(open_images(shards, None).pictures(0))
    (shards / "b.parquet").write_bytes((shards / "a.parquet").read_bytes()[:-9])
    with pytest.raises(FluxIRError, match=r"b\.parquet must be a shard of pictures that can be read"):
        open_images(shards, None)
    (shards / "b.parquet").unlink()
    (shards / "b.tar").write_bytes(b"no tar")
    with pytest.raises(FluxIRError, match=r"b\.tar must be a shard of pictures that can be read"):
        open_images(shards, None)


def test_two_kinds_in_one_folder_and_captions_beside_shards_are_refused(pictures, tmp_path):
    write_parquet(pictures / "a.parquet", range(2))
    with pytest.raises(FluxIRError, match=r"it holds both, such as 0\.png and a\.parquet"):
        open_images(pictures, None)
    with pytest.raises(FluxIRError, match="the captions of shards are in the shards"):
        open_images(pictures / "a.parquet", tmp_path / "captions.txt")


def test_without_a_column_of_captions_pictures_alone_are_read(shards):
    parquet.write_table(pa.table({"image": [png(0)], "url": ["x"]}), shards / "a.parquet")
    source = open_images(shards, None)
    assert not source.has_captions
    assert [picture.caption for picture in source.pictures(0)] == [None]


def test_a_missing_library_is_named_with_the_command_that_brings_it(shards, monkeypatch):
    write_parquet(shards / "a.parquet", range(2))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FluxIRError, match="the library datasets, which is not installed") as caught:
        open_images(shards, None)
    assert caught.value.hint.startswith("pip install datasets")


# ---- Captions of a folder


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
        ("c.jsonl", '{"image": "a.jpg", "caption": "one"}\n{"image": ', r"c\.jsonl, line 2 must be JSON"),
        ("c.jsonl", "[1]\n", r"line 1 must be a JSON object: got \[1\]"),
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
    with pytest.raises(FluxIRError, match="must be UTF-8: byte 0xe9 on line 1"):
        read_captions(tmp_path / "latin.txt", NAMES)


def test_captions_of_other_pictures_do_no_harm(tmp_path, pictures):
    names = [f"{number}.png" for number in range(5)]
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{name},x\n" for name in [*names, "other.png"]))
    assert read_captions(tmp_path / "c.csv", names) == ["x"] * 5
