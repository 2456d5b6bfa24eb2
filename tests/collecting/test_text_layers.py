"""Layers of the text encoders in a collection: heard when a prompt is encoded, kept with each of its generations."""

import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.api.models import encode_prompt
from flux_ir.collecting.collection import Collection
from flux_ir.collecting.storage import LocalStorage
from flux_ir.commands.planning import embeddings_bytes, shard_sizes
from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import TextRecorder
from flux_ir.recording.statistics import read_statistics
from flux_ir.recording.stored_dtype import dequantised
from flux_ir.sae.data.filters import Filters
from flux_ir.sites import Site
from tests.collecting.small_jobs import PROMPTS, SITES, collected, files_of, rows_of, settings_of, tensor_of

LAYERS = (Site("t5", 1), Site("clip", 2))
D = 128


def settings(**changes):
    return settings_of(**{"text_sites": LAYERS, "repeats": 2, "prompts": PROMPTS[:3], **changes})


@pytest.fixture(scope="module")
def with_layers(suite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    collected(folder, settings(), suite)
    return folder


def test_a_generation_has_its_prompts_layers_and_other_tensors_are_as_without(suite, with_layers, tmp_path):
    collected(tmp_path, settings(text_sites=()), suite)
    for row, same in zip(rows_of(with_layers), rows_of(tmp_path), strict=True):
        assert row == same
        with suite.text_encoders() as text, TextRecorder(text, LAYERS) as recorder:
            encode_prompt(suite, row["prompt"])
        for site in LAYERS:
            assert torch.equal(tensor_of(with_layers, row, str(site)), recorder.sink.read(site)[0])
        key = f"{SITES[1]}/step_1"
        assert torch.equal(tensor_of(with_layers, row, key), tensor_of(tmp_path, same, key))


def test_a_layer_is_opened_by_its_name_and_its_padding_is_known(with_layers):
    assert list(map(str, open_source(with_layers).sites)) == sorted(map(str, SITES))
    source, rows = open_source(with_layers / "t5.1"), rows_of(with_layers)
    assert ([str(one) for one in source.sites], source.steps) == (["t5.1"], [0])
    assert (source.d("t5.1"), source.tokens("t5.1")) == (D, 20)
    block = source.read(4, "t5.1", 0)
    assert torch.equal(block.values, tensor_of(with_layers, rows[4], "t5.1"))
    assert (block.prompt, block.used_txt, block.txt_tokens) == (rows[4]["prompt"], rows[4]["used_txt"], 20)
    used = Filters(padding=False).used(source.read_run(range(4, 5), "t5.1", 0))
    assert used.sum() == rows[4]["used_txt"]
    clip = open_source(f"{with_layers}/clip.2")
    assert (
        Filters(padding=False).used(clip.read_run(range(1), "clip.2", 0)) is None
    )  # CLIP's tokens are others than T5's
    assert len({source.identity, clip.identity, open_source(with_layers).identity}) == 3
    with pytest.raises(FluxIRError, match=r"holds no t5\.0"):
        open_source(with_layers / "t5.0")
    with pytest.raises(FluxIRError, match=r"have the site t5\.1, and the step 0 alone: got single\.1 at step 0"):
        source.read(0, "single.1", 0)


def test_statistics_and_sizes_know_the_layers(with_layers):
    told = read_statistics(with_layers / "stats.safetensors")["clip.2"]
    values = torch.stack([tensor_of(with_layers, row, "clip.2") for row in rows_of(with_layers)]).flatten(0, 1).double()
    assert told.count == len(values)
    assert torch.allclose(told.mean, values.mean(0), atol=1e-12)
    files, asked = files_of(with_layers), settings()
    collection = Collection(LocalStorage(with_layers), asked, batch_size=3)
    used = {row["prompt"]: row["used_txt"] for row in rows_of(with_layers)}
    shards = sum(len(content) for name, content in files.items() if name.startswith("shards/"))
    assert shard_sizes(collection, used.__getitem__).shards == shards
    embedded = sum(len(content) for name, content in files.items() if name.startswith("text/"))
    assert embeddings_bytes(asked.recipe, collection.work) == embedded


def test_layers_are_rounded_like_sites(suite, with_layers, tmp_path):
    collected(tmp_path, settings(stored_dtype=torch.float8_e4m3fn), suite)
    for row in rows_of(tmp_path)[:2]:
        values, exact = tensor_of(tmp_path, row, "t5.1"), tensor_of(with_layers, row, "t5.1").float()
        assert values.dtype == torch.float8_e4m3fn
        near = dequantised(values, tensor_of(tmp_path, row, "t5.1/scale")).float()
        torch.testing.assert_close(near, exact, atol=exact.abs().max().item() / 12, rtol=0.1)


def test_layers_alone_are_collected_and_a_collection_that_was_stopped_goes_on(suite, with_layers, tmp_path):
    asked = settings(sites=(), steps=(0,))
    assert len(collected(tmp_path, asked, suite)) == 6
    before = files_of(tmp_path)
    next((tmp_path / "shards").iterdir()).unlink()
    (tmp_path / "index.jsonl").unlink()
    assert len(collected(tmp_path, asked, suite)) == 6
    assert files_of(tmp_path) == before
    assert torch.equal(
        tensor_of(tmp_path, rows_of(tmp_path)[0], "t5.1"), tensor_of(with_layers, rows_of(with_layers)[0], "t5.1")
    )
