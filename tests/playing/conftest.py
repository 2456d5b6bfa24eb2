"""What tests of the page share: a random autoencoder of flux-tiny, and a studio that has loaded both."""

import pytest
import torch

from flux_ir.playing.studio import PlaySettings, open_studio
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae


@pytest.fixture(scope="session")
def sae(tmp_path_factory):
    """A random autoencoder of flux-tiny's third double block, which knows how active its features are."""
    made = make_sae(SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny"))
    made.max_active, made.mean_active = torch.full((64,), 6.0), torch.full((64,), 2.0)
    return save_sae(made, tmp_path_factory.mktemp("saes") / "random")


@pytest.fixture(scope="session")
def studio(sae, tmp_path_factory):
    """flux-tiny with that autoencoder, three steps a picture."""
    folder = tmp_path_factory.mktemp("play")
    return open_studio(PlaySettings(model="flux-tiny", sae=(sae,), num_steps=3, dtype="float32", output_dir=folder))
