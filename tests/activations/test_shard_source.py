"""Collections as training data: every generation as it was written, one at a time and in runs, here and at a URL."""

import json
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch

from flux_ir.activations.blocks import NoisySource
from flux_ir.activations.collection import CACHE_FOLDER, MAX_CACHE_BYTES
from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter
from flux_ir.activations.source import TokenSource, open_source
from flux_ir.activations.spans import Memory
from flux_ir.errors import FluxIRError
from flux_ir.recording.stored_dtype import dequantised, scaled
from flux_ir.sites import Site
from tests.activations.conftest import write_collection
from tests.recording.cases import SITES, TXT

FLOAT8 = torch.float8_e4m3fn


def check_block(block, values, site, step):
    """A block of every token, written in bfloat16."""
    assert torch.equal(block.values, values[step, site].bfloat16())
    assert block.floats() is block.values
    assert (block.site, block.step, block.scale, block.used_txt) == (site, step, None, 3)
    txt = {"img": 0, "txt": TXT, None: TXT}[site.stream]
    assert block.txt_tokens == txt
    assert block.positions.dtype == torch.int32
    assert block.positions.tolist() == [*range(txt), *range(len(block.values) - txt)]


def test_a_collection_gives_every_generation_in_order(collection):
    folder, values = collection()
    source = open_source(str(folder))
    assert isinstance(source, TokenSource)
    assert source.sites == [Site.parse(name) for name in SITES]
    assert source.steps == [0, 2]
    assert source.model == "tiny"
    assert [generation.id for generation in source.generations] == [f"{number:016x}" for number in range(6)]
    assert source.generations[5].prompt == "prompt 2"
    assert source.generations[5].path == folder / "shards/000002.safetensors"
    assert [one.id for one in source.generations[4:]] == [source.generations[4].id, source.generations[5].id]
    assert source.runs == [range(2), range(2, 4), range(4, 6)]
    for number in (5, 0, 3, 1, 2, 4, 0):
        for site in source.sites:
            for step in source.steps:
                block = source.read(number, site, step)
                check_block(block, values[number], site, step)
                assert block.generation == f"{number:016x}"
                assert block.prompt == f"prompt {number // 2}"
                assert list(block.values.shape) == [source.tokens(site), source.d(site)]


def test_what_a_step_began_with_comes_with_its_images(collection):
    source = open_source(collection(places=[1, 4])[0])
    assert isinstance(source, NoisySource)
    for step in source.steps:
        latents = source.noisy(range(2, 4), step)
        assert latents.shape == (2, 2, 64)
        assert [latent.unique().tolist() for latent in latents] == [[2 + step / 4], [3 + step / 4]]
    with pytest.raises(FluxIRError, match="holds no noisy latents of step 1"):
        source.noisy(range(2), 1)


@pytest.mark.parametrize("page_cache", [True, False])
@pytest.mark.parametrize("name", [*SITES, "single.0.img", "single.0.txt"])
def test_runs_are_the_tokens_of_several_generations(collection, name, page_cache):
    folder, values = collection(2, per_shard=5)
    source, memory, site = open_source(folder), Memory(page_cache=page_cache), Site.parse(name)
    whole = site if site in source.sites else site.whole
    first = {"single.0.img": TXT}.get(name, 0)
    for images in (range(5), range(6, 9), range(9, 10)):
        for tokens in (None, range(source.tokens(site)), range(2, 6), range(3, 4)):
            run = source.read_run(images, site, 2, tokens, memory)
            rows = range(source.tokens(site)) if tokens is None else tokens
            expected = [values[i][2, whole].bfloat16()[first:][rows.start : rows.stop] for i in images]
            assert torch.equal(run.values, torch.stack(expected))
            one = source.read(images[-1], site, 2)
            assert torch.equal(run.values[-1], one.values[rows.start : rows.stop])
            assert torch.equal(run.positions[-1], one.positions[rows.start : rows.stop])
            assert run.txt_tokens == len([row for row in rows if row < one.txt_tokens])
            assert run.used_txt == [3] * len(images)


def test_sites_may_be_given_as_text(collection):
    source = open_source(collection(1)[0])
    for name in (*SITES, "single.0.img"):
        site = Site.parse(name)
        assert (source.d(name), source.tokens(name)) == (source.d(site), source.tokens(site))
        assert torch.equal(source.read(1, name, 2).values, source.read(1, site, 2).values)
        assert source.read(1, name, 2).site == site


def test_halves_of_single_blocks_can_be_read(collection):
    folder, values = collection(1)
    source = open_source(folder)
    whole = values[1][2, Site.parse("single.0")].bfloat16()
    for name, expected, txt in (("single.0.img", whole[TXT:], 0), ("single.0.txt", whole[:TXT], TXT)):
        block = source.read(1, Site.parse(name), 2)
        assert torch.equal(block.values, expected)
        assert block.txt_tokens == txt
        assert block.positions.tolist() == list(range(len(expected)))
        assert source.tokens(block.site) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
