"""Collecting on flux-tiny: the right values, the same bytes whoever computes, and nothing lost or made twice."""

import json
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import safetensors.torch
import torch

from flux_ir.capture.recorder import MemorySink, Recorder
from flux_ir.capture.statistics import SiteStatistics, read_statistics
from flux_ir.capture.store import file_bytes, load_capture
from flux_ir.collect.batches import Recipe
from flux_ir.collect.collection import CollectSettings
from flux_ir.collect.collector import GPU_WRITERS, Collector, collect
from flux_ir.collect.embeddings import embedding_name
from flux_ir.collect.fitting import gpu_batch, largest_that_fits
from flux_ir.collect.groups import GROUP
from flux_ir.collect.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.sources import locate_model
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.sampling.generate import noise_for, prepare, sample
from flux_ir.sites import Site

SPEC = get_spec("flux-tiny")
SITES = tuple(map(Site.parse, ("double.0.txt", "double.1.img", "single.1")))
WIDTH, HEIGHT, IMG_TOKENS = 64, 48, 12
WORDS = ("red", "green", "blue", "yellow", "small", "large")
PROMPTS = [f"a {word} {shape}" for word in WORDS for shape in ("circle", "square", "triangle")]


def new_suite(*, autoencoder=False):
    with pytest.MonkeyPatch.context() as patch:
        for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env):
            patch.delenv(variable, raising=False)
        return Suite(SPEC, locate_model(SPEC, autoencoder=autoencoder), plan(0), torch.bfloat16)


@pytest.fixture(scope="module")
def suite():
    return new_suite()


def recipe_of(**changes):
    recipe = Recipe(
        spec=SPEC,
        width=WIDTH,
        height=HEIGHT,
        num_steps=3,
        guidance=2.5,
        sites=SITES,
        steps=(0, 1),
        stored_dtype=torch.bfloat16,
        network_dtype=torch.bfloat16,
    )
    return replace(recipe, **changes)


def settings_of(*, prompts=PROMPTS[:5], repeats=1, batch_size=3, seed=7, verify="checksums", **changes):
    draws = {name: changes.pop(name, False) for name in ("save_images", "save_latents")}
    recipe = recipe_of(**changes, to_the_end=any(draws.values()))
    return CollectSettings(recipe, prompts, repeats, seed, batch_size, **draws, verify=verify)


def collected(folder, settings, suite, rank=0, world_size=1):
    """Collects, and returns the rows. With several ranks, only this one's share; nothing is merged."""
    job = Collector(settings, suite, LocalStorage(folder, rank=rank), Ranks(rank, world_size))
    list(job.verify())
    list(job.encode())
    rows = list(job.record())
    if world_size == 1:
        list(job.merge())
    return rows


