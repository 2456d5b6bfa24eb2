"""Which file is taken: arguments, variables, the package, the hub's cache, in this order and never by surprise."""

import shutil

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.headers import shards
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.checkpoints.locate import locate_autoencoder, locate_model, locate_transformer
from flux_ir.models.registry import packaged_spec

pytestmark = pytest.mark.usefixtures("hub_cache")
STEM = "diffusion_pytorch_model"


@pytest.fixture
def flux_file(tmp_path, tiny_flux, save):
    return save(tiny_flux(), tmp_path / "mine" / "flux1-schnell.safetensors")


@pytest.fixture
def ae_file(tmp_path, tiny_autoencoder, save):
    return save(tiny_autoencoder(), tmp_path / "mine_ae" / "ae.safetensors")


@pytest.fixture
def diffusers_root(tmp_path, tiny_flux, tiny_autoencoder, save, save_sharded, save_text):
    """A diffusers folder with a sharded transformer."""
    root, flux, ae = tmp_path / "root", tiny_flux(), tiny_autoencoder()
    save_sharded(to_diffusers(flux.state_dict(), flux.params), _made(root / "transformer"), STEM)
    save(to_diffusers(ae.state_dict(), ae.params), root / "vae" / f"{STEM}.safetensors")
    save_text(root / "text_encoder", root / "tokenizer")
    save_text(root / "text_encoder_2", root / "tokenizer_2")
    return root


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def test_argument_comes_before_every_variable(tiny_spec, flux_file, ae_file, monkeypatch):
    for variable in ("FLUX_MODEL", "FLUX_SCHNELL", "FLUX_AE", "AE"):
        monkeypatch.setenv(variable, "/nowhere")
    assert locate_transformer(tiny_spec(), flux_file).origin == "--checkpoint"
    assert locate_transformer(tiny_spec(), str(flux_file)).path == flux_file
    assert locate_autoencoder(tiny_spec(), ae_file).origin == "--ae_checkpoint"


