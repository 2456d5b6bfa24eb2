"""Collecting goes on where it was stopped, and makes again what is broken or missing: nothing is lost or made twice."""

import json
import resource
import signal
from contextlib import contextmanager
from itertools import islice

import pytest

from flux_ir.collecting.collector import Collector, collect
from flux_ir.collecting.embeddings import embedding_name
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from tests.collecting.small_jobs import PROMPTS, collected, files_of, new_suite, settings_of


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
    rows = collected(tmp_path, settings, suite)
    before = files_of(tmp_path)
    flip(tmp_path / rows[1]["image"]["path"])
    collected(tmp_path, settings, suite)
    assert files_of(tmp_path) == before
    assert broken_in(tmp_path) == [rows[1]["image"]["path"]]


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_it_goes_on_where_it_was_stopped(suite, plain, tmp_path, rows):
    with_two_repeats = settings_of()
    stopped = collect(with_two_repeats, suite, LocalStorage(tmp_path), Ranks())
    assert len(list(islice(stopped, rows))) == rows
    stopped.close()
    assert not (tmp_path / "index.jsonl").exists()
    job = Collector(with_two_repeats, suite, LocalStorage(tmp_path), Ranks())
    assert all(job.verify())
    assert job.found in (3, 5)  # whole batches; the second may have been finished before the stop
    collected(tmp_path, with_two_repeats, suite)
    assert files_of(tmp_path) == files_of(plain)


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("number", [0, 4])
def test_a_broken_capture_is_moved_aside_and_computed_again(suite, whole, plain, harm, number):
    path = json.loads((whole / "index.jsonl").read_text().splitlines()[number])["path"]
    harm(whole / path)
    job = Collector(settings_of(), suite, LocalStorage(whole), Ranks())
    assert list(job.verify()) == [each != number for each in range(5)]
    assert job.missing == 1
    assert not (whole / "index.jsonl").exists()  # it is not complete
    collected(whole, settings_of(), suite)
    assert files_of(whole) == files_of(plain)
    assert broken_in(whole) == [path]


def test_sizes_alone_are_looked_at_on_demand(suite, whole):
    flip(whole / json.loads((whole / "index.jsonl").read_text().splitlines()[0])["path"])
    job = Collector(settings_of(verify="sizes"), suite, LocalStorage(whole), Ranks())
    assert list(job.verify()) == [True] * 5


@pytest.mark.parametrize(
    "pattern",
    [
        "groups/000000/index.jsonl",
        "groups/000000/stats.safetensors",
        "groups/000000/stats.sha256",
        "index.jsonl",
        "stats.safetensors",
        "text/*/*.safetensors",
    ],
)
@pytest.mark.parametrize("harm", [flip, cut, cut_one])
def test_every_other_broken_file_is_made_again(suite, whole, plain, pattern, harm):
    harm(min(whole.glob(pattern)))
    collected(whole, settings_of(), suite)
    assert files_of(whole) == files_of(plain)


def test_missing_statistics_are_made_again_and_a_missing_embedding_is_not_needed(suite, whole, plain):
    (whole / "groups/000000/stats.safetensors").unlink()
    (whole / embedding_name(PROMPTS[0])).unlink()
    collected(whole, settings_of(), suite)
    before = files_of(plain)
    del before[embedding_name(PROMPTS[0])]
    assert files_of(whole) == before


def test_a_file_broken_twice_is_kept_twice(suite, whole, plain):
    path = json.loads((whole / "index.jsonl").read_text().splitlines()[2])["path"]
    for _ in range(2):
        flip(whole / path)
        collected(whole, settings_of(), suite)
    assert files_of(whole) == files_of(plain)
    assert broken_in(whole) == [path, f"{path}.1"]


def test_a_journal_cut_short_costs_only_what_it_lacks(suite, plain, tmp_path):
    rows = (plain / "index.jsonl").read_bytes()
    for name, content in files_of(plain).items():
        if not name.endswith(("index.jsonl", "stats.safetensors", "stats.sha256")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    (tmp_path / "groups/000000/journal.jsonl").write_bytes(rows[:-20])
    job = Collector(settings_of(), suite, LocalStorage(tmp_path), Ranks())
    assert sum(job.verify()) == 4
    assert job.missing == 1
    collected(tmp_path, settings_of(), suite)
    assert files_of(tmp_path) == files_of(plain)


def test_an_embedding_that_broke_meanwhile_is_named(suite, whole):
    settings = settings_of(verify="sizes")
    (whole / json.loads((whole / "index.jsonl").read_text().splitlines()[0])["path"]).unlink()
    flip(whole / embedding_name(PROMPTS[0]))
    with pytest.raises(FluxIRError, match=r"the embedding of 'a red circle' in .* is broken or gone"):
        collected(whole, settings, suite)
    collected(whole, settings_of(), suite)


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
    with largest_file(20_000), pytest.raises(FluxIRError, match=r"cannot write .*\.pt: File too large") as caught:
        collected(tmp_path, settings_of(), suite)
    assert "free some space" in str(caught.value.hint)
    assert not list(tmp_path.glob("groups/*/*.pt"))
    collected(tmp_path, settings_of(), suite)
    assert files_of(tmp_path) == files_of(plain)
