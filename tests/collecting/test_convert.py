"""An old collection becomes what collecting anew gives, whatever interrupts it; what is broken in it is named."""

import shutil

import pytest
import torch

from flux_ir import convert_collection
from flux_ir.activations import shards
from flux_ir.api.progress import Progress
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.convert import Conversion
from flux_ir.collecting.storage import LocalStorage
from flux_ir.commands.main import main
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from tests.collecting.old_collections import write_old_collection
from tests.collecting.small_jobs import PROMPTS, collected, files_of, settings_of

SETTINGS = {"prompts": PROMPTS[:3], "repeats": 2, "batch_size": 2}  # batches end where shards of two or four do


@pytest.fixture(scope="module")
def old(suite, tmp_path_factory):
    """An old collection of six generations. Read it only."""
    folder = tmp_path_factory.mktemp("old")
    write_old_collection(folder, settings_of(**SETTINGS, save_latents=True), suite)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)


def test_it_becomes_what_collecting_anew_gives(suite, small_shards, old, tmp_path):
    events = []
    done = convert_collection(old, tmp_path / "new", progress=events.append)
    collected(tmp_path / "anew", settings_of(**SETTINGS, save_latents=True), suite)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "anew")
    assert (done.where, done.generations) == (str(tmp_path / "new"), 6)
    assert events == [Progress("convert", number, 6) for number in (0, 2, 4, 6)]
    job = Collector(settings_of(**SETTINGS, save_latents=True), suite, LocalStorage(tmp_path / "new"), Ranks())
    assert list(job.verify()) == [True] * 3  # and may be gone on with


@pytest.mark.parametrize("changes", [{"tokens_per_image": 5, "stored_dtype": torch.float8_e4m3fn}])
def test_float8_and_chosen_tokens_are_taken_as_they_are(suite, tmp_path, changes):
    settings = settings_of(prompts=PROMPTS[:2], batch_size=2, **changes)
    write_old_collection(tmp_path / "old", settings, suite)
    convert_collection(tmp_path / "old", tmp_path / "new")
    collected(tmp_path / "anew", settings, suite)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "anew")


def test_it_goes_on_where_it_was_stopped(small_shards, old, tmp_path):
    convert_collection(old, tmp_path / "whole")
    stopped = Conversion(LocalStorage(old), LocalStorage(tmp_path / "stopped")).run()
    assert next(stopped) == 2
    stopped.close()
    first = tmp_path / "stopped/shards/000000.safetensors"
    made = first.stat().st_mtime_ns
    assert not (tmp_path / "stopped/index.jsonl").exists()
    convert_collection(old, tmp_path / "stopped")
    assert first.stat().st_mtime_ns == made  # not made twice
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_the_command_says_what_it_made_and_the_old_folder_is_refused_by_name(old, tmp_path, capsys):
    assert main(["convert-collection", "--captures", str(old), "--output_dir", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.startswith("collection converted\n6 generations")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:3]))
    words = ["--prompts", str(prompts), "--sites", "single.1", "--model", "flux-tiny", "--output_dir", str(old)]
    assert main(["collect", *words]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith(f"error: {old} is an old collection, with a file for every generation (version 1)")
    assert hint == f"hint: convert it: flux-ir convert-collection --captures {old} --output_dir NEW"


def broken(folder):
    path = min(folder.glob("groups/*/*.pt"))
    path.write_bytes(path.read_bytes()[:-1])


def unfinished(folder):
    (folder / "index.jsonl").unlink()


def reordered(folder):
    path = folder / "index.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (broken, r"groups/000000/.*\.pt of .* is broken or gone"),
        (unfinished, "an old collection must be complete: index.jsonl of .* has fewer than its 6 generations"),
        (reordered, "index.jsonl of .* must hold every generation that collection.json tells of, in order"),
        (lambda folder: (folder / "collection.json").unlink(), "must be a collection: it has no collection.json"),
        (lambda folder: (folder / "collection.json").write_text("{"), "collection.json in .* is broken"),
    ],
)
def test_an_old_folder_that_is_not_whole_is_one_clear_line(old, tmp_path, harm, message):
    shutil.copytree(old, tmp_path / "harmed")
    harm(tmp_path / "harmed")
    with pytest.raises(FluxIRError, match=message):
        convert_collection(tmp_path / "harmed", tmp_path / "new")
    assert not list(tmp_path.glob("new/shards/*"))


def test_a_new_collection_needs_no_conversion(plain, tmp_path):
    with pytest.raises(FluxIRError, match="must be an old collection, of version 1: it is of version 2") as caught:
        convert_collection(plain, tmp_path / "new")
    assert caught.value.hint == "it needs no conversion"
