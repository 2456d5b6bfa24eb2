"""The features of an autoencoder from Python: all stages of flux-tiny, read in a notebook's way. Nothing is printed."""

import numpy as np
import pytest
from PIL import Image

import flux_ir
from flux_ir.errors import FluxIRError
from tests.features.conftest import save_small_sae

SITE = "single.6"
PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Six pictures of flux-tiny, an untrained autoencoder of text and image tokens, and all stages."""
    folder = tmp_path_factory.mktemp("study")
    flux_ir.collect(
        PROMPTS,
        SITE,
        folder / "captures",
        model="flux-tiny",
        repeats=2,
        num_steps=2,
        steps=[0, 1],
        save_images=True,
        width=128,
        height=64,
    )
    save_small_sae(folder / "saes" / "tiny", SITE, d=192, steps=(0, 1), model="flux-tiny")
    flux_ir.analyse_features(folder / "saes" / "tiny", folder / "captures", output_dir=folder / "features")
    return folder


def test_features_are_read_as_a_notebook_wants_them(analysed, capsys):
    features = flux_ir.read_features(analysed / "features" / "tiny")
    assert capsys.readouterr() == ("", "")
    assert "single.6 of flux-tiny, img tokens" in repr(features)
    assert len(features) == 48
    assert features.table["frequency"].shape == (48,)
    feature = int(features.table["count"].argmax())
    strongest = features.examples(feature)[0]
    assert strongest.value == features.scores(feature).max() == pytest.approx(features.table["max_active"][feature])
    assert strongest.prompt in PROMPTS
    maps = features.map(feature, strongest.image)
    assert list(maps) == [0, 1]
    assert maps[strongest.step].shape == (4, 8)  # 64 x 128 pixels
    assert maps[strongest.step].ravel()[strongest.token] == np.float32(strongest.value)
    assert features.picture(strongest.image).size == (128, 64)
    assert isinstance(features.picture(0), Image.Image)
    frame = features.to_pandas()
    assert frame.loc[feature, "step_frequency_1"] == features.table["step_frequency"][feature, 1]
    assert len(features.examples(feature, "quantile")) >= len(features.examples(feature, "random")) > 0
    assert all(features.scores(feature)[one.image] == 0 for one in features.examples(feature, "silent"))


def test_text_tokens_are_one_row_without_their_padding(analysed):
    features = flux_ir.read_features(analysed / "features" / "tiny", "txt")
    feature = int(features.table["count"].argmax())
    used = features.folder.images[0].used_txt
    (row,) = features.map(feature, 0)[0]
    assert np.isfinite(row[:used]).all()
    assert np.isnan(row[used:]).all()


def test_what_is_not_there_is_said(analysed, tmp_path):
    features = flux_ir.read_features(analysed / "features" / "tiny")
    with pytest.raises(FluxIRError, match="features are numbered 0 to 47: got 48"):
        features.map(48, 0)
    with pytest.raises(FluxIRError, match="images are numbered 0 to 5: got 6"):
        features.map(0, 6)
    with pytest.raises(FluxIRError, match="holds no features"):
        flux_ir.read_features(tmp_path)
