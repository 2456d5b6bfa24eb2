"""`transfer` on flux-tiny: what it writes, that it goes on where it was stopped, and what may be wrong."""

import json

import pytest

from flux_ir import FluxIRError, transfer
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae

PROMPT = "a large red circle on the left on a white background"
EDITED = "a large blue circle on the left on a white background"
FAST = {"model": "flux-tiny", "num_steps": 2, "seeds": 1, "dtype": "float32", "k": (2, 60), "strength": (0, 1)}


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    made = make_sae(SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny"))
    return save_sae(made, tmp_path_factory.mktemp("saes") / "random")


@pytest.fixture(scope="module")
def transferred(sae, tmp_path_factory):
    """A whole transfer. Read it only."""
    return transfer(
        PROMPT, EDITED, sae=sae, region=(0, 0, 64, 128), output_dir=tmp_path_factory.mktemp("transfers"), **FAST
    )


def test_every_method_has_its_rows_and_strength_zero_is_the_original(transferred):
    assert {row.method for row in transferred.table} == {
        *("original", "edited", "features", "activations", "neurons", "mean", "random")
    }
    for row in transferred.table:
        zero = row.strength == 0 and row.method != "edited"
        assert row.identical == (row.pictures if zero else 0), row
    assert transferred.table[0].distance.mean == 1
    assert transferred.table[1].distance.mean == 0
    whole = next(row for row in transferred.table if row.method == "activations" and row.strength == 1)
    assert whole.distance.mean < 1
    assert len(transferred.areas) == 5
    assert [path.is_file() for path in (transferred.curve, transferred.pictures, transferred.csv)] == [True] * 3
    assert len(transferred.csv.read_text().splitlines()) == len(transferred.table) + 1
    assert any("k 60 is more features than differ" in note for note in transferred.notes)
    assert len(json.loads(transferred.numbers.read_text())["pictures"]) == 2 + 3 * 4 + 2 * 2


def test_a_stopped_transfer_goes_on_to_the_same_bytes(sae, transferred, tmp_path):
    words = {"sae": sae, "region": (0, 0, 64, 128), "output_dir": tmp_path, **FAST}

    def stop(event):
        if getattr(event, "stage", None) == "pictures" and event.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(PROMPT, EDITED, **words, progress=stop)
    done = transfer(PROMPT, EDITED, **words)
    for path in sorted(transferred.folder.rglob("*")):
        if path.is_file():
            assert (done.folder / path.relative_to(transferred.folder)).read_bytes() == path.read_bytes(), path.name


WRONG = [
    ({"k": 0}, "--k must be at least 1"),
    ({"strength": -1}, "--strength must be finite and at least 0"),
    ({"strength": ()}, "at least one strength"),
    ({"region": (0, 0, 200, 16)}, "a rectangle lies within the picture"),
    ({"region": (0, 0, 16)}, "a region is left, top, right, bottom"),
    ({"steps": (2,)}, "--steps counts from 0 to 1"),
    ({"model": "flux-dev"}, "was trained on flux-tiny"),
    ({"edited_prompt": PROMPT}, "must differ"),
    ({"edited_prompt": None}, "got no --edited_prompt"),
    ({"pairs": "pairs.jsonl"}, "--pairs says everything"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_told_before_anything_is_written(sae, tmp_path, changes, message):
    words = {"edited_prompt": EDITED, "sae": sae, "output_dir": tmp_path / "out", **FAST} | changes
    with pytest.raises(FluxIRError, match=message):
        transfer(PROMPT, **words)
    assert not (tmp_path / "out").exists()


def test_one_autoencoder_for_each_site_of_the_transformer(sae, tmp_path):
    text = make_sae(SAEConfig("topk", d_in=128, d_sae=64, k=8, site="t5.1", model="flux-tiny"))
    for given, message in (((sae, sae), "one autoencoder for each site"), (text, "computed once per prompt")):
        with pytest.raises(FluxIRError, match=message):
            transfer(PROMPT, EDITED, sae=given, output_dir=tmp_path, **FAST)


def test_the_judge_finds_the_region(sae, tmp_path):
    said = []
    words = FAST | {"num_steps": 8, "k": 1, "strength": 1, "controls": 0}
    transfer(PROMPT, EDITED, sae=sae, output_dir=tmp_path, progress=lambda event: said.append(str(event)), **words)
    assert any("the judge finds a large red circle or a large blue circle" in line for line in said)
