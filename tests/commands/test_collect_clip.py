"""`flux-ir collect-clip` as a user starts it, on a small CLIP that is written to disk first."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from flux_ir.commands.collect_clip import main
from flux_ir.commands.main import main as flux_ir

SIDE_PX, WIDTH, TEXT_WIDTH, PATCHES = 16, 12, 8, 4
CAPTIONS = ["a red circle", "a large blue square", "a small white circle on a large blue square"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory, text_folders):
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": 12, "hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 7, "pad_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIDE_PX, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    for file in text_folders.clip.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    said = {"crop_size": SIDE_PX, "size": SIDE_PX, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def words(clip, pictures, tmp_path):
    return ["--images", str(pictures), "--clip", str(clip), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]


def test_pictures_and_captions_become_arrays_with_an_index(words, clip, tmp_path, capsys):
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = [
        "--captions",
        str(tmp_path / "captions.jsonl"),
        "--tokens",
        "all",
        "--dtype",
        "float32",
        "--store_dtype",
        "float32",
    ]
    assert flux_ir(["collect-clip", *words, *more, "--batch_size", "2"]) == 0
    told = capsys.readouterr()
    assert "3 pictures" in told.out
    assert str(tmp_path / "out") in told.out
    assert "cut to CLIP's length: 1 caption" in told.err
    tensors = load_file(tmp_path / "out" / "shards" / "000000.safetensors")
    assert tensors["clip.image"].shape == (3, 1 + PATCHES, WIDTH)
    pooled = tensors["clip.text"][:, 0]
    ids = torch.tensor([[3, 8, 5, 1, 0, 0, 0]])  # a red circle </s>, then padding
    expected = CLIPTextModel.from_pretrained(clip)(input_ids=ids).pooler_output
    torch.testing.assert_close(pooled[:1], expected, atol=1e-6, rtol=0)
    index = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    told = [(row["id"], row["prompt"], row["shard"], row["row"]) for row in index]
    assert told == [
        (f"{number}.png", text, "shards/000000.safetensors", number) for number, text in enumerate(CAPTIONS)
    ]


def test_without_captions_the_text_half_is_not_needed(words, tmp_path):
    assert main(words) == 0
    (images,) = load_file(tmp_path / "out" / "shards" / "000000.safetensors").values()
    assert images.shape == (3, 1, WIDTH)
    assert images.dtype == torch.bfloat16


def test_the_second_run_finds_everything_done(words, capsys):
    assert main(words) == 0
    assert main(words) == 0
    assert "there from earlier runs: 3 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (["--images", "missing"], "error: --images must be a folder"),
        (["--clip", "missing"], "error: --clip must be a folder or a repository of the hub: got 'missing'"),
        (["--captions", "missing.csv"], "error: cannot read the captions in missing.csv"),
        (["--batch_size", "0"], "error: --batch_size must be at least 1: got 0"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, tmp_path, capsys, change, error):
    rest = words.copy()
    if change[0] in rest:
        place = rest.index(change[0])
        del rest[place : place + 2]
    assert main([*rest, *change]) == 2
    assert capsys.readouterr().err.startswith(error)
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named(words, pictures, tmp_path, capsys):
    (pictures / "1.png").write_text("no picture")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {pictures / '1.png'} must be a picture that can be read")
    assert len(told.splitlines()) == 2
    assert not (tmp_path / "out").exists()
