"""A quantised transformer: made once, the same from its file, and a `Flux` like any other to whoever looks into it."""

import hashlib
import os

import pytest
import torch

from flux_ir.collecting.collection import weights_digest
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints import quantised
from flux_ir.models.checkpoints.headers import read_header
from flux_ir.models.checkpoints.load import load_flux
from flux_ir.models.checkpoints.locate import ModelSource, locate_transformer
from flux_ir.models.checkpoints.lora.read import read_lora
from flux_ir.models.checkpoints.quantised import Quantised, cache_folder, stream_quantised
from flux_ir.models.placement import plan
from flux_ir.models.quantisation import codes_bytes, quantise, quantised_weights, widen
from flux_ir.models.suite import Suite
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.denoise import denoise, euler_step
from flux_ir.sites import all_sites

METHODS = ("nf4", "int8", "fp8")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_IR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantised"


@pytest.fixture
def spec(tiny_spec):
    return tiny_spec()


@pytest.fixture
def source(tiny_flux, spec, save, tmp_path):
    path = save(tiny_flux(dtype=torch.bfloat16), tmp_path / "weights" / "flux1-schnell.safetensors")
    return locate_transformer(spec, path)


def steps_of(model, inputs):
    img, img_ids, txt, txt_ids, _, y, _ = inputs
    return list(denoise(model, img, img_ids, txt, txt_ids, y, [1.0, 0.7, 0.4, 0.0], 3.0))


def resident_twin(spec, source, method, loras=()):
    """The plain network with the numbers that the codes stand for."""
    model = load_flux(spec, source, "cpu", torch.float32, loras=loras)
    for name in quantised_weights(spec.flux):
        weight = model.get_parameter(name)
        widen(quantise(weight.clone(), method), weight.data, method)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_step_has_the_bits_of_a_plain_network_with_the_same_numbers(spec, source, method, tiny_inputs):
    quantised = stream_quantised(spec, source, method, "cpu", torch.float32)
    plain = load_flux(spec, source, "cpu", torch.float32)
    twin, inputs = resident_twin(spec, source, method), tiny_inputs(batch=2)
    ours, theirs, exact = (steps_of(model, inputs) for model in (quantised, twin, plain))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert torch.equal(a.velocity, b.velocity)
        assert not torch.equal(a.velocity, c.velocity)


@pytest.mark.parametrize("method", METHODS)
def test_the_second_time_the_file_is_read_and_gives_the_same_bits(spec, source, method, tiny_inputs, cache):
    notes: list[str] = []
    made = stream_quantised(spec, source, method, "cpu", torch.float32, announce=notes.append)
    (file,) = cache.iterdir()
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    found = stream_quantised(spec, source, method, "cpu", torch.float32, announce=notes.append)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert len(notes) == 1
    assert f"quantising 22 weights to {method}, once: {file}" in notes[0]
    for ours, theirs in zip(steps_of(made, tiny_inputs()), steps_of(found, tiny_inputs()), strict=True):
        assert torch.equal(ours.after, theirs.after)
    assert file.name.startswith(f"flux-schnell-{method}-")
    assert sum(entry.nbytes for entry in read_header(file).values()) == codes_bytes(spec.flux, method)


def test_a_broken_file_is_made_again_and_said(spec, source, cache):
    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for broken in (whole[:-100], b"nothing", whole.replace(b"single_blocks.0.linear2", b"single_blocks.0.linear7")):
        file.write_bytes(broken)
        notes: list[str] = []
        stream_quantised(spec, source, "nf4", "cpu", torch.float32, announce=notes.append)
        assert "the codes are made again" in notes[0]
        assert file.read_bytes() == whole
    assert list(cache.iterdir()) == [file]


