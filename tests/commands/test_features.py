"""`flux-ir features` as it is typed: killed and gone on with, by two processes, on what it cannot score."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flux_ir.commands.features import main as features
from flux_ir.commands.find_examples import main as find_examples
from flux_ir.commands.main import main as flux_ir
from flux_ir.commands.score_features import main as score_features
from flux_ir.features.folder import open_features
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from tests.activations.conftest import write_collection
from tests.features.conftest import FEATURES, D, save_small_sae

IMAGES = 1100  # five parts


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More images than a part holds, an autoencoder, and what one process that nobody stops makes of them."""
    folder = tmp_path_factory.mktemp("many")
    write_collection(folder / "captures", IMAGES // 50, per_shard=50, sites=("double.0.img",), steps=(0,), img_tokens=4)
    save_small_sae(folder / "saes" / "small", "double.0.img", steps=(0,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are compared with it
    try:
        assert score_features(words(folder, "features")) == 0
        assert find_examples(["--features", str(folder / "features" / "small")]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


def words(folder, output_dir):
    places = [
        "--sae",
        folder / "saes" / "small",
        "--captures",
        folder / "captures",
        "--output_dir",
        folder / output_dir,
    ]
    return [str(word) for word in places] + ["--device", "cpu"]


def command(verb, folder, output_dir):
    return ["-m", "flux_ir", verb, *words(folder, output_dir)]


def alone():
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1"}


def scores_of(folder):
    """Every byte of the scores and the table."""
    files = [*folder.rglob("scores/**/*.safetensors"), *folder.rglob("table.safetensors")]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_killed_and_gone_on_with_it_ends_with_the_same_bytes(many):
    start = [sys.executable, *command("score-features", many, "killed")]
    process = subprocess.Popen(start, stderr=subprocess.DEVNULL, env=alone())
    first = many / "killed" / "small" / "scores" / "img" / "00000.safetensors"
    while not first.is_file() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = first.stat().st_mtime_ns
    done = subprocess.run(start, capture_output=True, text=True, env=alone(), check=False)
    assert done.returncode == 0, done.stderr
    assert f"img: {FEATURES} features on {4 * IMAGES} tokens: 1 dead" in done.stdout
    assert first.stat().st_mtime_ns == made
    assert len(scores_of(many / "killed")) == 7
    assert scores_of(many / "killed") == scores_of(many / "features")


def test_two_processes_make_what_one_makes(many):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    start = [sys.executable, *launcher, *command("features", many, "shared")]
    done = subprocess.run(start, capture_output=True, text=True, env=alone(), check=False)
    assert done.returncode == 0, done.stderr
    assert scores_of(many / "shared") == scores_of(many / "features")
    made = [many / output_dir / "small" / "examples.safetensors" for output_dir in ("shared", "features")]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert not (many / "shared" / "small" / "partial").exists()


def test_a_damaged_part_is_made_again(many):
    folder = shutil.copytree(many / "features", many / "damaged") / "small"
    path = folder / "scores" / "img" / "00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    (folder / "features.json").write_text((folder / "features.json").read_text().replace('"score": {', '"other": {'))
    assert score_features(words(many, "damaged")) == 0
    assert path.read_bytes() == whole


def refused(capsys, verb, *given):
    assert verb([str(word) for word in given]) == 2
    return capsys.readouterr().err


def test_another_autoencoder_is_not_scored_into_the_same_folder(many, capsys, tmp_path):
    save_small_sae(tmp_path / "small", "double.0.img", steps=(0,), seed=1)
    given = ["--sae", tmp_path / "small", "--captures", many / "captures", "--output_dir", many / "features"]
    error = refused(capsys, score_features, *given)
    assert "holds features with another autoencoder (other weights)" in error
    assert "hint: name another folder with --name, or delete that one" in error


def test_an_autoencoder_that_does_not_fit_the_captures_is_one_line(many, capsys, tmp_path):
    given = ["--captures", many / "captures", "--output_dir", tmp_path, "--sae"]
    save_small_sae(tmp_path / "wide", "double.0.img", d=32, steps=(0,))
    assert "takes activations 32 wide: double.0.img is 64 wide" in refused(capsys, features, *given, tmp_path / "wide")
    save_small_sae(tmp_path / "other", "double.0.img", model="flux-dev", steps=(0,))
    assert "trained on flux-dev, and these captures are of tiny" in refused(
        capsys, features, *given, tmp_path / "other"
    )
    save_small_sae(tmp_path / "site", "double.1.img", steps=(0,))
    assert "trained on double.1.img, which these captures do not" in refused(
        capsys, features, *given, tmp_path / "site"
    )
    save_small_sae(tmp_path / "step", "double.0.img", steps=(5,))
    assert "trained on the steps 5, of which the captures have none" in refused(
        capsys, features, *given, tmp_path / "step"
    )
    fitting = many / "saes" / "small"
    assert "--steps must be among those captured, 0: got 3" in refused(capsys, features, *given, fitting, "--steps", 3)
    assert "--name is the name of one folder: got 'a/b'" in refused(capsys, features, *given, fitting, "--name", "a/b")
    assert "must hold files called as the generations are, such as 00000" in refused(
        capsys, features, *given, fitting, "--pictures", tmp_path
    )
    assert "holds no features" in refused(capsys, find_examples, "--features", tmp_path)
    assert not (tmp_path / "small" / "features.json").exists()


def test_steps_that_are_missing_are_noted_and_others_can_be_asked_for(tmp_path, capsys):
    write_collection(tmp_path / "captures", 2, sites=("double.0.img",), steps=(0, 2))
    save_small_sae(tmp_path / "sae", "double.0.img", steps=(2, 7))
    given = ["--sae", str(tmp_path / "sae"), "--captures", str(tmp_path / "captures"), "--output_dir", str(tmp_path)]
    assert flux_ir(["score-features", *given, "--name", "missing"]) == 0
    said = capsys.readouterr().err
    assert "note: the captures lack the steps 7 that" in said
    assert "it is not known where the tokens lie in their images" in said
    assert open_features(tmp_path / "missing").steps == (2,)
    assert flux_ir(["score-features", *given, "--name", "asked", "--steps", "2,0"]) == 0
    assert open_features(tmp_path / "asked").steps == (0, 2)


def test_one_image_on_which_all_features_are_dead_is_noted(tmp_path, capsys):
    torch.manual_seed(0)
    save_file({"x": torch.randn(1, 6, D)}, tmp_path / "array.safetensors")
    sae = make_sae(SAEConfig("topk", D, FEATURES, k=4))
    with torch.no_grad():
        sae.b_enc -= 1000
    save_sae(sae, tmp_path / "sae")
    given = ["--sae", tmp_path / "sae", "--captures", tmp_path / "array.safetensors", "--output_dir", tmp_path]
    assert features([*map(str, given), "--name", "found"]) == 0
    said = capsys.readouterr()
    assert "note: there is one image, so nothing can be said of what features mean: give more" in said.err
    assert f"note: all {FEATURES} features are dead on these img tokens" in said.err
    assert f"img: {FEATURES} features on 6 tokens: {FEATURES} dead, 0 rare" in said.out
    folder = open_features(tmp_path / "found")
    assert (folder.examples().top == -1).all()
    assert (folder.examples().silent == -1).all()
    assert folder.table().share.sum() == 0
    assert np.isnan(folder.table().centre_x).all()


def test_activations_of_clip_have_one_token_and_pictures_by_their_names(tmp_path, capsys):
    from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter

    (tmp_path / "clip" / "shards").mkdir(parents=True)
    (tmp_path / "clip" / "collection.json").write_text('{"version": 2, "kind": "clip"}')
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    names = ["cats/1.png", "cats/2.png", "dog.png"]
    for name in names[:2]:
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / name)
    values = torch.randn(3, 1, D, generator=torch.Generator().manual_seed(0))
    layout = ShardLayout(
        {"clip.image": ShardTensor(values.dtype, tuple(values.shape))},
        {"ids": names, "prompts": ["a cat", "another cat", "a dog"]},
        {"model": "clip-b32"},
    )
    with ShardWriter(tmp_path / "clip" / "shards" / "000000.safetensors", layout) as writer:
        writer.write("clip.image", 0, values)
    save_small_sae(tmp_path / "sae", None, steps=None, model=None)
    given = ["--sae", tmp_path / "sae", "--captures", tmp_path / "clip", "--output_dir", tmp_path, "--name", "found"]
    assert features([*map(str, given), "--pictures", str(tmp_path / "pictures")]) == 0
    assert "note: each image has one token, so there are no maps" in capsys.readouterr().err
    folder = open_features(tmp_path / "found")
    assert folder.picture(1) == (tmp_path / "pictures" / "cats" / "2.png")
    assert folder.picture(2) is None
    assert folder.grid(0) == (1, 1)
    assert set(folder.examples().top[:, 0]) == {0, 1, 2, -1}
    assert np.isnan(folder.table().entropy).all()


def test_a_value_that_is_not_finite_ends_it_with_its_place(tmp_path, capsys):
    write_collection(tmp_path / "captures", 2, sites=("double.0.img",), bad=(3, "double.0.img", 2))
    save_small_sae(tmp_path / "sae", "double.0.img")
    given = ["--sae", tmp_path / "sae", "--captures", tmp_path / "captures", "--output_dir", tmp_path]
    error = refused(capsys, features, *given, "--name", "found")
    assert "double.0.img at step 2 holds NaN or infinity in generation 0000000000000003" in error
