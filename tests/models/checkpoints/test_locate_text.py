"""Where the text encoders come from, part by part."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.locate_text import locate_text, tokenizer_on_disk
from flux_ir.models.registry import packaged_spec
from flux_ir.models.text import load_clip, load_t5

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
    assert text.t5[:3] == (root / "text_encoder_2", root / "tokenizer_2", "--checkpoint")
    assert text.clip[:3] == (root / "text_encoder", root / "tokenizer", "--checkpoint")
    monkeypatch.setenv("FLUX_MODEL", str(root))
    assert locate_text(tiny_spec()).t5.origin == "FLUX_MODEL"


def test_folder_of_a_packaged_model_may_be_named_too(packaged_folder, tiny_spec):
    assert locate_text(tiny_spec(), packaged_folder).t5.path == packaged_folder / "t5"


def test_shipped_encoders_are_used_for_a_checkpoint_without_any(packaged_folder, tmp_path):
    (tmp_path / "own").mkdir()
    text = locate_text(packaged_spec("flux-tiny", packaged_folder), tmp_path / "own")
    assert text.clip.origin == "the package"


def test_cached_repository_of_the_model_is_used(tiny_spec, root, hub_cache):
    snapshot = hub_cache(REPO, root)
    assert locate_text(tiny_spec()).t5[:3] == (snapshot / "text_encoder_2", snapshot / "tokenizer_2", "the hub's cache")


def test_open_repositories_in_the_cache_stand_in(tiny_spec, tmp_path, save_text, hub_cache):
    t5 = hub_cache("google/t5-v1_1-xxl", save_text(tmp_path / "t5", tmp_path / "t5"))
    clip = hub_cache("openai/clip-vit-large-patch14", save_text(tmp_path / "clip", tmp_path / "clip"))
    text = locate_text(tiny_spec())
    assert text.t5.path == text.t5.tokenizer_dir == t5
    assert text.clip.path == text.clip.tokenizer_dir == clip


def test_half_fetched_copy_in_the_cache_gives_way_to_a_whole_one(tiny_spec, root, tmp_path, save_text, hub_cache):
    (root / "text_encoder_2" / "model.safetensors").unlink()
    hub_cache(REPO, root)
    t5 = hub_cache("google/t5-v1_1-xxl", save_text(tmp_path / "t5", tmp_path / "t5"))
    assert locate_text(tiny_spec()).t5.path == t5


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
    assert locate_text(tiny_spec(), root).t5.path == index.parent
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


def test_a_tokenizer_is_found_without_the_weights_of_its_encoder(tiny_spec, root, hub_cache, monkeypatch):
    assert tokenizer_on_disk(tiny_spec(), "t5") is None
    shutil.rmtree(root / "text_encoder_2")
    monkeypatch.setenv("FLUX_MODEL", str(root))
    assert tokenizer_on_disk(tiny_spec(), "t5") == root / "tokenizer_2"
    monkeypatch.setenv("FLUX_T5", str(root / "tokenizer"))
    assert tokenizer_on_disk(tiny_spec(), "t5") == root / "tokenizer"
    for variable in ("FLUX_MODEL", "FLUX_T5"):
        monkeypatch.delenv(variable)
    assert tokenizer_on_disk(tiny_spec(), "t5") is None
    snapshot = hub_cache(REPO, root)
    assert tokenizer_on_disk(tiny_spec(), "t5") == snapshot / "tokenizer_2"


def test_the_tokenizer_of_a_packaged_model_is_in_the_package(packaged_folder):
    spec = packaged_spec("flux-tiny", packaged_folder)
    assert tokenizer_on_disk(spec, "t5") == packaged_folder / "t5"


# ---- What a folder's configuration says


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"T5 text encoder in .* is quantised by awq, which cannot be read",
        ),
        ({"d_model": 64}, r"text_encoder_2 .* is not the T5 of flux-schnell: its d_model is 64, .* takes 40"),
    ],
)
def test_quantised_encoders_and_those_of_another_width_are_refused_before_they_are_read(
    tiny_spec, root, config, message
):
    (root / "text_encoder_2" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FluxIRError, match=message):
        locate_text(tiny_spec(), root)


def test_the_width_of_clip_is_found_in_the_configuration_of_both_its_halves(tiny_spec, root):
    (root / "text_encoder" / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 1024}}))
    with pytest.raises(FluxIRError, match=r"is not the CLIP of flux-schnell: its hidden_size is 1024, .* takes 24"):
        locate_text(tiny_spec(), root)


# ---- Single files


@pytest.fixture
def single(text_folders, packaged_folder, save):
    """A packaged model's spec, and a writer of its text encoders as single files."""
    spec = packaged_spec("flux-tiny", packaged_folder)
    folders = {"t5": text_folders.t5, "clip": text_folders.clip}
    for name, folder in folders.items():
        shutil.copytree(folder, packaged_folder / name, dirs_exist_ok=True)

    def write(path, encoder, prefix=""):
        names = {"t5": "", "clip": "text_model."}
        state = load_file(folders[encoder] / "model.safetensors")
        state = {names[encoder] + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        return save(state, path, prefix=prefix)

    return replace(spec, sha256={}), write


def test_a_single_file_of_clip_may_lack_the_first_level_of_its_names(single, text_folders, tmp_path):
    spec, _ = single
    state = load_file(text_folders.clip / "model.safetensors")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    (tmp_path / "comfy").mkdir()
    save_file(bare, tmp_path / "comfy" / "clip_l.safetensors")
    clip = locate_text(spec, tmp_path / "comfy").clip
    assert (clip.path, clip.prefix) == (tmp_path / "comfy" / "clip_l.safetensors", "")
    read = load_clip(clip.path, clip.tokenizer_dir, "cpu", torch.float32, config=clip.config)
    whole = load_clip(text_folders.clip, text_folders.clip, "cpu", torch.float32)
    assert torch.equal(read(["a red circle"]), whole(["a red circle"]))


@pytest.mark.parametrize("folder", [".", "text_encoders", "clip"])
def test_single_files_beside_the_checkpoint_are_taken(single, text_folders, tmp_path, folder):
    spec, write = single
    root = tmp_path / "comfy"
    t5 = write(root / folder / "t5xxl_fp16.safetensors", "t5")
    clip = write(root / folder / "clip_l.sft", "clip")
    (root / "unet").mkdir()
    text = locate_text(spec, root / "unet")
    assert (text.t5.path.resolve(), text.clip.path.resolve()) == (t5.resolve(), clip.resolve())
    assert text.t5.origin == "--checkpoint"
    assert text.t5.tokenizer_dir == spec.assets / "t5"
    config = text.t5.config
    read = load_t5(text.t5.path, text.t5.tokenizer_dir, 7, "cpu", torch.float32, config=config)
    whole = load_t5(text_folders.t5, text_folders.t5, 7, "cpu", torch.float32)
    assert torch.equal(read(["a red circle"]), whole(["a red circle"]))
    config = text.clip.config
    pooled = load_clip(text.clip.path, text.clip.tokenizer_dir, "cpu", torch.float32, config=config)
    whole = load_clip(text_folders.clip, text_folders.clip, "cpu", torch.float32)
    assert torch.equal(pooled(["a red circle"]), whole(["a red circle"]))


def test_the_encoder_inside_an_all_in_one_checkpoint_is_taken(single, tmp_path):
    spec, write = single
    file = write(tmp_path / "all" / "all.safetensors", "t5", prefix="text_encoders.t5xxl.transformer.")
    text = locate_text(spec, file)
    assert (text.t5.path, text.t5.prefix) == (file, "text_encoders.t5xxl.transformer.")
    assert text.clip.origin == "the package"
    read = load_t5(file, text.t5.tokenizer_dir, 7, "cpu", torch.float32, config=text.t5.config, prefix=text.t5.prefix)
    assert read(["a red circle"]).isfinite().all()


def test_a_variable_names_an_encoder(single, tmp_path, monkeypatch):
    spec, write = single
    file = write(tmp_path / "mine.safetensors", "t5")
    monkeypatch.setenv("FLUX_T5", str(file))
    text = locate_text(spec)
    assert (text.t5.path, text.t5.origin, text.clip.origin) == (file, "FLUX_T5", "the package")
    monkeypatch.setenv("FLUX_T5", str(write(tmp_path / "clip.safetensors", "clip")))
    with pytest.raises(
        FluxIRError, match=r"clip\.safetensors \(from FLUX_T5\) must hold the T5 text encoder: it has no"
    ):
        locate_text(spec)


def test_the_published_encoders_are_known_without_a_configuration(tiny_spec, tmp_path, save, hub_cache, save_text):
    hub_cache(REPO, save_text(tmp_path / "hub_t5" / "text_encoder_2", tmp_path / "hub_t5" / "tokenizer_2").parent)
    mark = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save({mark: torch.zeros(1)}, tmp_path / "own" / "t5xxl_fp16.safetensors")
    with pytest.raises(FluxIRError, match="its d_model is 4096, and the transformer takes 40"):
        locate_text(tiny_spec(), tmp_path / "own")
