"""`flux-ir train-lens` and `flux-ir lens` through fitted lenses on flux-tiny: what they give, and what they refuse."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_ir.commands.capture import main as capture
from flux_ir.commands.collect import main as collect
from flux_ir.commands.lens import main as lens
from flux_ir.commands.train_lens import main as train_lens
from flux_ir.demo.captions import captions
from flux_ir.lens.ridge import AffineMap
from flux_ir.lens.tuned import load_tuned_lens
from flux_ir.sites import Site

QUICK = ("--model", "flux-tiny", "--num_steps", "2", "--width", "64", "--height", "64")
LAST = Site.parse("single.7.img")


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """What all blocks put out over 30 prompts, at both of two steps."""
    folder = tmp_path_factory.mktemp("lens")
    (folder / "prompts.txt").write_text("\n".join(captions(30, 5)))
    words = ["--prompts", str(folder / "prompts.txt"), "--sites", "double.*.img,single.*"]
    assert collect([*QUICK, *words, "--output_dir", str(folder / "tiny")]) == 0
    return folder / "tiny"


@pytest.fixture(scope="module")
def lens_folder(collection):
    """The tuned lens of that collection."""
    words = ["--captures", str(collection), "--held_out", "0.3"]
    assert train_lens([*words, "--output_dir", str(collection.parent / "lenses")]) == 0
    return collection.parent / "lenses" / "tiny"


@pytest.fixture(scope="module")
def both_folder(collection, lens_folder):
    """A folder with that lens, and the Jacobian lens of the same collection; few gradients."""
    folder = shutil.copytree(lens_folder, collection.parent / "lenses" / "both")
    words = ["--captures", str(collection), "--held_out", "0.3", "--kind", "jacobian", "--gradients", "1"]
    assert train_lens([*words, "--patch", "1,2", "--name", "both", "--output_dir", str(folder.parent)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(collection):
    """A run of two steps, with all pictures of the x0 lens."""
    output = collection.parent / "output"
    assert (
        capture([*QUICK, "--seed", "3", "--prompt", "a red circle", "--lens", "x0", "--output_dir", str(output)]) == 0
    )
    return next(output.iterdir())


def read(folder, *words):
    return lens(["--generation_id", folder.name, "--output_dir", str(folder.parent), *words])


def refused(capsys, code):
    """The error of a command that must fail with it and a hint."""
    captured = capsys.readouterr()
    assert code == 2
    error, hint = captured.err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error.removeprefix("error: ")


def test_held_out_velocities_are_better_than_the_plain_lens_s_at_every_block_but_the_last(lens_folder):
    found = json.loads((lens_folder / "evaluation.json").read_text())
    for site, tuned in found["tuned"].items():
        plain = found["plain"][site]
        if site == str(LAST):
            assert plain == tuned == [0, 0]
        else:
            assert all(t < p for t, p in zip(tuned, plain, strict=True)), site
            assert [found["transfer"][site][step][step] for step in (0, 1)] == tuned
    assert all(abs(value - 1) < 0.2 for value in found["mean velocity"])
    assert found["settings"]["generations"] == {"fit": 17, "choose": 4, "held_out": 9}
    assert (lens_folder / "errors.png").exists()
    assert (lens_folder / "transfer.png").exists()


def test_the_last_block_is_handed_through_and_the_others_are_mapped(lens_folder):
    tuned, tokens = load_tuned_lens(lens_folder), torch.randn(1, 4, 192)
    assert tuned.mapped(LAST, 0, tokens) is tokens
    assert tuned.mapped(Site.parse("single.7"), 1, tokens) is tokens
    found = tuned.maps[Site.parse("double.1.img"), 1]
    assert isinstance(found, AffineMap)
    assert torch.equal(tuned.mapped(Site.parse("double.1.img"), 1, tokens), found.applied_to(tokens))


def test_a_run_is_read_through_it_and_ends_at_the_plain_lens_s_picture(lens_folder, run):
    assert read(run, "--lens", "tuned", "--fitted_lens", str(lens_folder)) == 0
    made = run / "intermediates"
    names = sorted(path.relative_to(made / "decoded_x0") for path in (made / "decoded_x0").rglob("*.jpg"))
    assert names == sorted(path.relative_to(made / "decoded_tuned") for path in (made / "decoded_tuned").rglob("*.jpg"))
    for name in names:
        same = (made / "decoded_x0" / name).read_bytes() == (made / "decoded_tuned" / name).read_bytes()
        assert same == (name.name == "single_block_7.jpg"), name
    rows = json.loads((made / "lens.json").read_text())["sites"]
    assert rows["single.7"][1]["tuned_relative_distance"] == rows["single.7"][1]["relative_distance"] == 0
    assert rows["double.0.img"][0]["tuned_relative_distance"] < rows["double.0.img"][0]["relative_distance"]
    assert {"psnr_x0_db", "psnr_tuned_db"} <= rows["double.0.img"][0].keys()
    assert (run / "contact_sheet_tuned.jpg").exists()


def test_capture_reads_through_it_too(lens_folder, tmp_path):
    words = ["--seed", "1", "--prompt", "a blue square", "--lens", "tuned", "--fitted_lens", str(lens_folder)]
    assert capture([*QUICK, *words, "--output_dir", str(tmp_path)]) == 0
    (made,) = tmp_path.iterdir()
    assert (made / "contact_sheet_tuned.jpg").exists()


def test_a_jacobian_lens_is_judged_beside_the_tuned_one_of_its_folder(lens_folder, both_folder):
    alone, both = (json.loads((folder / "evaluation.json").read_text()) for folder in (lens_folder, both_folder))
    assert {key: value for key, value in both.items() if key in alone} == alone
    assert both["gradients"] == 1
    for name in ("jacobian", "jacobian_summed"):
        assert both[name].keys() == alone["plain"].keys()
    # At the last block no token sees another one: both versions are the same, and not the last layer itself.
    assert both["jacobian"][str(LAST)] == pytest.approx(both["jacobian_summed"][str(LAST)], rel=1e-3)
    assert all(0 < error < 1 for error in both["jacobian"][str(LAST)])
    assert both["jacobian_standard_error"]["same"][str(LAST)] == [None, None]  # of one generation
    for chart in ("errors.png", "curves.png", "receptive_fields.png"):
        assert (both_folder / chart).exists()
    with safe_open(both_folder / "receptive_fields.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"row": "1", "column": "2"}
        field = opened.get_tensor(f"{LAST}/step_0")
        assert field.shape == (4, 4)
        assert field.nonzero().tolist() == [[1, 2]]
        assert opened.get_tensor("double.0.img/step_1").all()


@pytest.mark.parametrize("name", ["jacobian", "jacobian_summed"])
def test_a_run_is_read_through_a_jacobian_lens(both_folder, run, name):
    assert read(run, "--lens", name, "--fitted_lens", str(both_folder)) == 0
    rows = json.loads((run / "intermediates" / "lens.json").read_text())["sites"]
    for site in ("double.0.img", "single.7"):
        assert 0 < rows[site][0][f"{name}_relative_distance"] < 1.5
        assert rows[site][0][f"psnr_{name}_db"] > 0
    assert (run / f"contact_sheet_{name}.jpg").exists()
    assert len(list((run / "intermediates" / f"decoded_{name}").rglob("*.jpg"))) == 24


def test_lenses_of_two_collections_do_not_share_a_folder(collection, lens_folder, capsys):
    words = ["--captures", str(collection), "--held_out", "0.2", "--kind", "jacobian", "--name", "tiny"]
    capsys.readouterr()
    assert "holds a tuned lens of another held_out: 0.3, here 0.2" in refused(
        capsys, train_lens([*words, "--output_dir", str(lens_folder.parent)])
    )


def test_what_a_jacobian_lens_cannot_be_made_of_is_refused(collection, tmp_path, capsys):
    words = ["--captures", str(collection), "--kind", "jacobian", "--output_dir", str(tmp_path)]
    capsys.readouterr()
    error = refused(capsys, train_lens([*words, "--patch", "4,0"]))
    assert error == "--patch must be a row below 4 and a column below 4: got 4,0"
    assert "--patch is a row and a column: got (1, 2, 3)" in refused(capsys, train_lens([*words, "--patch", "1,2,3"]))
    assert not list(tmp_path.iterdir())


def test_a_run_with_other_steps_is_refused(lens_folder, captured_run, tmp_path, capsys):
    folder = shutil.copytree(captured_run.folder, tmp_path / captured_run.folder.name)
    capsys.readouterr()
    error = refused(capsys, read(folder, "--lens", "tuned", "--fitted_lens", str(lens_folder)))
    assert "of the run is at t" in error
    assert not (folder / "intermediates" / "decoded_tuned").exists()


def test_a_lens_of_other_weights_or_without_a_site_is_refused(lens_folder, run, tmp_path, capsys):
    for change, word in (
        ("weights", "was fitted to flux-tiny (weights 0000"),
        ("site", "was not fitted at double.1.img"),
    ):
        file = changed(lens_folder / "tuned.safetensors", tmp_path / f"{change}.safetensors", change)
        capsys.readouterr()
        assert word in refused(capsys, read(run, "--lens", "tuned", "--fitted_lens", str(file)))


@pytest.mark.parametrize("change", ["weights", "site", "width", "part"])
def test_a_jacobian_lens_that_does_not_fit_is_refused(both_folder, run, tmp_path, capsys, change):
    file = changed(both_folder / "jacobian.safetensors", tmp_path / "jacobian.safetensors", change)
    capsys.readouterr()
    assert {
        "weights": "the Jacobian lens was fitted to flux-tiny (weights 0000",
        "site": "the Jacobian lens was not fitted at double.1.img",
        "width": "the Jacobian lens reads tokens of 191 channels: those of flux-tiny have 192",
        "part": f"{file} is no jacobian lens: KeyError('double.0.img/step_0')",
    }[change] in refused(capsys, read(run, "--lens", "jacobian", "--fitted_lens", str(file)))


def changed(file, to, change):
    """A lens file with a digest of other weights, without the maps of a block, narrower, or with a part missing."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    if change == "weights":
        metadata["settings"] = json.dumps({**json.loads(metadata["settings"]), "weights": "0000"})
    elif change == "site":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("double.1.img")}
    elif change == "width":
        tensors = {key: value[..., :191].clone() if value.shape[-1] == 192 else value for key, value in tensors.items()}
    else:
        del tensors["double.0.img/step_0/summed"]
    save_file(tensors, to, metadata=metadata)
    return to


