"""Collections in object storage: the same bytes as in a folder, and read back through a bounded local cache."""

import shutil
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from flux_ir.activations import remote
from flux_ir.activations.remote_source import CACHE_FOLDER, MAX_CACHE_BYTES
from flux_ir.activations.tokens import open_source
from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.collector import collect
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.storage import open_storage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.sources import locate_model
from flux_ir.models.suite import Suite
from flux_ir.sites import Site

SITES = tuple(map(Site.parse, ("double.1.img", "single.1")))
PROMPTS = ["a red circle", "a small blue square", "a large green triangle"]


@pytest.fixture(scope="module")
def suite():
    spec = get_spec("flux-tiny")
    with pytest.MonkeyPatch.context() as patch:
        for variable in (*spec.transformer_env, *spec.autoencoder_env):
            patch.delenv(variable, raising=False)
        return Suite(spec, locate_model(spec), plan(0), torch.bfloat16)


@pytest.fixture(scope="module")
def settings():
    recipe = Recipe(get_spec("flux-tiny"), 64, 48, 2, 2.5, SITES, (0, 1), torch.bfloat16, torch.bfloat16)
    return CollectSettings(recipe, PROMPTS, repeats=22, batch_size=8)  # 66: one whole group and part of another


@pytest.fixture(scope="module")
def folder(suite, settings, tmp_path_factory):
    """The collection in a folder. Read it only."""
    path = tmp_path_factory.mktemp("collection")
    list(collect(settings, suite, open_storage(str(path)), Ranks()))
    return path


@pytest.fixture(autouse=True)
def local_places(tmp_path, monkeypatch):
    """What is cached or begun stays inside the test's folder."""
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setenv(CACHE_FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(MAX_CACHE_BYTES, raising=False)


@pytest.fixture
def uploaded(folder):
    """The collection in memory://, file by file. Returns the URL."""
    name = f"uploaded_{uuid4().hex}"
    filesystem = fsspec.filesystem("memory")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        filesystem.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    yield f"memory://{name}"
    filesystem.rm(f"/{name}", recursive=True)


def contents(storage):
    return {name: storage.sha256(name) for name in storage.list("") if not name.startswith(("partial/", "text/"))}


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_collection_at_a_url_has_the_bytes_of_one_in_a_folder(suite, settings, folder, tmp_path, kind):
    url = {"memory": f"memory://collected_{uuid4().hex}", "file": f"file://{tmp_path}/collected"}[kind]
    rows = collect(settings, suite, open_storage(url), Ranks())
    for _ in range(20):
        next(rows)
    rows.close()  # stopped in the middle, then gone on with
    list(collect(settings, suite, open_storage(url), Ranks()))
    assert contents(open_storage(url)) == contents(open_storage(str(folder)))


def test_a_broken_file_at_a_url_is_made_again(suite, settings, uploaded, folder):
    storage = open_storage(uploaded)
    name = next(name for name in storage.list("groups") if name.endswith(".pt"))
    storage.publish(storage.read(name)[:-9], name)
    list(collect(settings, suite, storage, Ranks()))
    after = contents(storage)
    assert len([name for name in after if name.startswith("broken/")]) == 1
    kept = {name: digest for name, digest in after.items() if not name.startswith("broken/")}
    assert kept == contents(open_storage(str(folder)))


def test_blocks_read_from_a_url_are_those_of_the_folder(uploaded, folder, tmp_path):
    here, there = open_source(folder), open_source(uploaded)
    assert [one.id for one in there.generations] == [one.id for one in here.generations]
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1  # captures are fetched when they are read
    assert open_source(Path(uploaded)).sites == list(SITES)  # as the command line reads it
    for index in (0, 65, 7):
        one, other = here.read(index, SITES[1], 1), there.read(index, SITES[1], 1)
        assert torch.equal(one.values, other.values)
        assert (one.generation, one.prompt, one.used_txt) == (other.generation, other.prompt, other.used_txt)
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 3


def test_the_cache_is_used_again_and_bounded(uploaded, tmp_path, monkeypatch):
    open_source(uploaded)
    (first,) = (tmp_path / "cache").rglob("*.pt")
    monkeypatch.setenv(MAX_CACHE_BYTES, str(2 * first.stat().st_size + 200))
    before = first.stat().st_mtime_ns
    source = open_source(uploaded)
    assert first.stat().st_mtime_ns == before  # not fetched again
    for index in range(12):
        assert source.read(index, SITES[0], 0).values.shape[0] == 12
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 2


@pytest.mark.parametrize("text", ["much", "0", "-3"])
def test_a_bound_that_is_no_number_of_bytes_is_one_line(uploaded, monkeypatch, text):
    monkeypatch.setenv(MAX_CACHE_BYTES, text)
    with pytest.raises(FluxIRError, match="FLUX_IR_CACHE_BYTES must be a number of bytes"):
        open_source(uploaded)


def test_other_settings_at_the_same_url_are_not_taken_for_the_old_ones(uploaded, tmp_path):
    open_source(uploaded)
    storage = open_storage(uploaded)
    storage.publish(storage.read("collection.json") + b"\n", "collection.json")
    open_source(uploaded)
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 2


def test_an_unfinished_collection_is_read_as_far_as_it_is(uploaded):
    storage = open_storage(uploaded)
    storage.remove("index.jsonl")
    storage.remove("groups/000001/index.jsonl")
    assert len(open_source(uploaded).generations) == 64


def test_a_url_without_a_collection_is_one_line():
    with pytest.raises(FluxIRError, match="there is no collection at memory://nothing_here"):
        open_source("memory://nothing_here")


def test_what_collect_clip_wrote_is_opened_by_its_folder(tmp_path):
    for number in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        save_file({"activations": torch.randn(3, 5, 8)}, tmp_path / "images" / f"00000{number}.safetensors")
    (tmp_path / "clip.json").write_text("{}")
    (tmp_path / "index.jsonl").write_text('{"image": "a.jpg"}\n')
    source = open_source(tmp_path)
    assert len(source.generations) == 6
    assert source.read(4, None, 0).values.shape == (5, 8)
    shutil.rmtree(tmp_path / "images")