def files_of(folder):
    """Every file but those that were found broken, with its content."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in names.items() if not name.startswith("broken/")}


def broken_in(folder):
    return sorted(path.relative_to(folder / "broken").as_posix() for path in folder.glob("broken/**/*.*"))


@pytest.fixture(scope="module")
def plain(suite, tmp_path_factory):
    """A collection of five generations that nothing happened to. Read it only."""
    folder = tmp_path_factory.mktemp("plain")
    collected(folder, settings_of(), suite)
    return folder


@pytest.fixture
def whole(plain, tmp_path):
    """A copy of it, to be broken."""
    for name, content in files_of(plain).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


# ---- What is collected


def test_a_file_holds_what_the_network_put_out_for_its_prompt_and_seed(suite, plain):
    rows = [json.loads(line) for line in (plain / "index.jsonl").read_text().splitlines()]
    batch = rows[:3]
    with suite.text_encoders() as encoders:
        texts = [encode(encoders.t5, encoders.clip, [row["prompt"]]) for row in batch]
    text = TextEmbedding(torch.cat([text.txt for text in texts]), torch.cat([text.y for text in texts]))
    noise = noise_for([row["seed"] for row in batch], HEIGHT, WIDTH, "cpu", torch.bfloat16)
    sink = MemorySink()
    with suite.transformer() as model, Recorder(model, SITES, sink):
        for _ in sample(model, prepare(noise, text, HEIGHT, WIDTH), recipe_of().timesteps, 2.5):
            pass
    for number, row in enumerate(batch):
        capture = load_capture(plain / row["path"])
        assert (capture.sites, capture.steps) == (sorted(SITES), [0, 1])
        for site in SITES:
            for step in (0, 1):
                assert torch.equal(capture.read(site, step)[0], sink.values[step, site][number])
        assert torch.equal(capture.context(1).img[0], sink.contexts[1].img[number])


def test_rows_say_what_lies_where(suite, plain):
    rows = [json.loads(line) for line in (plain / "index.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS[:5]
    size = file_bytes(recipe_of().plan())
    for row in rows:
        capture = load_capture(plain / row["path"])
        assert capture.metadata["generation_id"] == row["id"]
        assert capture.metadata["seed"] == row["seed"]
        assert (plain / row["path"]).stat().st_size == row["bytes"]
        assert 0 < row["bytes"] - size < 400  # the metadata of the generation
        assert row["used_txt"] == len(row["prompt"].split()) + 1  # and the end mark
        assert (row["sites"], row["steps"]) == ([str(site) for site in sorted(SITES)], [0, 1])
    assert (plain / "groups/000000/index.jsonl").read_bytes() == (plain / "index.jsonl").read_bytes()
    assert not list(plain.rglob("*journal*")) + list(plain.rglob("*partial*"))


def test_statistics_are_those_of_all_stored_values(plain):
    statistics = read_statistics(plain / "stats.safetensors")
    captures = [load_capture(path) for path in plain.glob("groups/*/*.pt")]
    assert set(statistics) == {(site, step) for site in SITES for step in (0, 1)}
    for (site, step), found in statistics.items():
        values = torch.cat([capture.read(site, step)[0] for capture in captures]).double()
        assert found.count == len(values)
        assert torch.allclose(found.mean, values.mean(0), atol=1e-12)
        assert torch.allclose(found.second_moment, values.square().mean(0), rtol=1e-12)
        assert isinstance(found, SiteStatistics)


def test_token_places_are_drawn_for_each_generation_and_are_in_order(suite, tmp_path):
    rows = collected(tmp_path / "some", settings_of(tokens_per_image=4), suite)
    places = [load_capture(tmp_path / "some" / row["path"]).img_positions.tolist() for row in rows]
    assert all(len(set(kept)) == 4 and kept == sorted(kept) and kept[-1] < IMG_TOKENS for kept in places)
    assert len(set(map(tuple, places))) > 1
    all_rows = collected(tmp_path / "all", settings_of(), suite)
    for row, all_row, kept in zip(rows, all_rows, places, strict=True):
        some, everything = (
            load_capture(tmp_path / of / which["path"]) for of, which in (("some", row), ("all", all_row))
        )
        assert torch.equal(some.read(SITES[1], 1), everything.read(SITES[1], 1)[:, kept])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.02), (torch.float32, 0.0), (torch.float8_e4m3fn, None)])
def test_values_are_rounded_to_what_is_asked_for(suite, plain, tmp_path, dtype, atol):
    rows = collected(tmp_path, settings_of(stored_dtype=dtype), suite)
    for row in rows:
        capture, as_made = load_capture(tmp_path / row["path"]), load_capture(plain / row["path"])
        values, scale = capture.read_stored(SITES[2], 1)
        assert values.dtype == dtype
        assert (scale is not None) == (dtype == torch.float8_e4m3fn)
        exact = as_made.read(SITES[2], 1).float()
        tolerance = atol if atol is not None else exact.abs().max().item() / 12
        assert (capture.read(SITES[2], 1).float() - exact).abs().max() <= tolerance


def test_pictures_and_latents_are_kept_on_demand_and_nothing_else_changes(plain, tmp_path):
    suite = new_suite(autoencoder=True)
    rows = collected(tmp_path, settings_of(save_images=True, save_latents=True), suite)
    for row in rows:
        assert (tmp_path / row["path"]).read_bytes() == (plain / row["path"]).read_bytes()
        assert (tmp_path / row["image"]["path"]).read_bytes().startswith(b"\xff\xd8")
        latent = safetensors.torch.load_file(tmp_path / row["latent"]["path"])["latent"]
        assert latent.shape == (16, HEIGHT // 8, WIDTH // 8)
    assert suite._t5 is None
    assert suite._clip is None


def test_a_picture_that_was_found_broken_is_drawn_again(tmp_path):
    suite, settings = new_suite(autoencoder=True), settings_of(save_images=True, prompts=PROMPTS[:2])
    rows = collected(tmp_path, settings, suite)
    before = files_of(tmp_path)
    flip(tmp_path / rows[1]["image"]["path"])
    collected(tmp_path, settings, suite)
    assert files_of(tmp_path) == before
    assert broken_in(tmp_path) == [rows[1]["image"]["path"]]


def test_the_autoencoder_is_neither_located_nor_loaded_without_pictures(suite, plain):
    assert suite.source.autoencoder is None
    assert suite._autoencoder is None


# ---- The same bytes


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_byte(plain, suite, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        collected(tmp_path, settings_of(), suite)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert files_of(tmp_path) == files_of(plain)


def test_a_gpu_records_while_threads_write_and_that_changes_no_byte(suite, plain, tmp_path):
    job = Collector(settings_of(), suite, LocalStorage(tmp_path), Ranks())
    job.two_stages, job.workers = True, GPU_WRITERS  # as for a GPU, on the CPU with its single thread
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in (job.verify(), job.encode(), job.record(), job.merge()):
            list(part)
    finally:
        torch.set_num_threads(before)
    assert files_of(tmp_path) == files_of(plain)


def test_the_batch_of_a_gpu_is_found_with_the_network_itself(suite):
    with suite.transformer() as model:
        assert gpu_batch(model, recipe_of(sites=SITES[:1], steps=(0,), num_steps=1)) == GROUP


def test_ranks_share_groups_and_change_no_byte(suite, tmp_path):
    settings = settings_of(prompts=PROMPTS, repeats=8, batch_size=32, sites=SITES[:1], steps=(0,), tokens_per_image=1)
    collected(tmp_path / "one", settings, suite)
    shares = [collected(tmp_path / "two", settings, suite, rank, world_size=2) for rank in (1, 0)]
    assert list(map(len, shares)) == [GROUP, 2 * len(PROMPTS) * 4 - GROUP]
    assert collected(tmp_path / "two", settings, suite) == []  # all is there but the merged files
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_complete_collection_is_looked_at_and_nothing_is_made(suite, whole, plain):
    job = Collector(settings_of(), suite, LocalStorage(whole), Ranks())
    assert list(job.verify()) == [True] * 5
    assert (job.found, job.missing, job.prompts_to_encode, job.open_generations) == (5, 0, 0, 0)
    assert list(job.encode()) == list(job.record()) == []
    list(job.merge())
    assert files_of(whole) == files_of(plain)


# ---- Interrupted, broken


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


def flip(path, at=0.6):
    """Flips one bit; `at` is the place as a fraction of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_one(path):
    path.write_bytes(path.read_bytes()[:-1])


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


