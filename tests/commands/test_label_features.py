"""`flux-ir label-features` and `compare-features` as they are typed, on what flux-tiny drew."""

import json
import shutil

import pytest

from flux_ir.commands.compare_features import main as compare_features
from flux_ir.commands.label_features import main as label_features
from flux_ir.features.embeddings import FOLDER
from tests.features.real import IMAGES, make_features, save_small_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_features(tmp_path_factory.mktemp("real"), examples=False).path


@pytest.fixture
def folder(made, tmp_path):
    for name in ("captures", "saes"):
        (tmp_path / name).symlink_to(made.parents[1] / name)
    return shutil.copytree(made, tmp_path / "features" / made.name)


def words_of(folder, stream):
    return json.loads((folder / "words.json").read_text())["streams"][stream]


def test_features_of_text_are_told_by_their_tokens(folder, capsys):
    assert label_features(["--features", str(folder), "--min_count", "2"]) == 0
    told = capsys.readouterr()
    assert "txt: words of the prompts lift" in told.out
    tokens = words_of(folder, "txt")["tokens"]
    strings = [text.strip() for text in tokens["strings"]]
    assert {"a", "red", "circle", "square", "star"} <= set(strings)
    assert (strings[tokens["end"]], strings[tokens["padding"]]) == ("</s>", "<pad>")
    listed = {strings[row[0]] for rows in tokens["features"].values() for row in rows}
    assert "red" in listed
    assert "<pad>" not in listed  # it is known where prompts end, so padding is not scored
    assert max(tokens["on_end"]) > 0.2 > max(tokens["on_padding"]) == 0
    assert all(fired <= of for rows in tokens["features"].values() for _, fired, of, _ in rows)
    assert "tokens" not in words_of(folder, "img")


def test_clip_looks_at_the_pictures_once(folder, tmp_path, text_folders, capsys):
    clip = save_small_clip(tmp_path / "clip", text_folders.clip)
    (tmp_path / "texts.txt").write_text("a white square\n\na star\n")
    words = ["--features", str(folder), "--clip", str(clip), "--vocabulary", str(tmp_path / "texts.txt")]
    assert label_features([*words, "--device", "cpu"]) == 0
    first = [(folder / name).read_bytes() for name in ("words.json", "labels.json")]
    made = {path: path.stat().st_mtime_ns for path in (folder / FOLDER).rglob("*.safetensors")}
    assert len(made) == 1
    settings = json.loads((folder / "labels.json").read_text())["settings"]
    assert settings["clip"]
    assert settings["vocabulary"]
    assert label_features([*words, "--device", "cpu", "--seed", "1"]) == 0
    assert label_features([*words, "--device", "cpu"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert [(folder / name).read_bytes() for name in ("words.json", "labels.json")] == first
    capsys.readouterr()
    (tmp_path / "texts.txt").write_text("\n")
    assert label_features(words) == 2
    assert "holds no text" in capsys.readouterr().err
    assert label_features(["--features", str(folder), "--clip", str(tmp_path / "nowhere")]) == 2
    assert "--clip must be a folder or a repository" in capsys.readouterr().err


def test_text_read_by_another_tokenizer_is_refused(folder, text_folders, capsys):
    assert label_features(["--features", str(folder), "--tokenizer", str(text_folders.t5)]) == 0  # as many tokens
    broken = shutil.copytree(text_folders.t5, folder.parent / "broken")
    said = json.loads((broken / "tokenizer.json").read_text())
    said["post_processor"] = None  # no end
    (broken / "tokenizer.json").write_text(json.dumps(said))
    capsys.readouterr()
    assert label_features(["--features", str(folder), "--tokenizer", str(broken)]) == 2
    assert "the tokenizer must be the one of the captures" in capsys.readouterr().err


def test_two_streams_of_one_folder_are_compared(folder, capsys):
    words = ["--features", str(folder), "--other", str(folder), "--min_images", "2", "--permutations", "99"]
    assert compare_features([*words, "--name", "itself"]) == 0
    assert f"over {IMAGES} generations" in capsys.readouterr().out
    content = json.loads((folder / "compare" / "itself" / "compare.json").read_text())
    assert content["pairs"]["a"] == content["pairs"]["b"]
    assert compare_features([*words, "--stream", "txt", "--level", "token", "--name", "text"]) == 0
    assert json.loads((folder / "compare" / "text" / "compare.json").read_text())["a"]["stream"] == "txt"
