"""What features draw: the read-out is the model's own last layer, the icon its own sampling, feature by feature."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import flux_ir
from flux_ir.errors import FluxIRError
from flux_ir.features.drawings import Canvas, Studio, draw_missing, icons, is_drawn, read_out, reads_out
from flux_ir.features.folder import open_features
from flux_ir.features.heatmaps import draw_overlay, feature_numbers, scale_of, sheet_line
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Intervention
from flux_ir.sampling.generate import decode, sample
from flux_ir.sites import Site

D, HEIGHT, WIDTH = 64, 48, 64
TIMES = (1.0, 0.6, 0.0)


@pytest.fixture
def model(tiny_flux):
    return tiny_flux()


@pytest.fixture
def autoencoder(tiny_autoencoder):
    return tiny_autoencoder()


@pytest.fixture
def empty(tiny_flux_params):
    draw = torch.Generator().manual_seed(5)
    txt = torch.randn(1, 7, tiny_flux_params.context_in_dim, generator=draw)
    return TextEmbedding(txt, torch.randn(1, tiny_flux_params.vec_in_dim, generator=draw))


CANVAS = Canvas(width=WIDTH, height=HEIGHT, timesteps=TIMES, guidance=3.0, step=1, seed=4)


def rows(count, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def studio_of(model, autoencoder, empty, site="single.1.img", **changes):
    parts = {
        "model": model,
        "autoencoder": autoencoder,
        "site": Site.parse(site),
        "directions": rows(6),
        "amounts": torch.arange(1.0, 7.0),
        "mean": rows(1, seed=1)[0],
        "length": 2.0,
        "canvas": CANVAS,
        "empty": empty,
    }
    return Studio(**parts | changes)


def test_a_direction_is_read_out_by_the_last_layer_at_the_time_of_the_step(model, autoencoder, empty):
    directions, mean = rows(3), rows(1, seed=1)[0]
    found = read_out(model, autoencoder, directions, mean, 2.0, CANVAS, empty)
    assert found.shape == (3, HEIGHT, WIDTH, 3)
    with torch.no_grad():
        vec = model.conditioning(torch.tensor([0.6]), empty.y, None)
        token = mean + 2 * directions[1] / directions[1].norm()
        velocity = model.read_out(token.expand(1, 12, D).contiguous(), vec)
    expected = decode(autoencoder, -velocity, HEIGHT, WIDTH, torch.float32)
    assert (found[1].int() - expected[0].int()).abs().max() <= 1
    longer = read_out(model, autoencoder, 5 * directions, mean, 2.0, CANVAS, empty)
    assert (found.int() - longer.int()).abs().max() <= 1  # the way of a direction counts, and not its length


@pytest.mark.parametrize(
    ("site", "changed"),
    [
        ("single.1.img", "single.1.img.update"),
        ("single.1.img.update", "single.1.img.update"),
        ("double.0.img.mlp", "double.0.img.mlp"),
        ("double.1.txt", "double.1.txt.update"),
    ],
)
def test_an_icon_is_the_empty_prompt_with_the_direction_in_place_of_what_the_block_adds(
    model, autoencoder, empty, site, changed
):
    amounts = rows(2)
    found = icons(model, autoencoder, Site.parse(site), amounts, CANVAS, empty)
    for i in range(2):
        inputs = CANVAS.inputs(empty, 1, torch.device("cpu"), torch.float32)
        with Intervention(model, {changed: lambda value, step, i=i: amounts[i].expand(value.shape)}):
            *_, last = sample(model, inputs, list(TIMES), 3.0)
        expected = decode(autoencoder, last.after, HEIGHT, WIDTH, torch.float32)
        assert (found[i].int() - expected[0].int()).abs().max() <= 1
    assert not torch.equal(found[0], found[1])


def test_the_untouched_picture_is_what_the_empty_prompt_draws(model, autoencoder, empty):
    inputs = CANVAS.inputs(empty, 1, torch.device("cpu"), torch.float32)
    *_, last = sample(model, inputs, list(TIMES), 3.0)
    expected = decode(autoencoder, last.after, HEIGHT, WIDTH, torch.float32)
    studio = studio_of(model, autoencoder, empty)
    assert np.array_equal(np.asarray(studio.untouched()), expected[0].numpy())


@pytest.mark.parametrize(
    ("site", "reads"),
    [
        ("single.1.img", True),
        ("single.1", True),
        ("double.0.img.update", True),
        ("double.0.txt", False),
        ("double.0.img.mlp", False),
        ("single.1.img.neurons", False),
    ],
)
def test_only_image_tokens_of_the_residual_stream_are_read_out(model, autoencoder, empty, site, reads):
    assert reads_out(Site.parse(site)) == reads
    width = 256 if site.endswith("neurons") else D
    directions = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    (picture,) = studio_of(model, autoencoder, empty, site, directions=directions).draw([2])
    assert picture.size == ((2 if reads else 1) * WIDTH, HEIGHT)


def test_each_is_rendered_once_and_a_broken_one_again(model, autoencoder, empty, tmp_path):
    studio = studio_of(model, autoencoder, empty)
    assert list(draw_missing(studio, tmp_path, [0, 1, 5], 2, "a digest")) == [2, 3]
    names = {"0.png", "1.png", "5.png", "untouched.png"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == names
    (tmp_path / "1.png").write_bytes(b"broken")
    assert not is_drawn(tmp_path / "1.png", "a digest")
    list(draw_missing(studio, tmp_path, [0, 1, 5], 2, "a digest"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not is_drawn(tmp_path / "0.png", "another digest")
    list(draw_missing(studio_of(model, autoencoder, empty, length=9.0), tmp_path, [0], 2, "another digest"))
    assert is_drawn(tmp_path / "0.png", "another digest")
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.size == (2 * WIDTH, HEIGHT)


# ---- Maps of stored scores


def test_a_feature_has_one_scale_in_all_its_pictures(small_with_examples):
    folder = small_with_examples
    feature = int(np.argmax(folder.table().images))
    images = [image for image in folder.examples().top[feature].tolist() if image >= 0]
    maps = np.stack([np.nan_to_num(folder.map(feature, image)).max(axis=0) for image in images])
    assert scale_of(folder, feature) == maps.max()
    assert scale_of(folder, feature, 50) == pytest.approx(np.median(maps[maps > 0]))
    dead = int(np.flatnonzero(~folder.table().alive)[0])
    assert scale_of(folder, dead) is None


def test_a_line_says_what_is_known_of_a_feature(small_with_examples):
    table = small_with_examples.table()
    feature = int(np.argmax(table.images))
    first, second = feature_numbers(small_with_examples, feature)
    assert first.startswith(f"on {10 * int(table.images[feature])}% of images")
    assert second == f"mean when active {table.mean_active[feature]:.3g}"


def test_pictures_that_are_not_there_are_one_line(small_with_examples):
    feature = int(np.argmax(small_with_examples.table().images))
    for draw in (
        lambda: draw_overlay(small_with_examples, feature, 0),
        lambda: sheet_line(small_with_examples, feature, 2),
    ):
        with pytest.raises(FluxIRError, match="has no picture here"):
            draw()


@pytest.fixture(scope="module")
def small_with_examples(small, tmp_path_factory):
    """The small collection without pictures, with examples."""
    target = shutil.copytree(small, tmp_path_factory.mktemp("drawings") / "small")
    return open_features(flux_ir.find_examples(target / "features" / "img").path)
