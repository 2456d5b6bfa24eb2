"""Collections at a URL: the same bytes as in a folder, gone on with and mended there."""

from uuid import uuid4

import fsspec
import pytest

from flux_ir.activations import remote
from flux_ir.api.convert_collection import convert_collection
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.storage import LocalStorage, open_storage
from flux_ir.distributed import Ranks
from tests.collecting.old_collections import write_old_collection
from tests.collecting.small_jobs import PROMPTS, collect, collected, files_of, settings_of


@pytest.fixture(autouse=True)
def local_places(tmp_path, monkeypatch):
    """What is downloaded or begun stays inside the test's folder."""
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))


@pytest.fixture
def url():
    name = f"collected_{uuid4().hex}"
    yield f"memory://{name}"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(f"/{name}"):
        filesystem.rm(f"/{name}", recursive=True)


def contents(storage):
    return {name: storage.read(name) for name in storage.list("") if not name.startswith("broken/")}


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_collection_at_a_url_has_the_bytes_of_one_in_a_folder(suite, small_shards, plain_pairs, url, tmp_path, kind):
    where = url if kind == "memory" else f"file://{tmp_path}/collected"
    items = collect(settings_of(batch_size=1), suite, open_storage(where), Ranks())
    for _ in range(3):
        next(items)
    items.close()  # stopped in the middle, then gone on with
    assert open_storage(where).list("shards") == ["shards/000000.safetensors"]
    list(collect(settings_of(batch_size=1), suite, open_storage(where), Ranks()))
    assert contents(open_storage(where)) == files_of(plain_pairs)
    assert not list(tmp_path.glob("temporary/**/*.safetensors"))  # what was uploaded is not kept here


def test_a_broken_shard_at_a_url_is_made_again(suite, small_shards, plain_pairs, url):
    storage = open_storage(url)
    for name, content in files_of(plain_pairs).items():
        storage.publish(content, name)
    name = "shards/000001.safetensors"
    storage.publish(storage.read(name)[:-9], name)
    job = Collector(settings_of(batch_size=1), suite, storage, Ranks())
    assert list(job.verify()) == [True, False, True]
    list(collect(settings_of(batch_size=1), suite, storage, Ranks()))
    assert contents(storage) == files_of(plain_pairs)
    assert storage.list("broken") == [f"broken/{name}"]


def test_an_old_collection_is_converted_from_a_folder_to_a_url(suite, url, tmp_path):
    settings = settings_of(prompts=PROMPTS[:2], batch_size=2)
    write_old_collection(tmp_path / "old", settings, suite)
    assert convert_collection(tmp_path / "old", url).where == url
    collected(tmp_path / "anew", settings, suite)
    assert contents(open_storage(url)) == contents(LocalStorage(tmp_path / "anew"))
