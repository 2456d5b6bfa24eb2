"""A whole study by one file: its stages, what is skipped, and what may be wrong with the file."""

import json
import tomllib
from pathlib import Path

import pytest

import flux_ir
from flux_ir.api.study import read_study
from flux_ir.commands.study import main
from flux_ir.errors import FluxIRError

SMALL = """
[prompts]
captions = 6
seed = 3

[collect]
model = "flux-tiny"
sites = "single.6.img"
steps = [1]
num_steps = 2

[train]
k = 4
expansion = 2
batch_tokens = 64

[evaluate]

[features]
"""


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study that was run."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.toml").write_text(SMALL)
    result = flux_ir.run_study(folder / "small.toml", output_dir=folder / "studies")
    return folder, result


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(studied, tmp_path, old: str, new: str) -> Path:
    (tmp_path / "small.toml").write_text(SMALL.replace(old, new))
    assert old in SMALL
    return tmp_path / "small.toml"


def test_a_study_goes_through_its_stages_into_one_folder(studied):
    folder, result = studied
    assert [stage.stage for stage in result.stages] == ["collect", "train", "evaluate", "features"]
    assert result.folder == folder / "studies" / "small"
    captures, saes, numbers, features = (stage.folders[0] for stage in result.stages)
    assert len(flux_ir.open_source(captures).generations) == 6
    assert flux_ir.load_sae(saes).config.k == 4
    assert len(flux_ir.read_features(features)) == 2 * 192
    assert json.loads(numbers.read_text())["overall"]["tokens"] > 0


def test_the_same_study_again_does_nothing_and_changes_no_byte(studied, capsys):
    folder, _ = studied
    before = files(folder)
    assert main([str(folder / "small.toml"), "--output_dir", str(folder / "studies")]) == 0
    assert files(folder) == before
    assert capsys.readouterr().out.count("there already") == 4


def test_the_file_it_writes_has_every_default_and_is_a_study_itself(studied, tmp_path):
    folder, result = studied
    written = (result.folder / "study.toml").read_text()
    tables = tomllib.loads(written)
    assert tables["collect"]["save_images"] is True
    assert tables["train"]["arch"] == "topk"
    assert "# lr: the function's own choice" in written
    (tmp_path / "again.toml").write_text(written)
    again, first = read_study(tmp_path / "again.toml"), read_study(folder / "small.toml")
    assert (again.stages, again.prompts, again.name) == (first.stages, first.prompts, "small")


def test_a_changed_setting_leads_to_new_folders_from_there_on(studied, tmp_path, capsys):
    folder, first = studied
    before = files(first.folder)
    file = changed(studied, tmp_path, "k = 4", "k = 3")
    assert main([str(file), "--output_dir", str(folder / "studies"), "--from", "train"]) == 0
    after = files(first.folder)
    assert {name: after[name] for name in before if name != "study.toml"} == {
        name: content for name, content in before.items() if name != "study.toml"
    }
    assert len(list(first.folder.glob("captures-*"))) == 1
    assert len(list(first.folder.glob("saes-*"))) == 2
    assert "collect" not in capsys.readouterr().out


