"""The folder of a collection: what it says of itself, how it is divided, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from flux_ir.activations.shards import SHARD_BYTES, SHARD_IMAGES
from flux_ir.collecting.batches import CPU_BATCH, MOST_BYTES, cpu_batch
from flux_ir.collecting.collection import (
    COLLECTION,
    Collection,
    CollectSettings,
    as_lines,
    check_same,
    publish_description,
    read_index,
    stored_description,
)
from flux_ir.collecting.recipe import Recipe, recorded_bytes
from flux_ir.collecting.shard_notes import ShardNotes, facts_of, notes_content, notes_name, read_notes
from flux_ir.collecting.storage import LocalStorage
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.sites import Site, all_sites

SPEC = get_spec("flux-tiny")
SITES = tuple(map(Site.parse, ("double.0.img", "single.1")))


def settings_of(prompts=("a", "b"), repeats=1, **more):
    recipe = Recipe(SPEC, 64, 48, 3, 2.5, SITES, (0, 2), torch.float8_e4m3fn, torch.bfloat16, tokens_per_image=4)
    return CollectSettings(recipe, list(prompts), repeats, **more)


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


@pytest.fixture
def described(storage):
    settings = settings_of(batch_size=8)
    publish_description(storage, settings, settings.described(device="cpu", weights="0f"), versions={"torch": "2.8"})
    return stored_description(storage)


def test_it_says_every_setting_and_what_readers_need(described):
    assert described["settings"]["sites"] == ["double.0.img", "single.1"]
    assert described["settings"]["store_dtype"] == "float8_e4m3fn"
    assert described["settings"]["dtype"] == "bfloat16"
    assert described["settings"]["prompts"]["count"] == 2
    assert (described["generations"], described["images_per_shard"], described["shards"]) == (2, SHARD_IMAGES, 1)
    assert (described["txt_tokens"], described["img_tokens"], described["kept_img_tokens"]) == (SPEC.text_tokens, 12, 4)
    assert described["model"]["hidden_size"] == SPEC.flux.hidden_size
    assert described["versions"] == {"torch": "2.8"}


def test_the_same_settings_are_the_same(storage, described):
    check_same(storage, described, settings_of(batch_size=8).described(device="cpu", weights="0f"))
    check_same(storage, described, settings_of(batch_size=None).described(device="cpu", weights="0f"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"repeats": 2}, "repeats 1 there, 2 now"),
        ({"prompts": ("b", "a")}, "prompts 2 (sha256 "),
        ({"save_images": True}, "save_images False there, True now"),
        ({"batch_size": 4}, "batch_size 8 there, 4 now"),
    ],
)
def test_every_difference_is_told(storage, described, settings, told):
    with pytest.raises(FluxIRError) as caught:
        check_same(storage, described, settings_of(**settings).described(device="cpu", weights="0f"))
    assert told in caught.value.message


def test_other_weights_and_another_kind_of_device_are_refused(storage, described):
    with pytest.raises(FluxIRError, match="weights 0f there, 0e now; device cpu there, cuda now"):
        check_same(storage, described, settings_of().described(device="cuda", weights="0e"))


def test_there_is_no_description_before_there_is_one(storage):
    assert stored_description(storage) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 2}', '{"version": 2, "settings": 5}'])
def test_a_broken_description_is_one_clear_line(storage, text):
    storage.publish(text.encode(), COLLECTION)
    with pytest.raises(FluxIRError, match=r"collection.json in .* must say what was collected"):
        stored_description(storage)


def test_a_collection_of_a_later_program_is_left_alone(storage):
    storage.publish(b'{"version": 3, "settings": {}}', COLLECTION)
    with pytest.raises(FluxIRError, match="is a collection of version 3: this program knows 2"):
        stored_description(storage)


def test_an_old_collection_is_refused_with_the_command_that_converts_it(storage):
    storage.publish(b'{"version": 1, "settings": {}}', COLLECTION)
    with pytest.raises(FluxIRError, match="is an old collection, with a file for every generation") as caught:
        stored_description(storage)
    assert caught.value.hint == f"convert it: flux-ir convert-collection --captures {storage.where} --output_dir NEW"


@pytest.mark.parametrize("batch_size", [0, SHARD_IMAGES + 1])
def test_a_batch_fits_into_a_shard(batch_size):
    with pytest.raises(FluxIRError, match=f"--batch_size must be from 1 to {SHARD_IMAGES}"):
        settings_of(batch_size=batch_size)


def test_shards_and_batches_are_fixed_slices_of_the_work(storage):
    collection = Collection(storage, settings_of("abc", repeats=50), batch_size=24)
    shards = [collection.shard(number) for number in range(collection.shards)]
    assert [len(shard.items) for shard in shards] == [64, 64, 22]
    assert [[len(batch) for batch in shard.batches] for shard in shards] == [
        [22, 22, 20],
        [22, 22, 20],
        [22],
    ]  # as even as can be
    every = [item for shard in shards for batch in shard.batches for item in batch]
    assert every == collection.work.items(0, 150)
    assert shards[2].name == "shards/000002.safetensors"


def test_large_generations_make_shards_of_fewer(storage):
    recipe = settings_of().recipe
    full = get_spec("flux-schnell")
    sites = tuple(all_sites(full.flux.depth, full.flux.depth_single_blocks))[:40]
    wide = replace(recipe, spec=full, sites=sites, width=256, height=256, tokens_per_image=None)
    settings = replace(settings_of("ab"), recipe=wide)
    assert settings.shard_images == SHARD_BYTES // wide.generation_bytes
    assert 0 < settings.shard_images < SHARD_IMAGES


def test_the_header_of_a_shard_says_what_its_rows_are_and_its_bytes_are_known_before(storage):
    settings = settings_of("ab")
    shard = Collection(storage, settings, batch_size=2).shard(0)
    layout = shard.layout(settings.recipe, [3, 4])
    assert (list(layout.rows), list(layout.facts)) == (
        ["ids", "prompts", "seeds", "repeats", "used_txt"],
        ["model", "txt_tokens", "sites", "steps", "width", "height"],
    )
    assert layout.nbytes == len(layout.header()) + 2 * settings.recipe.generation_bytes
    sizes = [tensor.dtype.itemsize for tensor in layout.tensors.values()]
    assert sizes == sorted(sizes, reverse=True)  # so that every tensor begins aligned


def test_what_stands_beside_a_shard_is_read_as_it_was_written_or_not_at_all(storage):
    sums = SiteStatistics(5)
    sums.add(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    notes = ShardNotes(facts_of(b"abc"), [3, 4], {"image": [facts_of(b"d")] * 2}, {"double.0.img/step_2": sums})
    content = notes_content(notes)
    storage.publish(content, notes_name(7))
    read = read_notes(storage, 7)
    assert notes_content(read) == content
    assert (read.file.bytes, read.used_txt, read.extras["image"][1]) == (3, [3, 4], facts_of(b"d"))
    for at in range(8, len(content), 11):  # the library itself refuses most of these
        storage.publish(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], notes_name(7))
        assert read_notes(storage, 7) is None
    storage.publish(content[:-1], notes_name(7))
    assert read_notes(storage, 7) is None
    assert read_notes(storage, 8) is None


def test_the_index_is_read_row_by_row(storage):
    storage.publish(as_lines([{"id": "a"}, {"id": "b"}]), "index.jsonl")
    assert [row["id"] for row in read_index(storage)] == ["a", "b"]
    assert json.loads(storage.read("index.jsonl").splitlines()[0]) == {"id": "a"}


def test_wide_recordings_make_smaller_batches():
    recipe = settings_of().recipe
    assert cpu_batch(recipe) == CPU_BATCH
    assert recorded_bytes(recipe) == 2 * 2 * SPEC.flux.hidden_size * (12 + SPEC.text_tokens + 12)
    full = get_spec("flux-schnell")
    wide = replace(recipe, spec=full, sites=tuple(all_sites(full.flux.depth, full.flux.depth_single_blocks)), width=256)
    assert cpu_batch(wide) == max(1, MOST_BYTES // recorded_bytes(wide)) < CPU_BATCH
