"""Attention maps of flux-tiny's pictures, from the prompt to the sheet."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flux_ir
from flux_ir.api.map_files import Means
from flux_ir.demo.drawing import draw
from flux_ir.demo.scenes import scene_at
from flux_ir.errors import FluxIRError
from flux_ir.maps.attention import BlockMaps
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.steering.regions import Grid

PROMPT = "a red circle left of a red square on a white background"
SIZE = {"width": 176, "height": 112}  # 7 x 11 image tokens


@pytest.fixture(scope="module")
def model():
    return flux_ir.load_model("flux-tiny")


@pytest.fixture(scope="module")
def maps(model, tmp_path_factory):
    return flux_ir.attention_maps(
        PROMPT,
        words=["red", "white background"],
        patches=[0, 38],
        model=model,
        seed=3,
        num_steps=2,
        output_dir=tmp_path_factory.mktemp("maps"),
        **SIZE,
    )


def test_every_step_and_block_has_maps_of_every_word_and_patch(maps):
    assert maps.words == ["red#1", "red#2", "white background"]
    assert [path.name for path in maps.steps] == ["step_0.safetensors", "step_1.safetensors"]
    step = load_file(maps.steps[1])
    blocks = [f"double.{n}" for n in range(4)] + [f"single.{n}" for n in range(8)]
    parts = {"to_words": (3, 7, 11), "value_to_words": (3, 7, 11), "from_words": (3, 7, 11)}
    parts |= {"from_patches": (2, 7, 11), "to_groups": (7, 7, 11), "registers": (7, 11)}
    assert {name: tuple(value.shape) for name, value in step.items()} == {
        f"{block}/{part}": shape for block in blocks for part, shape in parts.items()
    }
    assert maps.mass.keys() == {"all", *blocks}
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-5) for shares in maps.mass.values())
    said = json.loads(maps.numbers.read_text())
    assert said["words"][0] == {"word": "red#1", "tokens": [1]}
    assert said["registers"] == dict.fromkeys(blocks, 0)  # flux-tiny has none


def test_means_are_those_of_the_steps_files(maps):
    files = [load_file(path) for path in maps.steps]
    expected = torch.stack([file[f"double.{n}/to_words"] for file in files for n in (2, 3)]).mean(dim=0)
    torch.testing.assert_close(maps.mean["double 2-3"]["to_words"], expected)
    assert list(maps.mean) == ["all", "double 0-1", "double 2-3", "single 0-3", "single 4-7"]
    means = load_file(maps.folder / "mean.safetensors")
    assert torch.equal(means["all/to_words"], maps.mean["all"]["to_words"])
    of_block = torch.stack([file["single.5/value_to_words"] for file in files]).mean(dim=0)
    torch.testing.assert_close(means["single.5/value_to_words"], of_block)


def test_the_sheet_shows_every_word_and_patch(maps):
    with Image.open(maps.sheet) as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 600
    assert len(list((maps.folder / "overlays").glob("*/*.png"))) == (3 + 3 + 2) * 5


def test_the_page_has_a_script_for_each_word_and_direction(maps):
    scripts = {path.stem for path in (maps.folder / "maps_files").iterdir()}
    words = {f"word_{n}_{way}" for n in range(3) for way in ("to_words", "value_to_words", "from_words")}
    groups = {f"group_{n}_to_groups" for n in range(5)}  # there are neither registers nor a reference
    assert scripts == words | groups | {"patch_0_from_patches", "patch_1_from_patches"}
    assert '"white background"' in maps.page.read_text()


def test_the_picture_is_that_of_a_run_without_maps(maps, model):
    *_, last = flux_ir.sample(model, PROMPT, seed=3, num_steps=2, **SIZE)
    pixels = flux_ir.decode(model, last.after, **SIZE)
    assert maps.picture.read_bytes() == jpeg_bytes(pixels, model="flux-tiny", prompt=PROMPT)


def test_kept_heads_have_the_mean_of_the_averaged_maps(maps, model, tmp_path):
    chosen = {"words": "red", "blocks": "single.7", "steps": [1]}
    heads = flux_ir.attention_maps(
        PROMPT, **chosen, heads=True, model=model, seed=3, num_steps=2, output_dir=tmp_path, **SIZE
    )
    (path,) = heads.steps
    kept = load_file(path)["single.7/to_words"]
    assert kept.shape == (model.spec.flux.num_heads, 2, 7, 11)
    torch.testing.assert_close(kept.mean(dim=0), load_file(maps.steps[1])["single.7/to_words"][:2])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"words": "purple"}, "the prompt has no word 'purple' .*its words are a#1, red#1, circle, left, of"),
        ({"blocks": "double.9"}, r"none matches 'double\.9' .*the nearest are double\.3"),
        ({"patches": [64]}, "one of the 64 image tokens, counted from 0: got 64 .*8 rows of 8"),
        ({"steps": [7], "num_steps": 2}, "step"),
    ],
)
def test_what_is_not_there_is_refused_and_leaves_nothing(model, tmp_path, wrong, says):
    with pytest.raises(FluxIRError, match=says):
        flux_ir.attention_maps(PROMPT, model=model, output_dir=tmp_path / "maps", **wrong)
    assert not (tmp_path / "maps").exists()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A picture of 176 x 112 px that no model made, as a file."""
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(draw(scene_at(0, 5), 176)).crop((0, 0, 176, 112)).save(path)
    return path


