"""Autoencoders from Python: trained on run folders, measured, spliced in, loaded and exported. Nothing is printed."""

import pytest
import torch

import flux_ir
from flux_ir.errors import FluxIRError

SITE = "single.6.img"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four generations of one step."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, prompt in enumerate(["a red circle", "a blue square", "a green star", "a large red ring"]):
        flux_ir.capture(
            prompt,
            model="flux-tiny",
            seed=seed,
            num_steps=1,
            sites=SITE,
            output_dir=folder,
            should_decode_intermediates=False,
        )
    return folder


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    *_, last = flux_ir.train_sae(
        runs, k=4, expansion=2, batch_tokens=32, max_tokens=640, held_out=0.4, output_dir=tmp_path_factory.mktemp("s")
    )
    return last.finished[0].folder


def test_the_numbers_come_back_and_stand_in_the_folder(runs, trained, capsys):
    (done,) = flux_ir.evaluate_sae(trained, runs, splice=True, prompts=1, pictures=False)
    assert capsys.readouterr() == ("", "")
    assert done.folder == trained
    assert (trained / "metrics.json").is_file()
    assert 0 < done.evaluation.overall.l0 <= 4
    assert done.baselines["pca"][0] == 4
    assert done.splice["replacements"]["mean"]["recovered_from_mean"] == 0


def test_an_autoencoder_is_loaded_spliced_and_exported(runs, trained, tmp_path):
    sae = flux_ir.load_sae(trained)
    x = flux_ir.read_capture(next(runs.iterdir())).read(SITE, 0)
    assert sae.decode(sae.encode(x[0].float())).shape == x[0].shape
    exported = flux_ir.export_sae(trained, format="sparsify", output_dir=tmp_path / SITE)
    assert torch.equal(flux_ir.load_sae(exported.where).W_dec, sae.W_dec)
    with pytest.raises(FluxIRError, match="exported to one place"):
        flux_ir.export_sae(trained)
    with pytest.raises(FluxIRError, match="it is neither"):
        flux_ir.load_sae("no-such-folder")