def test_words_and_files_that_do_not_go_together_are_refused(lens_folder, run, tmp_path, capsys):
    capsys.readouterr()
    assert "got --lens tuned without it" in refused(capsys, read(run, "--lens", "tuned"))
    assert "got --fitted_lens with --lens x0" in refused(
        capsys, read(run, "--lens", "x0", "--fitted_lens", str(lens_folder))
    )
    missing = str(tmp_path / "nothing")
    assert "there is no tuned lens at" in refused(capsys, read(run, "--lens", "tuned", "--fitted_lens", missing))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    other = str(tmp_path / "other.safetensors")
    assert "is no tuned lens" in refused(capsys, read(run, "--lens", "tuned", "--fitted_lens", other))


def test_a_lens_is_fitted_only_to_a_collection_with_the_last_block_of_these_weights(collection, run, tmp_path, capsys):
    capsys.readouterr()
    assert "is something else" in refused(capsys, train_lens(["--captures", str(run)]))
    words = ["--prompts", str(collection.parent / "prompts.txt"), "--sites", "double.1.img", "--max_prompts", "3"]
    assert collect([*QUICK, *words, "--output_dir", str(tmp_path / "first")]) == 0
    capsys.readouterr()
    assert "does not hold single.7.img" in refused(capsys, train_lens(["--captures", str(tmp_path / "first")]))
    described = json.loads((tmp_path / "first" / "collection.json").read_text())
    described["settings"]["weights"] = "0" * 16
    (tmp_path / "first" / "collection.json").write_text(json.dumps(described))
    assert "collected with other weights" in refused(capsys, train_lens(["--captures", str(tmp_path / "first")]))
