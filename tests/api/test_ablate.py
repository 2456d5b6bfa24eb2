"""The atlas of two blocks of flux-tiny: what is kept, that it goes on after a kill, and that processes share it."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import flux_ir
from flux_ir.commands.ablate import main
from flux_ir.errors import FluxIRError
from flux_ir.studies.atlas import ASPECTS, Ablation

SMALL = {"max_prompts": 2, "num_steps": 2, "width": 64, "height": 64, "name": "small"}
WHAT = {"blocks": "double.0,single.7", "kinds": ("skip", "txt_update", "patch_txt"), "control_kinds": "skip"}


@pytest.fixture(scope="module")
def model():
    return flux_ir.load_model("flux-tiny")


@pytest.fixture(scope="module")
def atlas(model, tmp_path_factory):
    return flux_ir.ablate(model=model, output_dir=tmp_path_factory.mktemp("atlas"), pictures=1, **SMALL, **WHAT)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_block_has_a_row_of_every_edit(atlas):
    windows = ["skip_early", "skip_late"]  # two steps have no middle
    names = ["skip_all", "skip_all_control", *windows, "txt_update_all", "patch_txt_all"]
    assert [row.ablation.name for row in atlas.rows if row.block == "single.7"] == names
    assert atlas.blocks == ["double.0", "single.7"]
    skipped = atlas.row("double.0", Ablation("skip"))
    assert (skipped.pictures, skipped.identical) == (2, 0)
    assert skipped.latent.low < skipped.latent.mean < skipped.latent.high
    assert set(skipped.lost_of) <= set(ASPECTS)
    unread = atlas.row("single.7", Ablation("txt_update"))
    assert (unread.identical, unread.latent.mean, unread.psnr_db) == (2, 0.0, None)


def test_table_numbers_and_pictures_say_the_same(atlas):
    stored = json.loads((atlas.folder / "atlas.json").read_text())
    assert stored["rows"] == [row.to_json() for row in atlas.rows]
    assert stored["windows"]["all"] == [0, 1]
    assert stored["anchors"][0]["latent"]["mean"] > 0.1
    with atlas.table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["block"] for row in rows] == [row.block for row in atlas.rows]
    assert float(rows[0]["latent"]) == pytest.approx(atlas.rows[0].latent.mean, abs=1e-4)
    with Image.open(atlas.picture) as drawn:
        assert drawn.format == "PNG"
    kept = [picture["id"] for picture in stored["pictures"] if picture["kept"]]
    assert len(kept) == 1
    pictures = atlas.folder / "pictures" / kept[0]
    assert {path.name for path in pictures.glob("*.jpg")} == {"unedited.jpg", "other_prompt.jpg"}
    assert len(list(pictures.glob("*/*.jpg"))) == len(atlas.rows)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(atlas, model, tmp_path):
    whole = files_of(atlas.folder)
    begun = tmp_path / "small"
    shutil.copytree(atlas.folder, begun)
    for path in begun.glob("atlas.*"):
        path.unlink()
    part = next(iter(begun.glob("parts/single.7_*.json")))
    known = json.loads(part.read_text())
    del known["cells"]["patch_txt_all"], known["cells"]["skip_all"]
    part.write_text(json.dumps(known))
    kept = next(iter(begun.glob("parts/double.0_*.json"))).stat().st_mtime_ns
    flux_ir.ablate(model=model, output_dir=tmp_path, pictures=1, **SMALL, **WHAT)
    assert files_of(begun) == whole
    assert next(iter(begun.glob("parts/double.0_*.json"))).stat().st_mtime_ns == kept


def test_other_edits_are_added_to_those_that_are_there(atlas, model, tmp_path):
    shutil.copytree(atlas.folder, tmp_path / "small")
    before = files_of(tmp_path / "small" / "parts")
    what = WHAT | {"blocks": "single.7", "kinds": "mlp", "window_kinds": (), "control_kinds": ()}
    more = flux_ir.ablate(model=model, output_dir=tmp_path, pictures=1, **SMALL, **what)
    assert [row.ablation.name for row in more.rows] == ["mlp_all"]
    after = files_of(tmp_path / "small" / "parts")
    assert after.keys() == before.keys()
    changed = [json.loads(after[name]) for name in after if after[name] != before[name]]
    assert [set(one["cells"]) for one in changed] == [{"mlp_all"} | {r.ablation.name for r in atlas.rows}]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(atlas, tmp_path):
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    words += ["--pictures=1", "--blocks=double.0,single.7", "--kinds=skip,txt_update,patch_txt", "--control_kinds=skip"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    command += ["flux_ir", "ablate", "--model=flux-tiny", f"--output_dir={tmp_path}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("latent distance") == 1
    assert files_of(tmp_path / "small") == files_of(atlas.folder)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--blocks", "single.99"), "none matches 'single.99'"),
        (("--max_prompts", "1"), "patch_img takes what another prompt's run computed: got one prompt"),
        (("--shift", "-1"), "--shift"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_wrong_words_are_told_in_one_line_with_a_hint(words, told, tmp_path, capsys):
    assert main(["--model", "flux-tiny", "--output_dir", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("error:") == 1
    assert "hint" in error.lower()
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_is_told_with_the_nearest():
    command = [sys.executable, "-m", "flux_ir", "ablate", "--kinds", "skp"]  # shape checks are off there
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2
    assert "skp" in done.stderr
    assert "skip" in done.stderr


def test_nothing_asked_for_is_told(model, tmp_path):
    with pytest.raises(FluxIRError, match="at least one kind of edit"):
        flux_ir.ablate(model=model, kinds=(), window_kinds=(), control_kinds=(), output_dir=tmp_path)
