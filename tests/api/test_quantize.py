"""`quantize` from a word to the bits of a picture, and back from the files of a run to the same weights."""

import json
import subprocess
import sys

import pytest
import torch

import flux_ir
from flux_ir.api.model_settings import ModelSettings, as_captured
from flux_ir.api.recorded_run import as_recorded, check_run, recorded_run
from flux_ir.api.steer import SteerSettings
from flux_ir.commands.main import main
from flux_ir.models.streamed_flux import StreamedFlux

RUN = {"model": "flux-tiny", "prompt": "a red circle", "seed": 1, "num_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_IR_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    return flux_ir.capture(**RUN, quantize="nf4", sites="*", lens="euler", output_dir=tmp_path_factory.mktemp("output"))


def tensors(result):
    capture = flux_ir.read_capture(result)
    return {(str(site), step): capture.read(site, step) for site in capture.sites for step in capture.steps}


def test_a_run_says_how_its_model_was_quantised_and_is_another_one(run, tmp_path):
    metadata = json.loads(run.metadata.read_text())
    assert metadata["quantize"] == metadata["options"]["quantize"] == "nf4"
    assert flux_ir.read_capture(run).metadata["quantize"] == "nf4"
    plain = flux_ir.capture(**RUN, sites="single.7", should_decode_intermediates=False, output_dir=tmp_path)
    assert "quantize" not in json.loads(plain.metadata.read_text())
    ours, exact = tensors(run)["single.7", 1].double(), tensors(plain)["single.7", 1].double()
    assert 0.01 < (ours - exact).norm() / exact.norm() < 0.5


def test_the_last_block_is_the_sampler_s_step_and_the_lens_reads_it_again(run):
    numbers = json.loads(run.lens.numbers.read_text())
    assert flux_ir.read_lens(run, lens="euler").numbers == run.lens.numbers
    assert json.loads(run.lens.numbers.read_text()) == numbers
    last = numbers["sites"]["single.7"]
    assert [row["relative_distance"] for row in last] == [0, 0]


@pytest.mark.parametrize("offload", [False, True, "blocks"])
def test_from_the_cache_and_with_offloaded_blocks_come_the_same_bits(run, tmp_path, offload, cache):
    (file,) = (cache / "quantised").glob("*-nf4-*")
    written = file.stat().st_mtime_ns
    again = flux_ir.capture(
        **RUN, quantize="nf4", sites="*", offload=offload, should_decode_intermediates=False, output_dir=tmp_path
    )
    ours, theirs = tensors(again), tensors(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert again.picture.read_bytes() == run.picture.read_bytes()
    assert file.stat().st_mtime_ns == written


def test_a_run_is_gone_through_again_with_the_same_codes(run):
    recorded = recorded_run(run, None)
    settings = as_recorded(SteerSettings(model="flux-tiny", edit=[], device="cpu"), recorded)
    assert settings.quantize == "nf4"
    suite = settings.suite(settings.settle_machine(), lambda event: None, text=False)
    check_run(recorded, suite, recorded.sampling.timesteps)
    other = flux_ir.load_model("flux-tiny", parts=[], device="cpu")
    with pytest.raises(flux_ir.FluxIRError, match=r"made with --quantize nf4: got None"):
        check_run(recorded, other, recorded.sampling.timesteps)
    assert as_captured(ModelSettings(model="flux-tiny", quantize="int8"), recorded).quantize == "int8"


def test_a_collection_is_of_its_quantisation(tmp_path):
    words = {"prompts": ["a red circle", "a blue square"], "sites": "single.7", "num_steps": 1, "model": "flux-tiny"}
    where = {"output_dir": tmp_path / "collection", "device": "cpu"}
    flux_ir.collect(**words, **where, quantize="int8")
    settings = json.loads((tmp_path / "collection" / "collection.json").read_text())["settings"]
    assert settings["quantize"] == "int8"
    assert flux_ir.open_source(tmp_path / "collection").quantize == "int8"
    with pytest.raises(flux_ir.FluxIRError, match=r"quantize int8 there, None now"):
        flux_ir.collect(**words, **where)


def test_a_loaded_model_is_one_that_streams_and_has_settled_it():
    model = flux_ir.load_model("flux-tiny", parts=["transformer"], quantize="fp8", device="cpu")
    assert isinstance(model.flux, StreamedFlux)
    with pytest.raises(flux_ir.FluxIRError, match="used as it is: got quantize as well"):
        flux_ir.capture("a red circle", model=model, quantize="nf4")


def test_quantised_blocks_are_not_compiled():
    with pytest.raises(flux_ir.FluxIRError, match=r"--compile needs blocks whose .*--quantize"):
        flux_ir.load_model("flux-tiny", parts=[], device="cpu", quantize="nf4", compile=True)


def test_the_command_takes_it_and_refuses_other_words(tmp_path, capsys):
    words = ["capture", "--model", "flux-tiny", "--num_steps", "1", "--should_decode_intermediates", "False"]
    words += ["--output_dir", str(tmp_path), "--device", "cpu", "--quantize"]
    assert main([*words, "nf4"]) == 0
    assert "quantising" not in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "flux_ir", *words, "int4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: --quantize must be nf4, int8 or fp8: got 'int4'" in done.stderr
    assert "Traceback" not in done.stderr
