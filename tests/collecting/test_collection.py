"""The folder of a collection: what it says of itself, how it is divided, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from flux_ir.collecting.batches import Recipe, recorded_bytes
from flux_ir.collecting.collection import (
    COLLECTION,
    Collection,
    CollectSettings,
    check_same,
    publish_description,
    read_index,
    stored_description,
)
from flux_ir.collecting.fitting import CPU_BATCH, MOST_BYTES, cpu_batch
from flux_ir.collecting.groups import GROUP, as_lines, read_rows
from flux_ir.collecting.storage import LocalStorage
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec
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
    assert described["settings"]["dtype"] == "float8_e4m3fn"
    assert described["settings"]["prompts"]["count"] == 2
    assert (described["generations"], described["group"]) == (2, GROUP)
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


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1}', '{"version": 1, "settings": 5}'])
def test_a_broken_description_is_one_clear_line(storage, text):
    storage.publish(text.encode(), COLLECTION)
    with pytest.raises(FluxIRError, match=r"collection.json in .* must say what was collected"):
        stored_description(storage)


def test_a_collection_of_a_later_program_is_left_alone(storage):
    storage.publish(b'{"version": 2, "settings": {}}', COLLECTION)
    with pytest.raises(FluxIRError, match="is a collection of version 2: this program knows 1"):
        stored_description(storage)


@pytest.mark.parametrize("batch_size", [0, GROUP + 1])
def test_a_batch_fits_into_a_group(batch_size):
    with pytest.raises(FluxIRError, match=f"--batch_size must be from 1 to {GROUP}"):
        settings_of(batch_size=batch_size)


def test_groups_and_batches_are_fixed_slices_of_the_work(storage):
    collection = Collection(storage, settings_of("abc", repeats=50), batch_size=24)
    groups = [collection.group(number) for number in range(collection.groups)]
    assert [len(group) for group in groups] == [64, 64, 22]
    assert [[len(batch) for batch in group.batches] for group in groups] == [[24, 24, 16], [24, 24, 16], [22]]
    every = [item for group in groups for batch in group.batches for item in batch]
    assert every == collection.work.items(0, 150)
    assert [group.folder for group in groups] == ["groups/000000", "groups/000001", "groups/000002"]


def test_rows_that_are_broken_are_left_out(storage):
    rows = [{"id": "a", "prompt": "ein gr\u00fcner Kreis"}, {"id": "b", "prompt": "x"}]
    storage.publish(as_lines(rows) + b'{"id": "c", "pro\n\xff\xfe\n[]\n', "rows.jsonl")
    assert read_rows(storage, "rows.jsonl") == rows
    assert read_rows(storage, "none.jsonl") == []


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
