"""`flux_ir.train_sae` from Python: rows on the way, folders at the end, and stopping at any row."""

import pytest

import flux_ir
from flux_ir.api.progress import Note
from flux_ir.errors import FluxIRError
from flux_ir.sae.kernels.choose import using

SMALL = {"expansion": 4, "k": 4, "batch_tokens": 64, "device": "cpu"}


def test_rows_come_on_the_way_and_the_last_has_what_was_trained(array, tmp_path, capsys):
    rows = list(flux_ir.train_sae(array, **SMALL, max_tokens=3200, seed=[0, 1], output_dir=tmp_path))
    assert capsys.readouterr() == ("", "")
    assert [row.tokens for row in rows] == sorted(row.tokens for row in rows)
    assert rows[1].numbers.keys() == {"array_topk_k4_x4_s0", "array_topk_k4_x4_s1"}
    assert {"loss", "fvu", "l0", "learning_rate"} <= rows[1].numbers["array_topk_k4_x4_s0"].keys()
    assert rows[-1].tokens == rows[-1].total_tokens == 3200
    assert [one.folder.name for one in rows[-1].finished] == ["array_topk_k4_x4_s0", "array_topk_k4_x4_s1"]
    assert 0 < rows[-1].finished[0].overall["fvu"] < 1
    assert rows[-1].finished[0].measured_on == "held-out tokens"
    (again,) = flux_ir.train_sae(array, **SMALL, max_tokens=3200, seed=[0, 1], output_dir=tmp_path)
    assert again.finished == rows[-1].finished


def test_a_training_of_which_no_more_rows_are_asked_for_goes_on_there_to_the_same_bytes(array, tmp_path):
    whole = list(flux_ir.train_sae(array, **SMALL, max_tokens=3200, output_dir=tmp_path / "whole"))
    rows = flux_ir.train_sae(array, **SMALL, max_tokens=3200, output_dir=tmp_path / "parts")
    for row in rows:
        if row.tokens >= 640:
            break
    rows.close()
    rest = list(flux_ir.train_sae(array, **SMALL, max_tokens=3200, output_dir=tmp_path / "parts"))
    assert rest[0].tokens == 640
    one, other = whole[-1].finished[0].folder, rest[-1].finished[0].folder
    assert (one / "sae_weights.safetensors").read_bytes() == (other / "sae_weights.safetensors").read_bytes()


def test_it_stops_between_two_steps_when_asked(array, tmp_path):
    steps = iter(range(100))
    rows = list(flux_ir.train_sae(array, **SMALL, max_tokens=3200, output_dir=tmp_path, stop=lambda: next(steps) >= 3))
    assert rows[-1].stopped
    assert rows[-1].tokens == 4 * 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "there must be data to train on"),
        ({"captures": "a", "model": "flux-tiny"}, "got both"),
        ({"captures": "a", "arch": "l1", "k": 4}, "l1 is not given its k"),
        ({"captures": "a", "lr": 0.0}, "--lr must be above 0"),
    ],
)
def test_contradictions_are_told_at_once_not_at_the_first_row(arguments, says):
    with pytest.raises(FluxIRError, match=says):
        flux_ir.train_sae(**arguments)


@pytest.mark.parametrize(("path", "says"), [("cpu", "products in bfloat16"), ("reference", "products in float32: ")])
def test_the_precision_that_is_told_is_that_of_the_kernels(path, says, array, tmp_path):
    told = []
    with using(path):
        rows = flux_ir.train_sae(
            array, **SMALL, dtype="bfloat16", max_tokens=640, output_dir=tmp_path, progress=told.append
        )
        next(rows)
        rows.close()
    assert any(says in event.text for event in told if isinstance(event, Note))


def test_nested_dictionaries_are_those_asked_for_and_the_whole_one(array, tmp_path):
    words = {**SMALL, "arch": "matryoshka", "prefixes": [3, 9], "max_tokens": 640, "output_dir": tmp_path}
    (trained,) = list(flux_ir.train_sae(array, **words))[-1].finished
    assert flux_ir.load_sae(trained.folder).config.nested_sizes == (3, 9, trained.d_sae)