# ---- Wrong input


def test_other_settings_are_refused_with_every_difference(suite, whole):
    other = settings_of(prompts=PROMPTS[:4], steps=(1,), seed=8, stored_dtype=torch.float16)
    with pytest.raises(FluxIRError) as caught:
        Collector(other, suite, LocalStorage(whole), Ranks())
    message = caught.value.message
    assert "was collected with other settings: prompts 5 (sha256 " in message
    assert "; seed 7 there, 8 now; steps 0,1 there, 1 now; dtype bfloat16 there, float16 now" in message
    assert "another --output_dir" in str(caught.value.hint)


def test_a_batch_size_left_open_agrees_with_the_one_that_is_there(suite, whole):
    assert Collector(settings_of(batch_size=None), suite, LocalStorage(whole), Ranks()).collection.batch_size == 3
    with pytest.raises(FluxIRError, match="batch_size 3 there, 5 now"):
        Collector(settings_of(batch_size=5), suite, LocalStorage(whole), Ranks())


def test_merging_waits_for_no_group_that_will_not_come(suite, tmp_path):
    settings = settings_of(prompts=PROMPTS, repeats=4, batch_size=32, sites=SITES[:1], steps=(0,), tokens_per_image=1)
    collected(tmp_path, settings, suite, rank=0, world_size=2)
    job = Collector(settings, suite, LocalStorage(tmp_path), Ranks())
    list(job.verify())
    with pytest.raises(FluxIRError, match=r"groups/000001 of .* is not finished"):
        list(job.merge())


@pytest.mark.parametrize(("fits", "most", "found"), [(64, 64, 64), (20, 64, 16), (1, 64, 1), (0, 8, 1), (99, 5, 4)])
def test_the_largest_batch_is_found_by_halving(fits, most, found):
    def attempt(size):
        if size > fits:
            raise torch.OutOfMemoryError

    assert largest_that_fits(attempt, most) == found