def test_only_needs_what_it_builds_on(studied, tmp_path, capsys):
    folder, _ = studied
    file = changed(studied, tmp_path, "captions = 6", "captions = 7")
    assert main([str(file), "--output_dir", str(folder / "studies"), "--only", "evaluate"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "evaluate builds on collect, which is not finished with these settings, only with others" in error
    assert f"run flux-ir study {file} --only collect,train,evaluate: what is there already is skipped" in error
    assert main([str(file), "--output_dir", str(tmp_path / "none"), "--only", "collect,features"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "features builds on train, which is not finished with these settings hint" in error.replace(" -> ", " ")
    assert not list((tmp_path / "none" / "small").glob("captures-*"))


def test_prompts_of_a_file_are_taken_once_and_sampled_by_the_seed(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i % 10}\n" for i in range(30)))
    study = SMALL.replace("captions = 6", 'file = "p.txt"\nsample = 4')
    (tmp_path / "s.toml").write_text(study)
    some = read_study(tmp_path / "s.toml").prompts["train"]
    assert len(set(some)) == 4
    assert some == sorted(some)
    (tmp_path / "s.toml").write_text(study.replace("seed = 3", "seed = 4"))
    assert read_study(tmp_path / "s.toml").prompts["train"] != some


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[train]", "[trian]", "there is no stage 'trian'; did you mean train?"),
        ("k = 4", 'k = "4"', "[train] k must be a list of whole number or whole number: got '4'"),
        ("k = 4", "kk = 4", "[train] kk: there is no such setting; did you mean k?"),
        ("k = 4", 'output_dir = "x"', "[train] output_dir: the study itself gives it"),
        ("k = 4", 'arch = "topp"', "[train] arch must be 'topk' or"),
        ('sites = "single.6.img"', "", "[collect] needs sites"),
        ("captions = 6", "", "[prompts] must say where prompts come from"),
        ("captions = 6", 'file = "none.txt"', "cannot read the prompts in"),
        ("captions = 6", "captions = 6\nsample = 9", "a sample of 9 prompts needs as many different ones: there are 6"),
        ("captions = 6", 'captions = 6\npart = "D"', "part must be one of T, A, B, C: got 'D'"),
        ("[prompts]", "[prompts", "must be TOML"),
        ("[prompts]", 'name = "a/b"\n[prompts]', "name must be the name of a folder"),
        ("captions = 6", "caption = 6", "[prompts] caption: there is no such setting; did you mean captions?"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_before_anything_runs(old, new, message, tmp_path, capsys):
    (tmp_path / "s.toml").write_text(SMALL.replace(old, new))
    assert main([str(tmp_path / "s.toml"), "--output_dir", str(tmp_path / "studies")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 2
    assert not (tmp_path / "studies").exists()


def test_unknown_stages_and_files_are_refused(studied, tmp_path, capsys):
    folder, _ = studied
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "cannot read the study" in capsys.readouterr().err
    with pytest.raises(FluxIRError, match="has no stage 'tarin'; did you mean train"):
        flux_ir.run_study(folder / "small.toml", only="tarin")
    with pytest.raises(FluxIRError, match="--from and --only both choose stages"):
        flux_ir.run_study(folder / "small.toml", only="train", from_="train")


def test_known_answers_are_asked_of_captures_of_their_own(tmp_path):
    concepts = "[concepts]\nrows = ['sae']\nnull = 1\nbootstrap = 1\nleast_positives = 4\nrepeats = 1\n"
    uses = "".join(
        f"[concepts.{use}]\ncaptions = 8\npart = '{part}'\n" for use, part in (("pick", "A"), ("report", "B"))
    )
    study = SMALL.replace("seed = 3", "seed = 3\npart = 'T'").replace("[evaluate]\n\n[features]\n", concepts + uses)
    (tmp_path / "s.toml").write_text(study)
    result = flux_ir.run_study(tmp_path / "s.toml", output_dir=tmp_path / "studies")
    (folder,) = result.stages[-1].folders
    assert json.loads((folder / "concepts.json").read_text())["steps"]["1"]["sae"]["answers"]
    assert len(list(result.folder.glob("captures-*"))) == 3
    shared = study.replace("captions = 6", "captions = 2000").replace("part = 'A'", "part = 'T'")
    (tmp_path / "s.toml").write_text(shared)
    with pytest.raises(FluxIRError, match="prompts for train and for pick must differ"):
        read_study(tmp_path / "s.toml")


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[2] / "recipes" / "runs").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_recipes_can_be_read(recipe, tmp_path):
    text = recipe.read_text()
    (tmp_path / recipe.name).write_text(text)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(20000)))
    assert {"collect", "train", "evaluate", "features"} <= read_study(tmp_path / recipe.name).stages.keys()
