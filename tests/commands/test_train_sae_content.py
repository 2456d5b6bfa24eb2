"""What was trained on what is known by the activations themselves, whatever their files are called."""

import json

import numpy as np
import pytest

from flux_ir.commands.evaluate_sae import main as evaluate_sae

WORDS = ("--k", "4", "--max_tokens", "320", "--held_out", "0.3")


@pytest.fixture
def copies(array, tmp_path):
    """The array under its own name with other values, and under another name with its own."""
    values = np.load(array)
    for folder, name, content in (("other", array.name, values + 1), ("renamed", "final.npy", values)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / name, content)
    return tmp_path / "other" / array.name, tmp_path / "renamed" / "final.npy"


def test_other_values_under_the_same_name_are_not_trained_already(train, copies):
    assert train(*WORDS)[0] == 0
    assert "already trained" in train(*WORDS)[2]
    code, _, err, _ = train(*WORDS, captures=copies[0])
    assert code == 2
    assert "belongs to other settings: data.content was" in err
    assert "the activations are others than the first time" in err


def test_a_renamed_array_is_the_data_that_were_trained_on(train, array, copies):
    code, _, _, folder = train(*WORDS, "--name", "one")
    assert code == 0
    assert "already trained" in train(*WORDS, "--name", "one", captures=copies[1])[2]
    measured = []
    for file in (array, copies[1]):
        assert evaluate_sae(["--sae", str(folder), "--captures", str(file), "--device", "cpu"]) == 0
        (metrics,) = folder.glob("*/*/metrics.json")
        measured.append(json.loads(metrics.read_text())["overall"])
    assert measured[0] == measured[1]