def test_other_weights_loras_and_methods_have_files_of_their_own(spec, source, save, tmp_path, cache):
    def count():
        return len(list(cache.glob("*.safetensors")))

    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    stream_quantised(spec, source, "int8", "cpu", torch.float32)
    assert count() == 2
    stat = source.path.stat()
    content = bytearray(source.path.read_bytes())
    for inside in (64, source.entries["single_blocks.1.linear2.weight"].nbytes - 3):
        content[source.entries["single_blocks.1.linear2.weight"].offset + inside] ^= 1
        source.path.write_bytes(content)
        os.utime(source.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        before = count()
        stream_quantised(spec, source, "nf4", "cpu", torch.float32)
        assert count() == before + 1


def test_a_copy_of_the_weights_has_the_same_file(spec, source, tmp_path, cache):
    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    (file,) = cache.glob("*.safetensors")
    copy = tmp_path / "elsewhere" / "renamed.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(source.path.read_bytes())
    notes: list[str] = []
    stream_quantised(spec, locate_transformer(spec, copy), "nf4", "cpu", torch.float32, announce=notes.append)
    assert (list(cache.glob("*.safetensors")), notes) == ([file], [])


def test_a_digest_is_remembered_until_the_file_is_written_to(spec, source, cache, monkeypatch):
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    monkeypatch.setattr(quantised, "_SETTLED_NS", -(10**12))
    for _ in range(2):
        stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    assert len(read) == 1
    stat, content = source.path.stat(), bytearray(source.path.read_bytes())
    content[-1] ^= 1
    source.path.write_bytes(content)
    os.utime(source.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # its own time given back
    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    assert len(read) == 2
    assert len(list(cache.glob("*.safetensors"))) == 2
    for remembered in (cache / "digests").iterdir():
        remembered.write_text("no JSON")
    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    assert len(read) == 3


def test_a_file_that_was_just_written_is_read_again(spec, source, cache):
    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    assert not (cache / "digests").exists()


def test_loras_are_merged_before_weights_are_quantised(spec, source, save, tmp_path, tiny_inputs, cache):
    width, draw = spec.flux.hidden_size, torch.Generator().manual_seed(3)
    layer = "single_blocks.0.linear1"
    rows = quantised_weights(spec.flux)[f"{layer}.weight"][0]
    tensors = {
        f"lora_unet_{layer.replace('.', '_')}.lora_down.weight": torch.randn(2, width, generator=draw),
        f"lora_unet_{layer.replace('.', '_')}.lora_up.weight": torch.randn(rows, 2, generator=draw),
    }
    lora = read_lora(save(tensors, tmp_path / "style.safetensors"), spec, strength=0.5)
    merged = stream_quantised(spec, source, "nf4", "cpu", torch.float32, loras=[lora])
    twin = resident_twin(spec, source, "nf4", loras=[lora])
    assert torch.equal(merged(*tiny_inputs()), twin(*tiny_inputs()))
    stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    assert len(list(cache.iterdir())) == 2
    digests = {
        weights_digest(ModelSource(source, None, None, loras, quantize), autoencoder=False)
        for loras in ((), (lora,))
        for quantize in (None, "nf4", "int8")
    }
    assert len(digests) == 6


def test_a_recording_at_all_sites_and_the_last_block_is_the_sampler_s_step(spec, source, tiny_inputs):
    quantised = stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    twin = resident_twin(spec, source, "nf4")
    sites = all_sites(spec.flux.depth, spec.flux.depth_single_blocks)
    recorded = []
    for model in (quantised, twin):
        sink = MemorySink()
        with Recorder(model, sites, sink):
            steps = steps_of(model, tiny_inputs())
        recorded.append(sink.values)
    assert recorded[0].keys() == recorded[1].keys()
    assert all(torch.equal(value, recorded[1][key]) for key, value in recorded[0].items())
    # Read by the plain network, as the lens does: what reads a block out is never quantised.
    plain, inputs = load_flux(spec, source, "cpu", torch.float32), tiny_inputs()
    for step in steps:
        last = next(v for (n, site), v in recorded[0].items() if str(site) == "single.2" and n == step.number)
        vec = plain.conditioning(torch.full((1,), step.t_curr), inputs.y)
        velocity = plain.read_out(last[:, inputs.txt.shape[1] :], vec)
        assert torch.equal(euler_step(step.before, velocity, step.t_curr, step.t_prev), step.after)


@pytest.mark.parametrize("waits", ["file", "device"])
def test_where_codes_wait_changes_no_bit(spec, source, waits, tiny_inputs):
    quantised = stream_quantised(spec, source, "fp8", "cpu", torch.float32, waits=waits)
    assert torch.equal(quantised(*tiny_inputs()), resident_twin(spec, source, "fp8")(*tiny_inputs()))
    again = quantised.twin()
    assert torch.equal(quantised(*tiny_inputs()), again(*tiny_inputs()))


@pytest.mark.gpu
@pytest.mark.parametrize("waits", ["file", "pinned", "device"])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(spec, source, waits):
    states = []
    for device in ("cpu", "cuda"):
        network = stream_quantised(
            spec, source, "nf4", device, torch.bfloat16, waits=waits if device == "cuda" else "file"
        )
        target = torch.empty(quantised_weights(spec.flux)["single_blocks.1.linear1.weight"], dtype=torch.bfloat16)
        target = target.to(device)
        network.stream._fetch(target, "single_blocks.1.linear1.weight")
        states.append(target.cpu())
    assert torch.equal(*states)


def test_offloading_changes_no_bit_and_hides_nothing(spec, source, tiny_inputs):
    outputs = []
    for offload in (False, True, "parts", "blocks"):
        suite = Suite(spec, ModelSource(source, None, None, quantize="nf4"), plan(0, offload=offload), torch.float32)
        with suite.transformer() as model:
            outputs.append(model(*tiny_inputs()))
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_weights_that_are_not_finite_are_refused(spec, source, tiny_flux, save, cache):
    state = tiny_flux(dtype=torch.bfloat16).state_dict()
    state["double_blocks.1.img_mlp.0.weight"][3, 4] = torch.inf
    save(state, source.path)
    with pytest.raises(FluxIRError, match=r"double_blocks.1.img_mlp.0.weight must be finite to be quantised"):
        stream_quantised(spec, locate_transformer(spec, source.path), "nf4", "cpu", torch.float32)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_names_its_variable(spec, source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FLUX_IR_CACHE", str(tmp_path / "file"))
    with pytest.raises(FluxIRError, match=r"cannot write .*\(hint: .*FLUX_IR_CACHE"):
        stream_quantised(spec, source, "nf4", "cpu", torch.float32)


def test_a_file_that_is_gone_is_said(spec, source, cache, tiny_inputs):
    quantised = stream_quantised(spec, source, "nf4", "cpu", torch.float32)
    for file in cache.iterdir():
        file.unlink()
    with pytest.raises(FluxIRError, match=r"can no longer be read.*start again"):
        quantised(*tiny_inputs())


def test_the_cache_is_below_the_user_s_own(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_IR_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flux_ir"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "flux_ir"


def test_biases_are_kept_and_modulations_are_not(spec, source):
    asked: list[str] = []

    def plain(target, name):
        asked.append(name)
        target.zero_()

    fetch = Quantised({}, "nf4", plain, "file").fetch
    for _ in range(2):
        fetch(torch.empty(5), "single_blocks.0.linear1.bias")
        fetch(torch.empty(5, 4), "single_blocks.0.modulation.lin.weight")
    assert asked.count("single_blocks.0.linear1.bias") == 1
    assert asked.count("single_blocks.0.modulation.lin.weight") == 2
