"""Collecting goes on where it was stopped, and makes again what is broken or missing: nothing is lost or made twice."""

import multiprocessing
import random
import resource
import signal
import time
from contextlib import contextmanager
from itertools import islice
from multiprocessing import forkserver

import pytest

from flux_ir.collecting.collector import Collector
from flux_ir.collecting.embeddings import embedding_name
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from tests.collecting import lives
from tests.collecting.small_jobs import PROMPTS, collect, collected, files_of, new_suite, rows_of, settings_of

SHARD = "shards/000000.safetensors"


def flip(path, at=0.6):
    """Flips one bit; `at` is the place as a fraction of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_one(path):
    path.write_bytes(path.read_bytes()[:-1])


def broken_in(folder):
    return sorted(path.relative_to(folder / "broken").as_posix() for path in folder.glob("broken/**/*.*"))


def test_a_picture_that_was_found_broken_is_drawn_again(tmp_path):
    suite, settings = new_suite(autoencoder=True), settings_of(save_images=True, prompts=PROMPTS[:2])
    collected(tmp_path, settings, suite)
    before, path = files_of(tmp_path), rows_of(tmp_path)[1]["image"]["path"]
    flip(tmp_path / path)
    collected(tmp_path, settings, suite)
    assert files_of(tmp_path) == before
    assert broken_in(tmp_path) == [path]


@pytest.mark.parametrize("items", [1, 2, 3, 5])
def test_it_goes_on_where_it_was_stopped(suite, small_shards, plain_pairs, tmp_path, items):
    settings = settings_of(batch_size=1)
    stopped = collect(settings, suite, LocalStorage(tmp_path), Ranks())
    assert len(list(islice(stopped, items))) == items
    stopped.close()
    assert not (tmp_path / "index.jsonl").exists()
    assert not list(tmp_path.glob("partial/*/*.safetensors"))  # what was begun is gone
    job = Collector(settings, suite, LocalStorage(tmp_path), Ranks())
    assert sum(job.verify()) == {1: 0, 2: 1, 3: 1, 5: 3}[items]  # whole shards
    collected(tmp_path, settings, suite)
    assert files_of(tmp_path) == files_of(plain_pairs)


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("number", [0, 2])
def test_a_broken_shard_is_moved_aside_and_computed_again(suite, small_shards, whole_pairs, plain_pairs, harm, number):
    path = f"shards/{number:06d}.safetensors"
    harm(whole_pairs / path)
    job = Collector(settings_of(batch_size=1), suite, LocalStorage(whole_pairs), Ranks())
    assert list(job.verify()) == [each != number for each in range(3)]
    assert job.missing == {0: 2, 2: 1}[number]
    assert not (whole_pairs / "index.jsonl").exists()  # it is not complete
    collected(whole_pairs, settings_of(batch_size=1), suite)
    assert files_of(whole_pairs) == files_of(plain_pairs)
    assert broken_in(whole_pairs) == [path]


def test_sizes_alone_are_looked_at_on_demand(suite, whole):
    flip(whole / SHARD)
    job = Collector(settings_of(verify="sizes"), suite, LocalStorage(whole), Ranks())
    assert list(job.verify()) == [True]
    cut(whole / SHARD)
    job = Collector(settings_of(verify="sizes"), suite, LocalStorage(whole), Ranks())
    assert list(job.verify()) == [False]


@pytest.mark.parametrize(
    "pattern",
    ["stats/000000.safetensors", "index.jsonl", "stats.safetensors", "stats.sha256", "text/*/*.safetensors"],
)
@pytest.mark.parametrize("harm", [flip, cut, cut_one])
def test_every_other_broken_file_is_made_again(suite, whole, plain, pattern, harm):
    harm(min(whole.glob(pattern)))
    collected(whole, settings_of(), suite)
    assert files_of(whole) == files_of(plain)


def test_missing_notes_are_made_again_and_a_missing_embedding_is_not_needed(suite, whole, plain):
    (whole / embedding_name(PROMPTS[0])).unlink()
    assert collected(whole, settings_of(), suite) == []
    before = files_of(plain)
    del before[embedding_name(PROMPTS[0])]
    assert files_of(whole) == before
    (whole / "stats/000000.safetensors").unlink()
    collected(whole, settings_of(), suite)
    assert files_of(whole) == files_of(plain)


def test_a_file_broken_twice_is_kept_twice(suite, whole, plain):
    for _ in range(2):
        flip(whole / SHARD)
        collected(whole, settings_of(), suite)
    assert files_of(whole) == files_of(plain)
    assert broken_in(whole) == [SHARD, f"{SHARD}.1"]


def test_an_embedding_that_broke_meanwhile_is_named(suite, whole):
    settings = settings_of(verify="sizes")
    (whole / SHARD).unlink()
    flip(whole / embedding_name(PROMPTS[0]))
    with pytest.raises(FluxIRError, match=r"the embedding of 'a red circle' in .* is broken or gone"):
        collected(whole, settings, suite)
    collected(whole, settings_of(), suite)


# ---- Killed


def check_killed(folder, plain, *, kills, seed):
    """Starts the job again and again; each time it is killed within a fifth of the time that the whole of it takes."""
    # One that runs already, of another test, would not take the module: it is ended as Python's own tests do.
    forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.collecting.lives_loaded"])  # loads the model once: a life begins at once

    def live(into, most_seconds=None):
        begun = time.perf_counter()
        life = context.Process(target=lives.live, args=(folder / into,))
        life.start()
        life.join(most_seconds)
        life.kill()
        life.join()
        return life.exitcode, time.perf_counter() - begun

    assert live("first")[0] == 0
    code, seconds = live("timed")
    assert code == 0
    draw = random.Random(seed)
    codes = [live("killed", draw.random() * seconds / 5)[0] for _ in range(kills)]
    assert codes.count(-signal.SIGKILL) > kills // 2  # most of them died
    assert set(codes) <= {0, -signal.SIGKILL}
    assert not (folder / "killed" / "broken").exists()
    assert live("killed")[0] == 0
    assert files_of(folder / "killed") == files_of(folder / "timed") == plain


def test_killed_at_twenty_random_moments_the_folder_is_the_same(suite, monkeypatch, tmp_path):
    lives.settle(monkeypatch.setattr)
    collected(tmp_path / "plain", lives.SETTINGS, suite)
    check_killed(tmp_path, files_of(tmp_path / "plain"), kills=20, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_at_sixty_random_moments_the_folder_is_the_same(suite, monkeypatch, tmp_path, seed):
    lives.settle(monkeypatch.setattr)
    collected(tmp_path / "plain", lives.SETTINGS, suite)
    check_killed(tmp_path, files_of(tmp_path / "plain"), kills=60, seed=seed)


@contextmanager
def largest_file(size):
    """Files end at so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_one_clear_line_and_it_goes_on_afterwards(suite, plain, tmp_path):
    with largest_file(20_000), pytest.raises(FluxIRError, match=r"cannot write .*: File too large") as caught:
        collected(tmp_path, settings_of(), suite)
    assert "free some space" in str(caught.value.hint)
    assert list(tmp_path.glob("shards/*")) == list(tmp_path.glob("partial/*/*")) == []
    collected(tmp_path, settings_of(), suite)
    assert files_of(tmp_path) == files_of(plain)
