"""Places for files: a folder, and whatever fsspec has a filesystem for, all with the same manners."""

import gc
import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from flux_ir.activations import remote
from flux_ir.activations.downloads import Downloads
from flux_ir.activations.remote import RemoteStorage, as_url, open_filesystem
from flux_ir.collecting.storage import LocalStorage, Storage, open_storage
from flux_ir.errors import FluxIRError


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    """Local scratch files of remote places stay inside the test's folder."""
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture(params=["folder", "file", "memory"])
def place(request, tmp_path):
    """Opens the same fresh place again and again, by rank."""
    url = {
        "folder": str(tmp_path / "place"),
        "file": f"file://{tmp_path}/place",
        "memory": f"memory://place_{uuid4().hex}/deeper",
    }[request.param]
    return lambda rank=0: open_storage(url, rank=rank)


def names(storage):
    return [name for name in storage.list("") if not name.startswith("partial/")]


def test_what_a_url_opens_is_a_storage(place):
    assert isinstance(place(), Storage)


def test_urls_open_remote_places_and_paths_open_folders(tmp_path):
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    assert isinstance(open_storage(f"file://{tmp_path}"), RemoteStorage)
    assert open_storage(f"file://{tmp_path}/").where == f"file://{tmp_path}"


def test_bytes_and_files_come_under_their_names(place):
    storage = place()
    storage.publish(b"one", "a/b/1.bin")
    storage.publish(memoryview(b"view"), "a/view.bin")
    begun = storage.scratch(".bin")
    assert begun.suffix == ".bin"
    begun.write_bytes(b"two")
    storage.publish(begun, "a/2.bin")
    assert not begun.exists()
    again = place()
    assert names(again) == ["a/2.bin", "a/b/1.bin", "a/view.bin"]
    assert again.list("a/b") == ["a/b/1.bin"]
    assert again.list("none") == []
    assert [again.read(name) for name in ("a/b/1.bin", "a/2.bin", "a/view.bin")] == [b"one", b"two", b"view"]
    assert again.size("a/2.bin") == 3
    assert again.sha256("a/2.bin") == hashlib.sha256(b"two").hexdigest()
    assert again.local("a/2.bin").read_bytes() == b"two"


def test_what_was_there_is_replaced(place):
    storage = place()
    storage.publish(b"old", "1.bin")
    assert storage.local("1.bin").read_bytes() == b"old"
    storage.publish(b"newer", "1.bin")
    assert storage.read("1.bin") == storage.local("1.bin").read_bytes() == b"newer"


def test_what_another_process_replaced_is_fetched_anew(place):
    place().publish(b"old", "1.bin")
    reader = place()
    assert reader.local("1.bin").read_bytes() == b"old"
    place().publish(b"newer", "1.bin")
    assert place().local("1.bin").read_bytes() == b"newer"


def test_nothing_downloaded_outlives_its_storage(place, temporary_files):
    storage = place()
    storage.publish(b"one", "1.bin")
    storage.local("1.bin")
    del storage
    gc.collect()
    assert not list(temporary_files.rglob("*.bin"))


def test_a_missing_file_is_none_false_or_an_error(place):
    storage = place()
    assert storage.size("none.bin") is None
    assert not storage.exists("none.bin")
    for ask in (storage.read, storage.sha256, storage.local):
        with pytest.raises(FileNotFoundError):
            ask("none.bin")
    storage.remove("none.bin")


def test_files_are_moved_and_removed(place):
    storage = place()
    storage.publish(b"one", "a/1.bin")
    storage.move("a/1.bin", "broken/1.bin")
    assert names(storage) == ["broken/1.bin"]
    assert not storage.exists("a/1.bin")
    storage.remove("broken/1.bin")
    assert names(storage) == []


def test_nothing_of_the_scratch_is_left_for_the_next(place):
    first, second = place(0), place(1)
    begun = [storage.scratch(".bin") for storage in (first, second)]
    for path in begun:
        path.write_bytes(b"half")
    first.publish(b"one", "1.bin")
    first.clear_scratch(everyones=False)
    assert [path.exists() for path in begun] == [False, True]
    first.clear_scratch(everyones=True)
    assert [path.exists() for path in begun] == [False, False]
    assert first.list("") == ["1.bin"]


