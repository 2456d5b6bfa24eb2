"""The report on quantised weights: its numbers are those of the networks, and its files say the same."""

import json

import pytest
from PIL import Image

import flux_ir
from flux_ir.api.compare_quantized import CompareSettings, run_comparison
from flux_ir.commands.main import main
from flux_ir.models.architecture import block_names


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_IR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("quantized")
    return {
        method: flux_ir.compare_quantized(
            "a red circle", model="flux-tiny", quantize=method, num_steps=2, device="cpu", output_dir=folder
        )
        for method in ("nf4", "int8")
    }


def test_every_block_has_its_errors_in_depth_order_and_finer_codes_err_less(found):
    nf4, int8 = found["nf4"], found["int8"]
    names = block_names(flux_ir.load_model("flux-tiny", parts=[], device="cpu").spec.flux)
    assert [row.block for row in nf4.blocks] == names
    for coarse, fine in zip(nf4.blocks, int8.blocks, strict=True):
        assert 0.08 < coarse.weights < 0.11
        assert 0.005 < fine.weights < 0.02
        assert fine.output < coarse.output
        assert fine.output_in_run < coarse.output_in_run
    # The first block of the first step sees the same in both runs.
    rows = json.loads(nf4.numbers.read_text())["blocks"]
    assert rows[0]["output_by_step"][0] == rows[0]["output_in_run_by_step"][0]
    assert nf4.latent_error > int8.latent_error > 0
    assert nf4.picture_psnr_db < int8.picture_psnr_db
    assert nf4.bytes_quantized < int8.bytes_quantized < nf4.bytes_exact


def test_the_files_say_the_same(found):
    nf4 = found["nf4"]
    assert nf4.folder.name == "flux-tiny-nf4"
    numbers = json.loads(nf4.numbers.read_text())
    assert (numbers["quantize"], numbers["prompt"], numbers["seed"]) == ("nf4", "a red circle", 0)
    assert [row["block"] for row in numbers["blocks"]] == [row.block for row in nf4.blocks]
    with Image.open(nf4.pictures) as picture:
        assert picture.size == (256, 128)


def test_the_command_prints_the_table(tmp_path, capsys):
    words = ["compare-quantized", "--model", "flux-tiny", "--quantize", "fp8", "--num_steps", "1", "--device", "cpu"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "relative errors of flux-tiny in fp8, blocks in depth order" in printed
    assert "single_blocks.7" in printed
    assert "PSNR" in printed
    assert str(tmp_path / "flux-tiny-fp8" / "comparison.json") in printed


def test_a_loaded_model_is_refused():
    model = flux_ir.load_model("flux-tiny", parts=[], device="cpu")
    with pytest.raises(flux_ir.FluxIRError, match="compared by its name and with a method"):
        run_comparison(CompareSettings(model=model))
