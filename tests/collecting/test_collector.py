"""Collecting on flux-tiny: the right values, and the same bytes whoever computes."""

import pytest
import safetensors.torch
import torch

from flux_ir.activations.shards import SHARD_IMAGES, read_shard
from flux_ir.collecting.batches import gpu_batch, largest_that_fits
from flux_ir.collecting.collector import GPU_WRITERS, Collector
from flux_ir.collecting.shard_notes import read_notes
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.recording.statistics import SiteStatistics, read_statistics
from flux_ir.recording.stored_dtype import dequantised
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
    rows_of,
    settings_of,
    tensor_of,
)

SHARD = "shards/000000.safetensors"


def test_a_shard_holds_what_the_network_put_out_for_its_prompts_and_seeds(suite, plain):
    batch = rows_of(plain)[:3]
    with suite.text_encoders() as encoders:
        texts = [encode(encoders.t5, encoders.clip, [row["prompt"]]) for row in batch]
    text = TextEmbedding(torch.cat([text.txt for text in texts]), torch.cat([text.y for text in texts]))
    noise = noise_for([row["seed"] for row in batch], HEIGHT, WIDTH, "cpu", torch.bfloat16)
    sink = MemorySink()
    with suite.transformer() as model, Recorder(model, SITES, sink):
        for _ in sample(model, prepare(noise, text, HEIGHT, WIDTH), recipe_of().timesteps, 2.5):
            pass
    for number, row in enumerate(batch):
        for step in (0, 1):
            for site in SITES:
                assert torch.equal(tensor_of(plain, row, f"{site}/step_{step}"), sink.values[step, site][number])
            assert torch.equal(tensor_of(plain, row, f"state/step_{step}"), sink.contexts[step].img[number])


def test_rows_and_headers_say_what_lies_where(plain):
    rows = rows_of(plain)
    assert [row["prompt"] for row in rows] == PROMPTS[:5]
    shard = read_shard(plain / SHARD)
    for number, row in enumerate(rows):
        assert (row["shard"], row["row"]) == (SHARD, number)
        assert row["used_txt"] == len(row["prompt"].split()) + 1  # and the end mark
        assert set(row) == {"id", "prompt", "repeat", "seed", "shard", "row", "used_txt"}
        for word in ("id", "prompt", "seed", "repeat"):
            assert shard.metadata[f"{word}s"][number] == row[word]
        assert shard.metadata["used_txt"][number] == row["used_txt"]
    assert (shard.metadata["sites"], shard.metadata["steps"]) == ([str(site) for site in SITES], [0, 1])
    assert (shard.metadata["width"], shard.metadata["height"]) == (WIDTH, HEIGHT)
    assert not list(plain.rglob("*partial*"))


def test_statistics_are_those_of_all_stored_values(plain):
    statistics = read_statistics(plain / "stats.safetensors")
    tensors = safetensors.torch.load_file(plain / SHARD)
    assert set(statistics) == {f"{site}/step_{step}" for site in SITES for step in (0, 1)}
    for key, told in statistics.items():
        values = tensors[key].flatten(0, 1).double()
        assert told.count == len(values)
        assert torch.allclose(told.mean, values.mean(0), atol=1e-12)
        assert torch.allclose(told.second_moment, values.square().mean(0), rtol=1e-12)
        assert isinstance(told, SiteStatistics)


