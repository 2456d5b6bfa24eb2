"""The page of maps without a browser: what its scripts hold of the files, and what is refused."""

import json
from base64 import b64decode

import numpy as np
import pytest

from flux_ir.errors import FluxIRError
from flux_ir.explorer import map_page
from flux_ir.explorer.map_page import write_map_page
from tests.explorer.map_folder import BLOCKS, COLUMNS, ROWS, STEPS, make_map_folder, value_of


def script(folder, name):
    """The value that a script hands over, with its maps as [steps, blocks, cells] in their own unit; NaN: none."""
    text = (folder / f"maps_files/{name}.js").read_text()
    value = json.loads(text[text.index(",") + 1 : text.rindex(")")])
    values = np.frombuffer(b64decode(value["values"]), np.uint8).reshape(len(STEPS) * len(BLOCKS), -1) / 255
    bounds = np.array([bound or [np.nan, np.nan] for bound in value["bounds"]])
    maps = bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * values
    return maps.reshape(len(STEPS), len(BLOCKS), -1)


def expected(word, rows=ROWS, columns=COLUMNS):
    return np.array([[value_of(b, s, word, rows, columns).flatten().numpy() for b in BLOCKS] for s in STEPS])


def test_scripts_hold_every_map_of_every_block_and_step(tmp_path):
    folder = make_map_folder(tmp_path / "maps")
    assert write_map_page(folder) == folder / "maps.html"
    np.testing.assert_allclose(script(folder, "word_1_to_words"), expected(1), atol=1e-3)
    np.testing.assert_allclose(script(folder, "word_1_value_to_words"), 100 * expected(1), atol=0.1)
    np.testing.assert_allclose(script(folder, "word_0_from_words"), expected(0) / 2, atol=1e-3)
    np.testing.assert_allclose(script(folder, "patch_0_from_patches"), expected(0), atol=1e-3)
    np.testing.assert_allclose(script(folder, "group_1_to_groups"), 0.3, atol=1e-6)
    concepts = script(folder, "concept_1_concepts")
    np.testing.assert_allclose(concepts[:, 0], 1 - expected(0)[:, 0], atol=1e-3)
    assert np.isnan(concepts[:, 1]).all()
    page = (folder / "maps.html").read_text()
    assert "registers" not in page[page.index("maps-data") : page.index("</script>")]  # nobody looks at any


def test_heads_that_were_kept_are_shown_as_their_mean(tmp_path):
    folder = make_map_folder(tmp_path / "maps", heads=3)
    write_map_page(folder)
    np.testing.assert_allclose(script(folder, "word_0_to_words"), 2 * expected(0), atol=2e-3)


def test_maps_of_too_many_tokens_are_pooled(tmp_path, monkeypatch):
    folder = make_map_folder(tmp_path / "maps", grid=(3, 5))
    monkeypatch.setattr(map_page, "MOST_BYTES", 40)
    write_map_page(folder)
    pooled = script(folder, "word_0_to_words")
    assert pooled.shape == (2, 2, 6)
    whole = expected(0, 3, 5).reshape(2, 2, 3, 5)
    np.testing.assert_allclose(pooled[..., 0], whole[..., :2, :2].mean(axis=(2, 3)), atol=1e-3)
    np.testing.assert_allclose(pooled[..., 5], whole[..., 2, 4], atol=1e-3)  # what is left of the last row and column


@pytest.mark.parametrize("missing", ["maps.json", "step_2.safetensors"])
def test_a_folder_that_is_not_finished_is_refused(tmp_path, missing):
    folder = make_map_folder(tmp_path / "maps")
    (folder / missing).unlink()
    with pytest.raises(FluxIRError, match="flux-ir maps"):
        write_map_page(folder)
    assert not (folder / "maps.html").exists()