def test_kept_positions_and_scales_come_with_the_values(collection, dtype):
    places = [1, 5, 10]
    folder, values = collection(1, dtype=dtype, places=places)
    source = open_source(folder)
    for site in source.sites:
        txt = {"img": 0, "txt": TXT, None: TXT}[site.stream]
        value = values[1][0, site]
        kept = torch.cat([value[:txt], value[txt:][places]]) if site.stream != "txt" else value
        block = source.read(1, site, 0)
        assert block.positions.tolist() == [*range(txt), *places][: len(kept)]
        assert source.tokens(site) == len(kept)
        if dtype == FLOAT8:
            assert block.values.dtype == FLOAT8
            assert torch.equal(block.scale, scaled(kept).scale)
            assert torch.equal(block.floats(), dequantised(*scaled(kept)))
            assert block.floats().dtype == torch.bfloat16
        else:
            assert torch.equal(block.floats(), kept)


def test_an_unfinished_collection_is_read_as_far_as_it_is(collection):
    folder, values = collection()
    (folder / "shards/000001.safetensors").unlink()
    (folder / "shards/000001.safetensors.partial").write_bytes(b"begun")
    source = open_source(folder)
    assert [generation.id for generation in source.generations] == [f"{number:016x}" for number in (0, 1, 4, 5)]
    check_block(source.read(2, source.sites[0], 2), values[4], source.sites[0], 2)


def test_content_is_known_by_settings_and_rows_and_not_by_the_folders_name(tmp_path):
    write_collection(tmp_path / "a")
    identity = open_source(tmp_path / "a").identity
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_source(tmp_path / "b").identity == identity
    changes = [
        {"steps": (0,)},
        {"sites": SITES[:2]},
        {"images_per_prompt": 3},
        {"settings": {"version": 2, "settings": {"weights": "other"}}},
    ]
    others = []
    for number, change in enumerate(changes):
        write_collection(tmp_path / f"{number}", **change)
        others.append(open_source(tmp_path / f"{number}").identity)
    assert len({identity, *others}) == 5


def clip_collection(folder):
    (folder / "shards").mkdir(parents=True)
    (folder / "collection.json").write_text("{}")
    values = {"clip.image": torch.randn(3, 5, 8), "clip.text": torch.randn(3, 4, 6)}
    tensors = {key: ShardTensor(torch.float32, tuple(value.shape)) for key, value in values.items()}
    rows = {"ids": ["a.jpg", "b.jpg", "c.jpg"], "prompts": ["a cat", None, ""]}
    with ShardWriter(folder / "shards/000000.safetensors", ShardLayout(tensors, rows, {})) as writer:
        for key, value in values.items():
            writer.write(key, 0, value)
    return values


def test_a_collection_of_clip_gives_its_pictures_and_by_name_its_captions(tmp_path):
    values = clip_collection(tmp_path / "clip")
    source = open_source(tmp_path / "clip")
    assert (list(source.sites), list(source.steps), source.d(None), source.tokens(None)) == ([], [0], 8, 5)
    assert [one.prompt for one in source.generations] == ["a cat", "", ""]
    assert torch.equal(source.read(1, None, 0).values, values["clip.image"][1])
    text = open_source(tmp_path / "clip" / "clip.text")
    assert torch.equal(text.read_run(range(3), None, 0).values, values["clip.text"])
    assert text.identity != source.identity
    with pytest.raises(FluxIRError, match=r"activations of clip\.image have no sites"):
        source.read(0, Site.parse("single.0"), 0)


# ---- At a URL


@pytest.fixture(autouse=True)
def local_cache(tmp_path, monkeypatch):
    """What is fetched stays inside the test's folder."""
    monkeypatch.setenv(CACHE_FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(MAX_CACHE_BYTES, raising=False)


@pytest.fixture
def uploaded(collection):
    """A collection in memory://, file by file: its URL, and its folder."""
    folder, _ = collection(6)
    name, filesystem = f"uploaded_{uuid4().hex}", fsspec.filesystem("memory")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        filesystem.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    yield f"memory://{name}", folder
    filesystem.rm(f"/{name}", recursive=True)


def fetched(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))


def test_blocks_read_from_a_url_are_those_of_the_folder(uploaded, tmp_path):
    url, folder = uploaded
    here, there = open_source(folder), open_source(url)
    assert [one.id for one in there.generations] == [one.id for one in here.generations]
    assert there.identity == here.identity
    assert fetched(tmp_path) == []  # shards are fetched when they are read
    assert open_source(Path(url)).sites == here.sites  # as the command line reads it
    for index in (0, 11, 7):
        one, other = here.read(index, here.sites[1], 2), there.read(index, here.sites[1], 2)
        assert torch.equal(one.values, other.values)
        assert (one.generation, one.prompt, one.used_txt) == (other.generation, other.prompt, other.used_txt)
    assert fetched(tmp_path) == ["000000.safetensors", "000003.safetensors", "000005.safetensors"]