def test_a_real_picture_is_looked_at_with_the_noise_of_each_step(model, scene, tmp_path):
    asked = {"words": "red", "blocks": ["double.1", "single.0"], "model": model, "seed": 3, "num_steps": 4}
    found = flux_ir.attention_maps("a red circle", image=scene, concepts="red,blue", output_dir=tmp_path, **asked)
    assert [path.name for path in found.steps] == ["step_2.safetensors", "step_3.safetensors"]
    said = json.loads(found.numbers.read_text())
    assert said["size"] == [160, 96]  # the nearest to 176 x 112, scaled to as many pixels as 128 x 128
    assert (said["image"]["path"], said["image"]["width"]) == (str(scene), 160)
    with Image.open(found.picture) as picture, Image.open(scene) as given:
        seen, own = (np.asarray(one.convert("RGB").resize((160, 96)), dtype=float) for one in (picture, given))
    assert abs(seen - own).mean() < 4  # what is shown is the picture that was given
    alone = flux_ir.attention_maps("a red circle", image=scene, steps=[3], output_dir=tmp_path, **asked)
    kept = load_file(alone.steps[0])
    both = load_file(found.steps[1])
    assert all(torch.equal(kept[name], both[name]) for name in kept)  # no step depends on those before it


def test_maps_of_an_encoded_picture_are_those_of_a_run_that_begins_with_it(model, scene, tmp_path):
    with Image.open(scene) as given:
        fitting = given.convert("RGB").resize((144, 96))
    asked = {"blocks": "single.7", "model": model, "seed": 3, "num_steps": 4, "output_dir": tmp_path}
    looked = flux_ir.attention_maps("a red circle", image=fitting, steps=[2], **asked)
    begun = flux_ir.attention_maps("a red circle", init_image=fitting, strength=0.5, steps=[2], **asked)
    assert load_file(looked.steps[0]).keys() == load_file(begun.steps[0]).keys()
    for name, value in load_file(begun.steps[0]).items():
        assert torch.equal(value, load_file(looked.steps[0])[name])


def test_a_picture_needs_no_prompt(model, scene, tmp_path):
    found = flux_ir.attention_maps(
        image=scene, width=64, height=48, steps=[3], num_steps=4, model=model, seed=1, output_dir=tmp_path
    )
    said = json.loads(found.numbers.read_text())
    assert (said["prompt"], said["words"], said["grid"]) == ("", [], [3, 4])
    assert found.sheet.exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"image": __file__}, "cannot read the picture of --image in .*name a PNG or JPEG file"),
        ({"image": "no-such-file.png"}, "cannot read the picture of --image in no-such-file"),
        ({"image": "scene", "steps": [0, 3], "num_steps": 4}, "nothing of --image: got 0, 3"),
        ({"image": "scene", "num_steps": 1}, "nothing of --image: got one step"),
        ({"image": "scene", "init_image": "scene"}, "--init_image is what another picture is sampled from: got both"),
        ({"image": "scene", "width": 100}, "must be positive multiples of 16 px: got 100 x"),
    ],
)
def test_pictures_that_cannot_be_looked_at_are_refused(model, scene, tmp_path, wrong, says):
    given = {name: scene if value == "scene" else value for name, value in wrong.items()}
    with pytest.raises(FluxIRError, match=says):
        flux_ir.attention_maps(PROMPT, model=model, output_dir=tmp_path / "maps", **given)
    assert not (tmp_path / "maps").exists()


def test_concepts_need_not_be_in_the_prompt(model, tmp_path):
    found = flux_ir.attention_maps(
        "a red circle on a white background",
        concepts="red, triangle,background",
        words="red",
        blocks="double.0",
        model=model,
        seed=3,
        num_steps=2,
        output_dir=tmp_path,
        **SIZE,
    )
    assert found.concepts == ["red", "triangle", "background"]
    torch.testing.assert_close(found.concept_map.sum(dim=0), torch.ones(7, 11))
    steps = [load_file(path)["double.3/concepts"] for path in found.steps]
    torch.testing.assert_close(torch.stack(steps).mean(dim=0), found.concept_map)
    assert torch.equal(load_file(found.folder / "mean.safetensors")["concepts"], found.concept_map)
    with Image.open(found.concept_sheet) as sheet:
        assert sheet.width > 600


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"concepts": "red"}, "two words or more, each once: got red"),
        ({"concepts": ["red", "red"]}, "two words or more, each once: got red, red"),
        ({"concepts": "red,blue", "concept_blocks": [4]}, "of which this model has 4: got 4"),
        ({"concepts": "red,blue", "concept_blocks": []}, "of which this model has 4"),
    ],
)
def test_concepts_that_cannot_be_mapped_are_refused(model, tmp_path, wrong, says):
    with pytest.raises(FluxIRError, match=says):
        flux_ir.attention_maps(PROMPT, model=model, output_dir=tmp_path, **wrong)


def test_what_is_held_in_memory_does_not_grow_with_the_steps(tmp_path):
    maps = BlockMaps(*(torch.rand(2, 6) for _ in range(5)), torch.zeros(6))

    def held_after(steps):
        means = Means(tmp_path / str(steps), Grid(48, 32), range(steps), heads=False, concept_blocks=1)
        for step in range(steps):
            means.take(step, "double.0", maps)
            means.take_concepts(step, 0, torch.rand(1, 3, 6))
            means.write_step(step)
        torch.testing.assert_close(means.by_block()["double.0"]["to_words"].flatten(1), maps.to_words)
        return sum(len(pickle.dumps(value)) for name, value in vars(means).items() if name != "files")

    assert held_after(9) == held_after(3)
