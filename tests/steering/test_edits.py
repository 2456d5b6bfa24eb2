"""Edits as plain data: what contradicts itself is refused in one line, and files hold them whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flux_ir.errors import FluxIRError
from flux_ir.sae.files.folder import save_sae
from flux_ir.steering.edits import POOLED, Edit, read_edits, save_edits
from flux_ir.steering.regions import Region

WRONG_FIELDS = [
    ({}, "an edit is of features, of a steering prompt or of a vector: got none"),
    ({"sae": "a"}, "got none"),
    ({"feature": 3}, "need the autoencoder they are of"),
    ({"sae": "a", "feature": 3, "vector": "v"}, "got feature and vector"),
    ({"vector": "v"}, "a vector is of no site by itself"),
    (
        {"sae": "a", "feature": 3, "kind": "ad"},
        "--kind must be one of add, scale, clamp, set, ablate, replace: got 'ad'",
    ),
    ({"sae": "a", "feature": 3, "unit": "maximum"}, "--unit must be one of max, mean, norm, raw: got 'maximum'"),
    ({"sae": "a", "feature": 3, "gate": "some"}, "--gate must be one of all, active"),
    ({"sae": "a", "feature": 3, "weights": "some"}, "--weights must be one of presence"),
    ({"sae": "a", "feature": 1.5}, "--feature must be whole numbers: got 1.5"),
    ({"sae": "a", "feature": True}, "--feature must be whole numbers: got True"),
    ({"sae": "a", "feature": 3, "strength": float("nan")}, "a strength is a finite number"),
    ({"sae": "a", "feature": 3, "strength": "much"}, "--strength must be numbers"),
    ({"sae": "a", "feature": (3, 4), "strength": (1, 2, 3)}, "got 2 features and 3 strengths"),
    ({"vector": "v", "sites": "single.1", "unit": "max"}, "a vector has no activations of its own"),
    (
        {"vector": "v", "sites": "single.1", "kind": "replace"},
        "a vector takes the kinds add, scale, clamp, set, ablate",
    ),
    ({"sae": "a", "prompt": "red", "kind": "scale"}, "a steering prompt takes the kinds add: got scale"),
    ({"sae": "a", "feature": 3, "kind": "clamp", "strength": -1}, "none is below 0"),
    ({"sae": "a", "feature": 3, "sites": POOLED}, "can be scaled, ablated or given a vector: got feature"),
    ({"sites": POOLED, "kind": "scale", "steps": (1,)}, "it has no region and no steps"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_FIELDS)
def test_what_contradicts_itself_is_refused(settings, message):
    with pytest.raises(FluxIRError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        Edit.from_json(settings)
    assert error.value.hint is not None
    assert "\n" not in str(error.value)


def test_a_file_of_edits_gives_back_the_edits(tmp_path):
    edits = (
        Edit(sae=tmp_path / "sae", feature=(3, 4), strength=(1.0, 2.0), unit="mean", gate=0.5, steps=(0, 1)),
        Edit(kind="ablate", sae=str(tmp_path / "sae"), feature=9, region=Region(rectangle=(0, 0, 16, 16))),
        Edit(vector=tmp_path / "v.safetensors", sites="double.*.img", schedule=(0, 1), weights="presence"),
        Edit(kind="scale", sites=POOLED, strength=0.0),
        Edit(sae=tmp_path / "sae", feature=1, region=Region(image=str(tmp_path / "mask.png"), above=0.2)),
    )
    save_edits(edits, tmp_path / "deep" / "edit.json")
    again = read_edits(tmp_path / "deep" / "edit.json")
    resolved = [[str(value).replace("deep/../", "") for value in vars(edit).values()] for edit in again]
    assert resolved == [[str(value) for value in vars(edit).values()] for edit in edits]
    stored = json.loads((tmp_path / "deep" / "edit.json").read_text())
    assert stored["edits"][1] == {
        "kind": "ablate",
        "sae": "../sae",
        "feature": [9],
        "region": {"rectangle": [0, 0, 16, 16]},
    }


def test_a_vector_in_memory_is_written_beside_the_file(tmp_path):
    vector = torch.randn(64)
    save_edits([Edit(vector=vector, sites="single.1")], tmp_path / "edit.json")
    (again,) = read_edits(tmp_path / "edit.json")
    from flux_ir.steering.directions import read_vector

    assert torch.equal(read_vector(again.vector), vector)


def test_an_autoencoder_in_memory_has_no_file(tiny_sae, tmp_path):
    with pytest.raises(FluxIRError, match="this one is in memory alone"):
        save_edits([Edit(sae=tiny_sae(), feature=3)], tmp_path / "edit.json")


WRONG_FILES = [
    ("{", "must be JSON"),
    ("[]", "must be a JSON object"),
    ('{"format": 1, "edits": []}', "with one edit at least"),
    ('{"format": 2, "edits": [{}]}', "must have the format 1: got 2"),
    ('{"format": 1, "edits": [{"kind": "add", "features": 3}]}', "an edit has no field 'features'"),
    ('{"format": 1, "edits": [{"sae": "a", "feature": 3, "region": {"box": 1}}]}', "a region has some of"),
    ('{"format": 1, "edits": [7]}', "an edit is an object with fields: got 7"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_a_file_that_holds_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "edit.json"
    path.write_text(text)
    with pytest.raises(FluxIRError, match=message):
        read_edits(path)


def test_what_the_model_cannot_do_is_told_before_it_runs(tiny_sae, steering, tmp_path):
    sae = tiny_sae()
    unmeasured = tiny_sae()
    unmeasured.max_active = None
    silent = tiny_sae()
    silent.max_active[3] = 0
    save_file({"a": torch.zeros(64), "b": torch.ones(64)}, tmp_path / "two.safetensors")
    two = tmp_path / "two.safetensors"
    wrong = [
        (Edit(sae=sae, feature=20), "this autoencoder has the features 0 to 19: got 20"),
        (Edit(sae=tiny_sae(model="flux-dev"), feature=3), "was trained on flux-dev"),
        (Edit(sae=tiny_sae(d_in=32), feature=3), "tokens of double.1.img of flux-tiny are 64 wide"),
        (Edit(sae=tiny_sae(site="double.9.img"), feature=3), "no site of this model matches 'double.9.img'"),
        (
            Edit(sae=sae, feature=3, sites="single.1"),
            "this autoencoder was trained on double.1.img: got --sites single.1",
        ),
        (Edit(kind="scale", sae=sae, feature=3, sites="single.1", weights=1), "only add can be done at a site"),
        (Edit(sae=sae, feature=3, sites="double.*.img", weights=(1, 2, 3)), "got 3 for 2 sites"),
        (Edit(sae=sae, feature=3, schedule=(1, 2)), "a schedule has one entry for each of the 1 steps: got 2"),
        (Edit(sae=sae, feature=3, region=Region(rectangle=(0, 0, 64, 64))), "a rectangle lies within the picture"),
        (
            Edit(sae=sae, feature=3, region=Region(tokens=(12,))),
            "the picture has 12 tokens, from 0 to 11: got token 12",
        ),
        (Edit(vector=torch.zeros(64), sites="single.1"), "a vector has a direction"),
        (Edit(vector=torch.ones(2, 3, 64), sites="single.1"), "a vector is finite numbers"),
        (Edit(vector=torch.full((64,), torch.nan), sites="single.1"), "not all finite"),
        (Edit(vector=two, sites="single.1"), "must hold one vector, or be asked for one: it holds a, b"),
        (Edit(vector=f"{two}:c", sites="single.1"), "holds no 'c'"),
        (Edit(vector=tmp_path / "none.safetensors", sites="single.1"), "cannot read the vector"),
        (Edit(sae=tmp_path, feature=3), "cfg.json"),
        (Edit(sae=unmeasured, feature=3), "does not say how strongly its features are active"),
        (Edit(sae=silent, feature=3), "feature 3 was never active in training"),
    ]
    for edit, message in wrong:
        with pytest.raises(FluxIRError, match=message.replace("(", r"\(")) as error:
            steering(edit)
        assert "\n" not in str(error.value)


def test_an_autoencoder_is_read_once_for_all_strengths(tiny_sae, steering, tmp_path, monkeypatch):
    save_sae(tiny_sae(), tmp_path / "sae")
    ready = steering(Edit(sae=tmp_path / "sae", feature=3))
    monkeypatch.setattr("flux_ir.steering.apply.load_sae", None)
    assert [ready.at(strength).edits[0].strength for strength in (0.0, 2.0)] == [0.0, 2.0]
