"""`flux-ir export`: captures as plain arrays, which other programs read and training reads again."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flux_ir.activations.source import open_source
from flux_ir.commands.main import main as flux_ir
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import StepContext
from flux_ir.sites import Site
from tests.recording.conftest import write_values

TXT, IMG = 7, 12
SITES = ("double.1.img", "double.1.txt", "single.0")
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def captures(tmp_path, tiny_flux_params):
    """Writes a folder of two captures of unequal streams."""

    def make(names=("aa", "bb"), **changes):
        folder = tmp_path / "captures"
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            metadata = {"generation_id": name, "model": "tiny", "prompt": f"größer {number}", "used_txt": 3 + number}
            known = {"txt_tokens": TXT, "img_tokens": IMG, "timesteps": (1.0, 0.75, 0.5, 0.0), "steps": [0, 2]}
            known |= {"guidance": 1.0, "metadata": metadata, "rounds": True}
            plan = CapturePlan(tiny_flux_params, [Site.parse(site) for site in SITES], **{**known, **changes})
            draw = torch.Generator().manual_seed(number)
            values = {
                (step, site): torch.randn(plan.full_shape(site), generator=draw)
                for step in plan.kept_steps
                for site in plan.sites
            }
            state, y = torch.zeros(plan.full_img_shape), torch.zeros(plan.y_shape)
            write_values(
                folder / f"{number}.pt", plan, values, {step: StepContext(state, y, TXT) for step in plan.kept_steps}
            )
        return folder

    return make


@pytest.fixture
def export(tmp_path, capsys):
    """Exports and returns the folder; `wrong` returns what is said instead."""

    def run(*words, to="out", wrong=False):
        code = flux_ir(["export", *map(str, words), "--output_dir", str(tmp_path / to)])
        said = capsys.readouterr()
        assert code == (2 if wrong else 0), said.err
        return said.err if wrong else tmp_path / to

    return run


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FLOAT8])
def test_safetensors_hold_what_the_capture_holds(captures, export, dtype):
    folder = captures(dtype=dtype)
    out = export("--captures", folder)
    assert sorted(files_in(out)) == ["aa.safetensors", "bb.safetensors", "export.json"]
    for number, name in enumerate(("aa", "bb")):
        capture, tensors = load_capture(folder / f"{number}.pt"), load_file(out / f"{name}.safetensors")
        assert set(tensors) == {f"{site}/step_{step}" for site in SITES for step in (0, 2)}
        for site in capture.sites:
            for step in capture.steps:
                tensor = tensors[f"{site}/step_{step}"]
                assert tensor.dtype == (torch.bfloat16 if dtype == FLOAT8 else dtype)
                assert torch.equal(tensor, capture.read(site, step)[0])
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["flux_ir"])
        assert facts == {
            "id": name,
            "prompt": f"größer {number}",
            "model": "tiny",
            "txt_tokens": TXT,
            "used_txt": 3 + number,
            "img_positions": None,
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FLOAT8])
def test_npy_holds_bfloat16_as_float32(captures, export, dtype):
    folder = captures(dtype=dtype)
    out = export("--captures", folder, "--format", "npy")
    arrays = {f"{site}/step_{step}/{name}.npy" for site in SITES for step in (0, 2) for name in ("aa", "bb")}
    assert set(files_in(out)) == arrays | {"aa.json", "bb.json", "export.json"}
    array = np.load(out / "single.0" / "step_2" / "bb.npy")
    assert array.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    expected = load_capture(folder / "1.pt").read(Site.parse("single.0"), 2)[0]
    assert np.array_equal(array, expected.float().numpy())


@pytest.mark.parametrize("form", ["safetensors", "npy"])
@pytest.mark.parametrize("changes", [{}, {"dtype": FLOAT8, "img_positions": [0, 5, 11]}])
def test_what_was_exported_is_read_like_the_captures(captures, export, form, changes):
    folder = captures(**changes)
    before, after = open_source(folder), open_source(export("--captures", folder, "--format", form))
    assert (list(after.sites), list(after.steps), after.model) == (before.sites, before.steps, before.model)
    assert [(one.id, one.prompt) for one in after.generations] == [(one.id, one.prompt) for one in before.generations]
    halves = [Site.parse("single.0.img"), Site.parse("single.0.txt")]
    for site in [*before.sites, *halves]:
        assert (after.d(site), after.tokens(site)) == (before.d(site), before.tokens(site))
        for number in range(2):
            for step in before.steps:
                one, other = before.read(number, site, step), after.read(number, site, step)
                assert torch.equal(other.floats().float(), one.floats().float())
                assert torch.equal(other.positions, one.positions)
                assert other.positions.dtype == torch.int32
                for word in ("site", "step", "generation", "prompt", "txt_tokens", "used_txt"):
                    assert getattr(other, word) == getattr(one, word), word
    with pytest.raises(Exception, match="was not exported"):
        after.read(0, Site.parse("double.0.img"), 0)
    with pytest.raises(Exception, match="step 1 was not exported"):
        after.read(0, before.sites[0], 1)


def test_sites_and_steps_can_be_chosen(captures, export):
    out = export("--captures", captures(), "--sites", "*.img,single.0.txt", "--steps", "2")
    names = ["double.1.img/step_2", "single.0.img/step_2", "single.0.txt/step_2"]
    tensors = load_file(out / "bb.safetensors")
    assert sorted(tensors) == names
    whole = load_capture(captures() / "1.pt").read(Site.parse("single.0"), 2)[0]
    assert torch.equal(torch.cat([tensors["single.0.txt/step_2"], tensors["single.0.img/step_2"]]), whole)


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_exporting_again_gives_the_same_bytes_whatever_was_left(captures, export, form):
    words = ("--captures", captures(), "--format", form)
    out = export(*words)
    first = files_in(out)
    for path in out.rglob("*bb*"):
        path.write_bytes(b"broken")
    (out / "aa.safetensors").unlink(missing_ok=True)
    export(*words)
    assert files_in(out) == first
    assert files_in(export(*words, to="elsewhere")) == first


# ---- Wrong input


def test_another_export_in_the_same_folder_is_refused(captures, export):
    folder = captures()
    out = export("--captures", folder)
    before = files_in(out)
    assert "was exported with other steps: 0, 2, now 0" in export("--captures", folder, "--steps", "0", wrong=True)
    assert "other format: safetensors, now npy" in export("--captures", folder, "--format", "npy", wrong=True)
    assert files_in(out) == before


def test_a_folder_with_other_things_is_refused(captures, export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    assert re.search(
        "out has other things in it\nhint: name a new folder", export("--captures", captures(), wrong=True)
    )
    assert "has other things in it" in export("--captures", captures(), to="captures", wrong=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sites", "double.0.*"], "no site of this model matches 'double.0.*'\nhint: the nearest are double.1."),
        (["--steps", "1,2"], "--steps must be among those captured: got 1\nhint: "),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(captures, export, tmp_path, words, says):
    assert says in export("--captures", captures(), *words, wrong=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "says"), [(("aa", "aa"), "is there twice"), (("aa", "../b"), "is no name of a file")]
)
def test_ids_that_are_no_names_are_refused(captures, export, tmp_path, names, says):
    assert says in export("--captures", captures(names), wrong=True)
    assert not (tmp_path / "out").exists()


def test_plain_arrays_and_nothing_are_refused(export, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 4), np.float32))
    assert "x.npy has none" in export("--captures", tmp_path / "x.npy", wrong=True)
    assert "there is nothing at" in export("--captures", tmp_path / "nowhere", wrong=True)


def test_exports_of_different_things_in_one_folder_are_refused(captures, export):
    folder = captures()
    out, other = export("--captures", folder), export("--captures", folder, "--steps", "2", to="other")
    shutil.copy(other / "aa.safetensors", out / "cc.safetensors")
    with pytest.raises(Exception, match=r"must have the same sites and steps: .*cc\.safetensors has"):
        open_source(out)