def test_headers_longer_than_what_is_fetched_at_first_are_read(uploaded, monkeypatch):
    monkeypatch.setattr("flux_ir.activations.collection._HEADER_BYTES", 100)
    url, folder = uploaded
    assert open_source(url).identity == open_source(folder).identity


def test_the_cache_is_used_again_and_bounded(uploaded, tmp_path, monkeypatch):
    url, _ = uploaded
    source = open_source(url)
    source.read(0, source.sites[0], 0)
    (first,) = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.setenv(MAX_CACHE_BYTES, str(2 * first.stat().st_size + 200))
    before = first.stat().st_mtime_ns
    source = open_source(url)
    source.read(1, source.sites[0], 0)
    assert first.stat().st_mtime_ns == before  # not fetched again
    for index in range(12):
        assert source.read(index, source.sites[0], 0).values.shape[0] == 12
    assert len(fetched(tmp_path)) == 2


@pytest.mark.parametrize("text", ["much", "0", "-3"])
def test_a_bound_that_is_no_number_of_bytes_is_one_line(uploaded, monkeypatch, text):
    monkeypatch.setenv(MAX_CACHE_BYTES, text)
    with pytest.raises(FluxIRError, match="FLUX_IR_CACHE_BYTES must be a number of bytes"):
        open_source(uploaded[0])


def test_other_settings_at_the_same_url_are_not_taken_for_the_old_ones(uploaded, tmp_path):
    url, _ = uploaded
    for settings in ({"settings": {}}, {"settings": {"seed": 1}}):
        fsspec.filesystem("memory").pipe_file(
            f"/{url.partition('://')[2]}/collection.json", json.dumps(settings).encode()
        )
        source = open_source(url)
        source.read(0, source.sites[0], 0)
    assert fetched(tmp_path) == ["000000.safetensors"] * 2


def test_a_url_without_a_collection_is_one_line():
    with pytest.raises(FluxIRError, match="there is no collection at memory://nothing_here"):
        open_source("memory://nothing_here")


# ---- What is refused


def test_a_collection_without_a_finished_shard_is_said(tmp_path):
    (tmp_path / "collection.json").write_text("{}")
    with pytest.raises(FluxIRError, match="holds no finished shard yet"):
        open_source(tmp_path)


@pytest.mark.parametrize("told", ["version", "groups"])
def test_an_old_collection_names_the_command_that_converts_it(tmp_path, told):
    (tmp_path / "collection.json").write_text(json.dumps({"version": 1 if told == "version" else 2}))
    if told == "groups":
        (tmp_path / "groups").mkdir()
    with pytest.raises(FluxIRError, match="is an old collection, with a file for every generation") as error:
        open_source(tmp_path)
    assert f"flux-ir convert-collection --captures {tmp_path}" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "other"}, "the same model: .*1.safetensors has other, .*0.safetensors has tiny"),
        ({"steps": (0,)}, "the same sites and steps"),
        ({"sites": SITES[:2]}, "the same sites and steps"),
        ({"img_tokens": 20}, "the same form of double.1.img/step_0"),
        ({"dtype": torch.float16}, "the same form of double.1.img/step_0"),
    ],
)
def test_a_mixed_collection_is_refused(tmp_path, changes, says):
    write_collection(tmp_path / "a", 2)
    write_collection(tmp_path / "b", 2, **changes)
    name = "shards/000001.safetensors"
    (tmp_path / "b" / name).rename(tmp_path / "a" / name)
    with pytest.raises(FluxIRError, match=says):
        open_source(tmp_path / "a")


def test_a_cut_or_missing_shard_is_named(collection):
    folder, _ = collection()
    broken = folder / "shards/000001.safetensors"
    source = open_source(folder)
    content = broken.read_bytes()
    broken.write_bytes(content[:-9])
    with pytest.raises(FluxIRError, match=r"000001\.safetensors must have"):
        open_source(folder)
    broken.unlink()
    with pytest.raises(FluxIRError, match=r"cannot read .*000001\.safetensors: No such file"):
        source.read(2, source.sites[0], 0)


def test_sites_and_steps_that_are_not_there_are_named(collection):
    source = open_source(collection(1)[0])
    with pytest.raises(FluxIRError, match=r"double\.0\.img was not collected"):
        source.d(Site.parse("double.0.img"))
    with pytest.raises(FluxIRError, match="step 1 was not collected"):
        source.read(0, source.sites[0], 1)
    with pytest.raises(FluxIRError, match="collections are read by site"):
        source.tokens(None)
