"""Lists of features, examples that none share, and the file of columns: what is kept, what is made again."""

import numpy as np

from flux_ir.features.folder import open_features, read_tensors
from flux_ir.features.selection import (
    FILE,
    GROUPS,
    Ranked,
    Selection,
    distinct,
    make_lists,
    ranked,
    read_lists,
    write_lists,
)

NAN = np.nan


def test_a_list_begins_with_the_largest_and_leaves_out_what_is_not_known():
    values = np.array([0.5, NAN, 2.0, 0.5, -1.0, 3.0])
    found = ranked("a list", "column", values, 4)
    assert found.features == [5, 2, 0, 3]
    assert found.values == [3.0, 2.0, 0.5, 0.5]
    assert found.q is None
    assert ranked("a list", "column", values, 99).features == [5, 2, 0, 3, 4]
    assert ranked("a list", "column", values, 99, chosen=values < 1).features == [0, 3, 4]


def test_a_tested_list_has_what_is_more_than_chance():
    values, q = np.array([1.0, 5.0, 3.0, 4.0]), np.array([0.01, NAN, 0.05, 0.06])
    found = ranked("a list", "column", values, 9, q=q, significance=0.05)
    assert found.features == [2, 0]
    assert found.q == [0.05, 0.01]
    untested = ranked("a list", "column", values, 9, q=np.full(4, NAN), significance=0.05)
    assert untested.features == [1, 3, 2, 0]
    assert untested.q is None


def test_no_image_is_an_example_of_two_features():
    top = np.array([[1, 2, 3], [3, 2, 4], [4, 5, -1], [6, 1, 7], [-1, -1, -1]])
    features, images = distinct([1, 0, 3, 4, 2], top, each=2, most=9)
    assert features == [1, 3, 2]  # 1 takes 3 and 2, which leaves 0 only one of its own
    assert images == [[3, 2], [6, 1], [4, 5]]
    assert distinct([0, 1, 2, 3, 4], top, each=1, most=2) == ([0, 1], [[1], [3]])


def test_columns_are_written_whole_and_groups_stay_until_they_are_made_again(small, tmp_path):
    folder = _copy(small, tmp_path)
    selection = Selection(folder)
    selection.put("steps", {}, {"img": {"step_variance": np.arange(48.0)}})
    arrays, said = read_tensors(folder.path / FILE)
    assert sorted(arrays) == sorted(f"img/{name}" for names in GROUPS.values() for name in names)
    assert said["groups"] == {"steps": {}}
    assert (arrays["img/stability_feature"] == -1).all()
    assert np.isnan(arrays["img/coherence"]).all()
    again = Selection(folder)
    assert again.has("steps", {})
    assert not again.has("steps", {"other": 1})
    assert not again.has("region", {"region": [0, 0, 1, 1]})
    assert again.column("img", "step_variance").tolist() == list(range(48))
    again.put("region", {"region": (0, 0, 0.5, 1)}, {"img": {"region": np.ones(48)}})
    assert Selection(folder).has("region", {"region": [0, 0, 0.5, 1]})  # as JSON has it
    assert Selection(folder).has("steps", {})


def test_columns_of_other_scores_count_for_nothing(small, tmp_path):
    folder = _copy(small, tmp_path)
    Selection(folder).put("steps", {}, {"img": {"step_variance": np.arange(48.0)}})
    described = (folder.path / "features.json").read_text().replace(folder.settings.captures, "0" * 16)
    (folder.path / "features.json").write_text(described)
    other = Selection(open_features(folder.path))
    assert not other.has("steps", {})
    assert np.isnan(other.column("img", "step_variance")).all()


def test_lists_follow_from_the_columns_and_are_read_as_they_were_written(small, tmp_path):
    folder = _copy(small, tmp_path)
    selection = Selection(folder)
    score, difference = np.arange(48.0), np.where(np.arange(48) % 2, 1.0, -1.0)
    q = np.where(np.arange(48) < 40, 0.01, 0.2)
    columns = {"contrast": score, "contrast_difference": difference, "contrast_p": q, "contrast_q": q}
    selection.put("contrast", {"name": "red against the rest"}, {"img": columns})
    lists = make_lists(selection, "img", most=3, significance=0.05, each=2)
    assert [one.name for one in lists] == ["red against the rest", "the rest against red"]
    assert [one.features for one in lists] == [[39, 37, 35], [38, 36, 34]]
    lists.append(Ranked("distinct", "share", [4, 7], [0.5, 0.25], None, [[1, 2], [3, 4]]))
    write_lists(folder.path, {"img": lists}, {"most": 3})
    assert read_lists(folder, "img") == lists
    assert read_lists(folder, "txt") == []


def test_features_that_are_dead_here_are_in_no_list(small, tmp_path):
    folder = _copy(small, tmp_path)
    selection, dead = Selection(folder), np.flatnonzero(~folder.table("img").alive).tolist()
    assert 3 in dead
    effect = {name: np.where(np.arange(48) == 3, 9.0, 1.0) for name in ("effect", "effect_active")}
    selection.put("effect", {}, {"img": effect})
    selection.put("steps", {}, {"img": {"step_variance": np.zeros(48)}})
    lists = {one.name: one for one in make_lists(selection, "img", most=48, significance=0.05, each=2)}
    for name in ("of most effect", "changing over steps"):
        assert sorted([*lists[name].features, *dead]) == list(range(48))


def test_without_a_selection_there_are_no_lists(small):
    assert read_lists(open_features(small / "features" / "img"), "img") == []


def _copy(small, tmp_path):
    """A folder of features to write into: its description and its table."""
    target = tmp_path / "features"
    target.mkdir()
    for name in ("features.json", "table.safetensors"):
        (target / name).write_bytes((small / "features" / "img" / name).read_bytes())
    return open_features(target)
