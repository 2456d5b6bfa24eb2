"""What images are compared by: made once, kept in parts, of CLIP as transformers has it or of the model's own."""

import pytest
import torch
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.features.embeddings import (
    ClipEmbedder,
    LatentEmbedder,
    check_pictures,
    make_embeddings,
    open_picture,
    read_embeddings,
)
from flux_ir.models.clip import load_picture_tower, read_pixels, read_preprocessing
from tests.features.real import make_features, save_small_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six pictures of flux-tiny, and their features."""
    return make_features(tmp_path_factory.mktemp("embeddings"), site="single.6.img", examples=False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_small_clip(tmp_path_factory.mktemp("clip"))


class Counted:
    """Gives each image its number, and counts how many were asked for."""

    def __init__(self, *, centred=False, bad=None):
        self.centred, self.bad, self.asked = centred, bad, 0

    def described(self):
        return {"kind": "counted"}

    def embed(self, images):
        self.asked += len(images)
        rows = torch.tensor([[float(image), 1.0] for image in images])
        rows[[image == self.bad for image in images]] = torch.nan
        return rows


def test_embeddings_are_made_once_and_read_in_order(made):
    first, again = Counted(), Counted(centred=True)
    assert list(make_embeddings(made, first)) == list(range(made.parts))
    list(make_embeddings(made, again))
    assert (first.asked, again.asked) == (12, 0)
    assert torch.equal(read_embeddings(made, first), torch.tensor([[n, 1.0] for n in range(12)]).double())
    assert torch.equal(read_embeddings(made, again)[:, 0], torch.arange(12.0).double() - 5.5)


def test_embeddings_that_are_not_finite_are_not_kept(made):
    broken = Counted(bad=7)
    broken.described = lambda: {"kind": "broken"}
    with pytest.raises(FluxIRError, match="the embedding of image 7 is not finite"):
        list(make_embeddings(made, broken))


def test_clip_looks_at_the_pictures_of_the_collection(made, clip):
    tower, preprocessing = load_picture_tower(clip, "cpu", torch.float32), read_preprocessing(clip)
    embedder = ClipEmbedder(made, tower, preprocessing, "weights")
    found = embedder.embed(range(4, 7))
    expected = tower(torch.stack([read_pixels(made.picture(image), preprocessing) for image in (4, 5, 6)]))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], found[2])
    assert not embedder.centred
    other = ClipEmbedder(made, tower, preprocessing, "other weights")
    assert other.described() != embedder.described()


def test_without_pictures_and_latents_there_is_nothing_to_embed(made, clip, monkeypatch):
    monkeypatch.setattr(type(made), "picture", lambda self, image: None)
    for make in (
        lambda: ClipEmbedder(made, load_picture_tower(clip, "cpu", torch.float32), read_preprocessing(clip), "w"),
        lambda: check_pictures(made),
    ):
        with pytest.raises(FluxIRError, match="pictures are needed, and 12 of 12 images"):
            make()
    with pytest.raises(FluxIRError, match="has no picture here"):
        open_picture(made, 3)
    with pytest.raises(FluxIRError, match="were not kept"):
        LatentEmbedder(made, [None] * 12, None)


def test_a_picture_is_read_as_it_is(made):
    picture = open_picture(made, 0)
    assert (picture.size, picture.mode) == ((64, 48), "RGB")
    with Image.open(made.picture(0)) as file:
        assert file.convert("RGB").tobytes() == picture.tobytes()