def test_scratch_paths_are_found_again_by_another_process(place):
    assert place().scratch("").parent == place().scratch("").parent


def test_many_threads_publish_at_once(place):
    storage = place()
    threads = [
        threading.Thread(target=lambda number=number: storage.publish(b"x" * number, f"{number % 3}/{number}.bin"))
        for number in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [storage.size(name) for name in names(storage)] == [int(Path(name).stem) for name in names(storage)]
    assert len(names(storage)) == 24


def test_a_filesystem_without_atomic_uploads_never_shows_half_a_file(tmp_path, monkeypatch):
    storage = open_storage(f"file://{tmp_path}/place")

    def half(path, value, **_):
        Path(path).write_bytes(value[: len(value) // 2])
        raise OSError("the line is dead")

    monkeypatch.setattr(storage._fs, "pipe_file", half)
    with pytest.raises(FluxIRError, match=r"cannot write file://.*/place/1\.bin: the line is dead"):
        storage.publish(b"whole", "1.bin")
    monkeypatch.undo()
    assert names(storage) == []


def test_a_place_that_cannot_be_written_is_found_out_at_once(tmp_path):
    (tmp_path / "place").write_text("a file")
    with pytest.raises(FluxIRError, match="cannot write file://"):
        open_storage(f"file://{tmp_path}/place")


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a/b"), "s3://bucket/a/b"),
        (Path("memory://a"), "memory://a"),
        ("file:///tmp/a", "file:///tmp/a"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
        ("captures/a", None),
        ("/tmp/a:/b", None),
        ("c:/captures", None),
    ],
)
def test_a_url_survives_being_taken_for_a_path(path, url):
    assert as_url(path) == url


def test_a_missing_package_is_named(monkeypatch):
    def refuse(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", refuse)
    message = r"s3://bucket/x needs a package that is not installed: Install s3fs"
    with pytest.raises(FluxIRError, match=message) as raised:
        open_filesystem("s3://bucket/x")
    assert raised.value.hint == "pip install 'flux-ir[s3]'"


def test_a_filesystem_that_nobody_knows_is_one_line():
    with pytest.raises(FluxIRError, match="there is no filesystem for nonsense://x"):
        open_storage("nonsense://x")


def test_a_folder_loads_no_filesystems():
    check = (
        "import sys; from flux_ir.collecting.storage import open_storage; open_storage('/tmp');"
        "sys.exit('fsspec.core' in sys.modules and 'flux_ir.activations.remote' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.fixture
def downloads(tmp_path):
    """Five files of 10 bytes, and room for 30."""
    filesystem = fsspec.filesystem("memory")
    root = f"/downloads_{uuid4().hex}"
    for number in range(5):
        filesystem.pipe_file(f"{root}/groups/{number}.pt", b"0123456789")
    return lambda: Downloads(filesystem, root, tmp_path / "cache", max_bytes=30)


def held(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_are_kept_until_there_is_no_room(downloads, tmp_path):
    cache = downloads()
    for number in (0, 1, 2, 0):
        assert cache.fetch(f"groups/{number}.pt").read_bytes() == b"0123456789"
    assert held(tmp_path / "cache") == ["0.pt", "1.pt", "2.pt"]
    cache.fetch("groups/3.pt")
    assert held(tmp_path / "cache") == ["1.pt", "2.pt", "3.pt"]
    assert cache.held_bytes == 30


def test_downloads_of_an_earlier_process_are_found_again(downloads, tmp_path):
    downloads().fetch("groups/4.pt").write_bytes(b"as it was.")
    assert downloads().fetch("groups/4.pt").read_bytes() == b"as it was."


def test_a_file_larger_than_the_room_is_kept_alone(downloads, tmp_path):
    cache = downloads()
    cache.fetch("groups/0.pt")
    cache.max_bytes = 5
    cache.fetch("groups/1.pt")
    assert held(tmp_path / "cache") == ["1.pt"]


def test_a_download_that_stops_leaves_nothing(downloads, tmp_path, monkeypatch):
    cache = downloads()

    def half(source, target, **_):
        Path(target).write_bytes(b"01234")

    monkeypatch.setattr(cache._fs, "get_file", half)
    with pytest.raises(FluxIRError, match="did not arrive whole: 5 of 10 bytes"):
        cache.fetch("groups/0.pt")
    assert held(tmp_path / "cache") == []
