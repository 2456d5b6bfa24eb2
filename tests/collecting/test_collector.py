"""Collecting on flux-tiny: the right values, and the same bytes whoever computes."""

import json

import pytest
import safetensors.torch
import torch

from flux_ir.collecting.collector import GPU_WRITERS, Collector
from flux_ir.collecting.fitting import gpu_batch, largest_that_fits
from flux_ir.collecting.groups import GROUP
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.recording.statistics import SiteStatistics, read_statistics
from flux_ir.recording.store import file_bytes, load_capture
from flux_ir.sampling.generate import noise_for, prepare, sample
from tests.collecting.small_jobs import (
    HEIGHT,
    IMG_TOKENS,
    PROMPTS,
    SITES,
    WIDTH,
    collected,
    files_of,
    new_suite,
    recipe_of,
    settings_of,
)


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


def test_the_autoencoder_is_neither_located_nor_loaded_without_pictures(suite, plain):
    assert suite.source.autoencoder is None
    assert suite._autoencoder is None


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


@pytest.mark.parametrize(("fits", "most", "found"), [(64, 64, 64), (20, 64, 16), (1, 64, 1), (0, 8, 1), (99, 5, 4)])
def test_the_largest_batch_is_found_by_halving(fits, most, found):
    def attempt(size):
        if size > fits:
            raise torch.OutOfMemoryError

    assert largest_that_fits(attempt, most) == found
