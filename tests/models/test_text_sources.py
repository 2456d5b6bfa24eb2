"""Where the text encoders come from, part by part."""

import shutil

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.registry import packaged_spec
from flux_ir.models.text_sources import locate_text

pytestmark = pytest.mark.usefixtures("hub_cache")
REPO = "black-forest-labs/FLUX.1-schnell"


@pytest.fixture
def root(tmp_path, save_text):
    folder = tmp_path / "root"
    save_text(folder / "text_encoder", folder / "tokenizer")
    save_text(folder / "text_encoder_2", folder / "tokenizer_2")
    return folder


def test_t5_and_clip_are_taken_from_the_folder_of_the_checkpoint(tiny_spec, root, monkeypatch):
    text = locate_text(tiny_spec(), root)
    assert text.t5 == (root / "text_encoder_2", root / "tokenizer_2", "--checkpoint")
    assert text.clip == (root / "text_encoder", root / "tokenizer", "--checkpoint")
    monkeypatch.setenv("FLUX_MODEL", str(root))
    assert locate_text(tiny_spec()).t5.origin == "FLUX_MODEL"


def test_folder_of_a_packaged_model_may_be_named_too(packaged_folder, tiny_spec):
    assert locate_text(tiny_spec(), packaged_folder).t5.model_dir == packaged_folder / "t5"


def test_shipped_encoders_are_used_for_a_checkpoint_without_any(packaged_folder, tmp_path):
    (tmp_path / "own").mkdir()
    text = locate_text(packaged_spec("flux-tiny", packaged_folder), tmp_path / "own")
    assert text.clip.origin == "the package"


def test_cached_repository_of_the_model_is_used(tiny_spec, root, hub_cache):
    snapshot = hub_cache(REPO, root)
    assert locate_text(tiny_spec()).t5 == (snapshot / "text_encoder_2", snapshot / "tokenizer_2", "the hub's cache")


def test_open_repositories_in_the_cache_stand_in(tiny_spec, tmp_path, save_text, hub_cache):
    t5 = hub_cache("google/t5-v1_1-xxl", save_text(tmp_path / "t5", tmp_path / "t5"))
    clip = hub_cache("openai/clip-vit-large-patch14", save_text(tmp_path / "clip", tmp_path / "clip"))
    text = locate_text(tiny_spec())
    assert text.t5.model_dir == text.t5.tokenizer_dir == t5
    assert text.clip.model_dir == text.clip.tokenizer_dir == clip


def test_half_fetched_copy_in_the_cache_gives_way_to_a_whole_one(tiny_spec, root, tmp_path, save_text, hub_cache):
    (root / "text_encoder_2" / "model.safetensors").unlink()
    hub_cache(REPO, root)
    t5 = hub_cache("google/t5-v1_1-xxl", save_text(tmp_path / "t5", tmp_path / "t5"))
    assert locate_text(tiny_spec()).t5.model_dir == t5


@pytest.mark.parametrize(
    ("folder", "message"),
    [("text_encoder_2", "T5 .* from --checkpoint is incomplete: no weights in"), ("tokenizer_2", "no tokenizer in")],
)
def test_incomplete_encoder_of_a_named_folder_is_an_error(tiny_spec, root, folder, message):
    for name in ("model.safetensors", "tokenizer.json"):
        (root / folder / name).unlink(missing_ok=True)
    with pytest.raises(FluxIRError, match=message):
        locate_text(tiny_spec(), root)


def test_sharded_encoder_needs_all_its_shards(tiny_spec, root, save_sharded):
    (root / "text_encoder_2" / "model.safetensors").unlink()
    index = save_sharded({"a": torch.zeros(1), "b": torch.zeros(1)}, root / "text_encoder_2", "model")
    assert locate_text(tiny_spec(), root).t5.model_dir == index.parent
    (index.parent / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FluxIRError, match="no weights in"):
        locate_text(tiny_spec(), root)


def test_changed_or_missing_shipped_encoder_is_refused(packaged_folder):
    spec = packaged_spec("flux-tiny", packaged_folder)
    (packaged_folder / "clip" / "tokenizer.json").write_text("[]")
    with pytest.raises(FluxIRError, match=r"clip/tokenizer\.json is not the file that was shipped"):
        locate_text(spec)
    shutil.rmtree(packaged_folder / "clip")
    with pytest.raises(FluxIRError, match=r"flux-tiny ships in the package, but .*clip.* is missing"):
        locate_text(spec)


def test_absent_encoders_are_announced_before_they_are_fetched(tiny_spec):
    fetched = []
    with pytest.raises(FluxIRError, match="HF_HUB_OFFLINE forbids fetching it"):
        locate_text(tiny_spec(), announce=fetched.append)
    assert fetched == [f"downloading text_encoder/ and tokenizer/ from {REPO}"]