def test_token_places_are_drawn_for_each_generation_and_are_in_order(suite, plain, tmp_path):
    collected(tmp_path, settings_of(tokens_per_image=4), suite)
    rows, places = rows_of(tmp_path), []
    for row, same in zip(rows, rows_of(plain), strict=True):
        kept = tensor_of(tmp_path, row, "img_positions").tolist()
        assert len(set(kept)) == 4
        assert kept == sorted(kept)
        assert kept[-1] < IMG_TOKENS
        for key in ("double.1.img/step_1", "state/step_1"):
            assert torch.equal(tensor_of(tmp_path, row, key), tensor_of(plain, same, key)[kept])
        places.append(tuple(kept))
    assert len(set(places)) > 1


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.02), (torch.float32, 0.0), (torch.float8_e4m3fn, None)])
def test_values_are_rounded_to_what_is_asked_for(suite, plain, tmp_path, dtype, atol):
    collected(tmp_path, settings_of(stored_dtype=dtype), suite)
    for row in rows_of(tmp_path):
        key = "single.1/step_1"
        values, exact = tensor_of(tmp_path, row, key), tensor_of(plain, row, key).float()
        scale = tensor_of(tmp_path, row, f"{key}/scale") if dtype == torch.float8_e4m3fn else None
        assert values.dtype == dtype
        tolerance = atol if atol is not None else exact.abs().max().item() / 12
        assert (dequantised(values, scale).float() - exact).abs().max() <= tolerance
        assert tensor_of(tmp_path, row, "state/step_1").dtype == torch.bfloat16  # as the network has it


def test_pictures_and_latents_are_kept_on_demand_and_nothing_else_changes(plain, tmp_path):
    suite = new_suite(autoencoder=True)
    collected(tmp_path, settings_of(save_images=True, save_latents=True), suite)
    assert (tmp_path / SHARD).read_bytes() == (plain / SHARD).read_bytes()
    for row in rows_of(tmp_path):
        assert row["image"]["path"] == f"pictures/000000/{row['id']}.jpg"
        assert (tmp_path / row["image"]["path"]).read_bytes().startswith(b"\xff\xd8")
        assert all(
            (tmp_path / row[extra]["path"]).stat().st_size == row[extra]["bytes"] for extra in ("image", "latent")
        )
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
    job.on_gpu, job.workers = True, GPU_WRITERS  # as for a GPU, on the CPU with its single thread
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
        assert gpu_batch(model, recipe_of(sites=SITES[:1], steps=(0,), num_steps=1)) == SHARD_IMAGES


def test_ranks_share_shards_and_change_no_byte(suite, small_shards, plain_pairs, tmp_path):
    settings = settings_of(batch_size=1)
    shares = [collected(tmp_path, settings, suite, rank, world_size=2) for rank in (1, 0)]
    assert list(map(len, shares)) == [2, 3]
    assert collected(tmp_path, settings, suite) == []  # all is there but the merged files
    assert files_of(tmp_path) == files_of(plain_pairs)


def test_rows_and_statistics_of_several_shards_are_merged_in_order(plain, plain_pairs):
    rows = rows_of(plain_pairs)
    assert [(row["shard"][-18:-12], row["row"]) for row in rows] == [
        ("000000", 0), ("000000", 1), ("000001", 0), ("000001", 1), ("000002", 0)
    ]  # fmt: skip
    assert [row["id"] for row in rows] == [row["id"] for row in rows_of(plain)]
    every, told = (read_statistics(folder / "stats.safetensors") for folder in (plain, plain_pairs))
    for of, sums in told.items():
        assert sums.count == every[of].count
        torch.testing.assert_close(sums.mean, every[of].mean, atol=0.02, rtol=0.02)  # of other batches
    each = [
        read_notes(LocalStorage(plain_pairs), number).statistics["double.1.img/step_1"].count for number in range(3)
    ]
    assert each == [2 * IMG_TOKENS, 2 * IMG_TOKENS, IMG_TOKENS]


def test_a_complete_collection_is_looked_at_and_nothing_is_made(suite, whole, plain):
    job = Collector(settings_of(), suite, LocalStorage(whole), Ranks())
    assert list(job.verify()) == [True]
    assert (job.missing, job.prompts_to_encode) == (0, 0)
    assert list(job.encode()) == list(job.record()) == []
    list(job.merge())
    assert files_of(whole) == files_of(plain)


@pytest.mark.parametrize(("fits", "most", "found"), [(64, 64, 64), (20, 64, 16), (1, 64, 1), (0, 8, 1), (99, 5, 4)])
def test_the_largest_batch_is_found_by_halving(fits, most, found):
    def attempt(size):
        if size > fits:
            raise torch.OutOfMemoryError

    assert largest_that_fits(attempt, most) == found
