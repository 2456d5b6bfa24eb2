"""Features as other programs read them: the same numbers as the table, and rows that Neuronpedia's schema allows."""

import csv
import gzip
import json
import sys

import numpy as np
import pytest

import flux_ir
from flux_ir.commands.export_features import main as export_features
from flux_ir.errors import FluxIRError
from tests.features.conftest import save_small_sae

SITE = "single.6.update"
PROMPTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Three pictures of flux-tiny, an untrained autoencoder of both streams, its scores and examples."""
    folder = tmp_path_factory.mktemp("exported")
    flux_ir.collect(PROMPTS, SITE, folder / "captures", model="flux-tiny", num_steps=2, steps=[0, 1], save_images=True)
    save_small_sae(folder / "saes" / "tiny", SITE, d=192, steps=(0, 1), model="flux-tiny")
    scored = flux_ir.score_features(folder / "saes" / "tiny", folder / "captures", output_dir=folder / "features")
    return flux_ir.find_examples(scored, top=2, quantiles=2, per_quantile=1)


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_csv_and_parquet_hold_the_table(scored, tmp_path):
    from pyarrow import parquet

    written = flux_ir.export_features(scored, format=["csv", "parquet"], output_dir=tmp_path)
    assert {path.name for path in written.values()} == {"img.csv", "txt.csv", "img.parquet", "txt.parquet"}
    for stream in ("img", "txt"):
        table, frame = scored.table(stream), parquet.read_table(tmp_path / f"{stream}.parquet")
        with (tmp_path / f"{stream}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["feature"] for row in rows] == [str(number) for number in range(48)]
        for name in ("frequency", "max_active", "entropy", "centre_y"):
            expected = getattr(table, name)
            found = np.array([float(row[name] or "nan") for row in rows], expected.dtype)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(frame[name].to_numpy(), expected)
        assert [row["density"] for row in rows] == table.density.tolist()
        assert [row["alive"] for row in rows] == ["true" if alive else "false" for alive in table.alive]
        assert [float(row["step_mean_1"]) for row in rows] == table.step_mean[:, 1].tolist()


def test_neuronpedia_gets_tokens_with_values_and_patches_by_their_places(scored, tmp_path, capsys):
    words = ["--features", str(scored.path), "--format", "neuronpedia", "--output_dir"]
    assert export_features([*words, str(tmp_path / "once")]) == 0
    assert export_features([*words, str(tmp_path / "twice")]) == 0
    once, twice = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "once", tmp_path / "twice")
    )
    assert once == twice
    for stream in ("img", "txt"):
        root = tmp_path / "once" / "neuronpedia" / "flux-tiny" / f"6-single-{stream}-update"
        assert json.loads((root / "source.jsonl").read_text())["id"] == root.name
        assert {path.name for path in root.glob("*.jsonl")} == {
            "model.jsonl",
            "release.jsonl",
            "source.jsonl",
            "sourceset.jsonl",
        }
        table, features = scored.table(stream), lines_of(root / "features" / "batch-0.jsonl.gz")
        assert [row["index"] for row in features] == [str(number) for number in range(48)]
        for row, largest, counts in zip(features, table.max_active, table.histogram, strict=True):
            assert row["maxActApprox"] == pytest.approx(largest, abs=1e-5)
            assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])
            assert sum(row["freq_hist_data_bar_heights"]) == counts.sum()
        activations = lines_of(root / "activations" / "batch-0.jsonl.gz")
        assert len({row["id"] for row in activations}) == len(activations)
        for row in activations:
            assert len(row["tokens"]) == len(row["values"])
            assert max(row["values"]) == row["values"][row["maxValueTokenIndex"]] == row["maxValue"] > 0
            image, feature = int(row["dataIndex"]), int(row["index"])
            maps = scored.map(feature, image, stream)
            if stream == "img":
                place = row["tokens"][row["maxValueTokenIndex"]]
                largest = maps[:, int(place[1:3]), int(place[4:6])].max()
                assert (scored.path.parents[1] / "captures" / row["dataSource"]).is_file()
            else:
                largest = np.nanmax(maps)
                assert row["tokens"][-1] == "</s>"
                assert row["tokens"][:-1] == PROMPTS[image].split()
            assert row["maxValue"] == pytest.approx(largest, abs=1e-5)
        assert {row["binContains"] is None for row in activations} == {True, False}


def test_what_a_format_needs_is_said(scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        FluxIRError, match=r"parquet needs pyarrow \(hint: pip install 'flux-ir\[analysis\]', or use csv"
    ):
        flux_ir.export_features(scored, format="parquet", output_dir=tmp_path)
    assert not list(tmp_path.iterdir())