def test_variable_of_the_model_comes_before_the_general_one(tiny_spec, flux_file, ae_file, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", str(flux_file))
    monkeypatch.setenv("AE", str(ae_file))
    assert locate_transformer(tiny_spec()).origin == "FLUX_MODEL"
    assert locate_autoencoder(tiny_spec()).origin == "AE"
    monkeypatch.setenv("FLUX_SCHNELL", str(flux_file))
    monkeypatch.setenv("FLUX_AE", str(ae_file))
    assert locate_transformer(tiny_spec()).origin == "FLUX_SCHNELL"
    assert locate_autoencoder(tiny_spec()).origin == "FLUX_AE"


def test_variable_of_another_model_is_not_looked_at(tiny_spec, flux_file, monkeypatch):
    monkeypatch.setenv("FLUX_SCHNELL", str(flux_file))
    with pytest.raises(FluxIRError, match="not in the hub's cache"):
        locate_transformer(tiny_spec(guidance=True))


def test_empty_variable_counts_as_unset(tiny_spec, flux_file, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", "")
    monkeypatch.setenv("FLUX_SCHNELL", str(flux_file))
    assert locate_transformer(tiny_spec()).origin == "FLUX_SCHNELL"


@pytest.mark.parametrize("named", ["/no/such/file.safetensors", ""])
def test_argument_that_names_nothing_is_an_error_not_a_download(tiny_spec, named):
    with pytest.raises(FluxIRError, match="--checkpoint must name a file or a folder that exists"):
        locate_transformer(tiny_spec(), named)
    with pytest.raises(FluxIRError, match="--ae_checkpoint must name a file or a folder that exists"):
        locate_autoencoder(tiny_spec(), named)


@pytest.mark.parametrize("variable", ["FLUX_MODEL", "FLUX_SCHNELL"])
def test_variable_that_names_nothing_is_an_error_naming_it(tiny_spec, monkeypatch, variable):
    monkeypatch.setenv(variable, "/no/such/file.safetensors")
    with pytest.raises(FluxIRError, match=f"{variable} must name a file .* got '/no/such/file.safetensors'"):
        locate_transformer(tiny_spec())


@pytest.mark.parametrize("inside", ["", "transformer", f"transformer/{STEM}.safetensors.index.json"])
def test_diffusers_folder_is_found_from_its_root_or_its_subfolder(tiny_spec, diffusers_root, inside):
    source = locate_transformer(tiny_spec(), diffusers_root / inside)
    assert source.layout == "diffusers"
    assert source.path == diffusers_root / "transformer" / f"{STEM}.safetensors.index.json"


@pytest.mark.parametrize("inside", ["", "vae", f"vae/{STEM}.safetensors"])
def test_autoencoder_of_a_diffusers_folder_is_found(tiny_spec, diffusers_root, inside):
    source = locate_autoencoder(tiny_spec(), diffusers_root / inside)
    assert source.path == diffusers_root / "vae" / f"{STEM}.safetensors"


def test_folder_of_the_published_layout_is_found_by_the_file_names(tiny_spec, flux_file, diffusers_root):
    shutil.copy(flux_file, diffusers_root)
    assert locate_transformer(tiny_spec(), diffusers_root).layout == "bfl"


def test_only_safetensors_file_of_a_folder_is_taken_whatever_its_name(tmp_path, tiny_spec, tiny_flux, save):
    path = save(tiny_flux(), tmp_path / "own" / "finetuned.safetensors")
    assert locate_transformer(tiny_spec(), path.parent).path == path


def test_single_file_may_be_sharded(tmp_path, tiny_spec, tiny_flux, save_sharded):
    index = save_sharded(tiny_flux().state_dict(), tmp_path, "flux1-schnell")
    assert locate_transformer(tiny_spec(), tmp_path).path == index
    assert locate_transformer(tiny_spec(), index).layout == "bfl"


def test_folder_with_several_files_or_none_asks_for_the_file(tmp_path, tiny_spec, tiny_flux, save):
    (tmp_path / "own").mkdir()
    with pytest.raises(FluxIRError, match=r"the folder .*own has no safetensors or GGUF file") as error:
        locate_transformer(tiny_spec(), tmp_path / "own")
    assert "flux1-schnell.safetensors or transformer/" in error.value.hint
    for name in ("a", "b"):
        save(tiny_flux(), tmp_path / "own" / f"{name}.safetensors")
    with pytest.raises(FluxIRError, match=r"has 2 files that it may be \(a\.safetensors, b\.safetensors\)"):
        locate_transformer(tiny_spec(), tmp_path / "own")


def test_missing_shard_of_a_named_folder_is_an_error(tiny_spec, diffusers_root):
    shards(diffusers_root / "transformer" / f"{STEM}.safetensors.index.json")[0].unlink()
    with pytest.raises(FluxIRError, match="shards that are not there"):
        locate_transformer(tiny_spec(), diffusers_root)


def test_autoencoder_beside_the_named_transformer_is_taken(tiny_spec, diffusers_root, ae_file, monkeypatch):
    found = locate_autoencoder(tiny_spec(), checkpoint=diffusers_root / "transformer")
    assert (found.path.parent.name, found.origin) == ("vae", "--checkpoint")
    monkeypatch.setenv("FLUX_MODEL", str(diffusers_root))
    assert locate_autoencoder(tiny_spec()).origin == "FLUX_MODEL"
    monkeypatch.setenv("FLUX_AE", str(ae_file))  # what names the autoencoder itself comes first
    assert locate_autoencoder(tiny_spec(), checkpoint=diffusers_root).origin == "FLUX_AE"


def test_packaged_files_are_verified_and_taken(packaged_folder):
    spec = packaged_spec("flux-tiny", packaged_folder)
    found = locate_model(spec)
    assert found.transformer.path == packaged_folder / "transformer.safetensors"
    assert found.autoencoder.origin == found.text.t5.origin == "the package"
    assert found.text.clip.path == found.text.clip.tokenizer_dir == packaged_folder / "clip"


@pytest.mark.parametrize("relative", ["transformer.safetensors", "ae.safetensors", "t5/model.safetensors"])
def test_packaged_file_that_was_changed_is_refused_by_name(packaged_folder, relative):
    spec = packaged_spec("flux-tiny", packaged_folder)
    locate_model(spec)  # hashed once: the change must be noticed all the same
    with (packaged_folder / relative).open("ab") as file:
        file.write(b"x")
    with pytest.raises(FluxIRError, match=f"{relative} is not the file that was shipped: its sha256 is"):
        locate_model(spec)


def test_packaged_file_that_is_missing_is_never_fetched(packaged_folder):
    spec = packaged_spec("flux-tiny", packaged_folder)
    (packaged_folder / "ae.safetensors").unlink()
    with pytest.raises(FluxIRError, match=r"ae\.safetensors is missing"):
        locate_autoencoder(spec)


def test_variable_comes_before_the_package(packaged_folder, tmp_path, tiny_flux, save, monkeypatch):
    own = save(tiny_flux(seed=1), tmp_path / "own.safetensors")
    monkeypatch.setenv("FLUX_MODEL", str(own))
    assert locate_transformer(packaged_spec("flux-tiny", packaged_folder)).path == own


def test_published_file_in_the_cache_is_taken(tiny_spec, flux_file, hub_cache):
    snapshot = hub_cache("black-forest-labs/FLUX.1-schnell", flux_file.parent)
    source = locate_transformer(tiny_spec())
    assert (source.path, source.origin) == (snapshot / "flux1-schnell.safetensors", "the hub's cache")


def test_diffusers_layout_in_the_cache_is_taken(tiny_spec, diffusers_root, hub_cache):
    hub_cache("black-forest-labs/FLUX.1-schnell", diffusers_root)
    found = locate_model(tiny_spec())
    assert found.transformer.layout == found.autoencoder.layout == "diffusers"
    assert found.text.t5.path.name == "text_encoder_2"


def test_cache_of_another_repository_is_not_looked_at(tiny_spec, flux_file, hub_cache):
    hub_cache("black-forest-labs/FLUX.1-dev", flux_file.parent)
    with pytest.raises(FluxIRError, match="not in the hub's cache"):
        locate_transformer(tiny_spec())


def test_gap_in_the_cached_shards_counts_as_absent(tiny_spec, diffusers_root, hub_cache):
    shards(diffusers_root / "transformer" / f"{STEM}.safetensors.index.json")[0].unlink()
    hub_cache("black-forest-labs/FLUX.1-schnell", diffusers_root)
    with pytest.raises(FluxIRError, match=r"flux1-schnell\.safetensors of .* not in the hub's cache"):
        locate_transformer(tiny_spec())


def test_truncated_file_in_the_cache_is_an_error(tiny_spec, flux_file, hub_cache):
    flux_file.write_bytes(flux_file.read_bytes()[:-100])
    hub_cache("black-forest-labs/FLUX.1-schnell", flux_file.parent)
    with pytest.raises(FluxIRError, match="is cut short"):
        locate_transformer(tiny_spec())


def test_everything_on_disk_is_checked_before_anything_is_fetched(tiny_spec, ae_file, monkeypatch):
    fetched = []
    monkeypatch.setenv("FLUX_AE", str(ae_file))
    with pytest.raises(FluxIRError, match="--checkpoint must name"):
        locate_model(tiny_spec(), "/nowhere", announce=fetched.append)
    ae_file.write_bytes(b"")
    with pytest.raises(FluxIRError, match="is not a safetensors file"):
        locate_model(tiny_spec(), announce=fetched.append)
    assert fetched == []


def test_what_is_about_to_be_fetched_is_announced(tiny_spec):
    fetched = []
    with pytest.raises(FluxIRError, match="HF_HUB_OFFLINE forbids fetching it"):
        locate_transformer(tiny_spec(), announce=fetched.append)
    assert fetched == ["downloading flux1-schnell.safetensors from black-forest-labs/FLUX.1-schnell"]


def test_variable_with_the_wrong_family_says_which_variable(tiny_spec, tiny_flux, tmp_path, save, monkeypatch):
    path = save(tiny_flux(guidance=True, dtype=torch.bfloat16), tmp_path / "flux1-dev.safetensors")
    monkeypatch.setenv("FLUX_MODEL", str(path))
    with pytest.raises(FluxIRError, match=r"\(from FLUX_MODEL\) is not flux-schnell"):
        locate_transformer(tiny_spec())


# ---- What people really have


def test_sft_files_and_half_precision_variants_are_taken(tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save):
    flux, ae = tiny_flux(), tiny_autoencoder()
    root = tmp_path / "sft"
    save(flux, root / "flux1-schnell.sft")
    save(ae, root / "ae.sft")
    assert locate_transformer(tiny_spec(), root).path.name == "flux1-schnell.sft"
    assert locate_autoencoder(tiny_spec(), checkpoint=root / "flux1-schnell.sft").path.name == "ae.sft"
    half = tmp_path / "half"
    save(to_diffusers(flux.state_dict(), flux.params), half / "transformer" / f"{STEM}.fp16.safetensors")
    save(to_diffusers(ae.state_dict(), ae.params), half / "vae" / f"{STEM}.fp16.safetensors")
    assert locate_transformer(tiny_spec(), half).path.name == f"{STEM}.fp16.safetensors"
    assert locate_autoencoder(tiny_spec(), checkpoint=half).path.name == f"{STEM}.fp16.safetensors"


def test_sharded_variant_is_read_through_its_index(tmp_path, tiny_spec, tiny_flux, save_sharded):
    flux = tiny_flux()
    folder = _made(tmp_path / "root" / "transformer")
    index = save_sharded(to_diffusers(flux.state_dict(), flux.params), folder, f"{STEM}.fp16")
    index.rename(folder / f"{STEM}.safetensors.index.fp16.json")
    assert locate_transformer(tiny_spec(), tmp_path / "root").path.name.endswith(".index.fp16.json")


def test_the_autoencoder_in_the_checkpoint_itself_is_taken(tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save):
    everything = {f"model.diffusion_model.{name}": tensor for name, tensor in tiny_flux().state_dict().items()}
    everything |= {f"vae.{name}": tensor for name, tensor in tiny_autoencoder().state_dict().items()}
    path = save(everything, tmp_path / "all.safetensors")
    save(tiny_autoencoder(seed=1), tmp_path / "ae.safetensors")
    found = locate_autoencoder(tiny_spec(), checkpoint=path)
    assert (found.path, found.origin) == (path, "--checkpoint")
    assert locate_autoencoder(tiny_spec(), tmp_path / "ae.safetensors", checkpoint=path).path.name == "ae.safetensors"


def test_the_one_file_of_a_folder_that_holds_the_part_is_taken(tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save):
    flux = save(tiny_flux(), tmp_path / "own" / "my_finetune.safetensors")
    ae = save(tiny_autoencoder(), tmp_path / "own" / "my_ae.sft")
    assert locate_transformer(tiny_spec(), tmp_path / "own").path == flux
    assert locate_autoencoder(tiny_spec(), tmp_path / "own").path == ae


def test_comfyui_folders_belong_together(tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save):
    flux = save(tiny_flux(), tmp_path / "models" / "diffusion_models" / "flux1-schnell.safetensors")
    ae = save(tiny_autoencoder(), tmp_path / "models" / "vae" / "ae.safetensors")
    assert locate_autoencoder(tiny_spec(), checkpoint=flux).path == ae


def test_which_file_was_taken_is_said_for_each_part(packaged_folder, flux_file):
    told = []
    locate_model(packaged_spec("flux-tiny", packaged_folder), flux_file, announce=told.append)
    assert told == ["autoencoder, T5, CLIP: the package's own", f"transformer: {flux_file} (from --checkpoint)"]
    told.clear()
    locate_transformer(packaged_spec("flux-tiny", packaged_folder), announce=told.append)
    assert told == ["transformer: the package's own"]
