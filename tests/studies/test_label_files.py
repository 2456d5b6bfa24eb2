"""Labels from files: which pictures they are for, what they ask, masks on any grid; wrong files are one line each."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.studies.label_files import read_label_file
from flux_ir.studies.labels import IN_ALL, POSITIVE, Question, Task
from tests.studies.drawn import drawn


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("drawn"), 6, 0)


def write(path, text):
    path.write_text(text)
    return path


def test_a_table_asks_for_every_word_and_keeps_numbers(source, tmp_path):
    ids = [one.id for one in source.generations]
    rows = ["id,animal,indoors,depth"]
    rows += [f"{ids[0]},cat,yes,0.5", f"{ids[1]},dog,no,1.5", f"{ids[2]},,0,2", f"{ids[4]},cat,1,", "other,cow,1,7"]
    labels = read_label_file(write(tmp_path / "labels.csv", "\n".join(rows))).labels(source)
    assert labels.images.tolist() == [0, 1, 2, 4]
    assert labels.prompts == tuple(source.generations[i].prompt for i in (0, 1, 2, 4))
    assert labels.dropped == {"no label": 2}
    asked = [tuple(question) for question in labels.questions]
    assert asked == [("animal", word, "image") for word in ("cat", "cow", "dog")] + [("indoors", "indoors", "image")]
    yes = POSITIVE | IN_ALL
    assert labels.of(Question("animal", "cat", "image")).tolist() == [yes, IN_ALL, 0, yes]
    assert labels.of(Question("indoors", "indoors", "image")).tolist() == [yes, IN_ALL, IN_ALL, yes]
    np.testing.assert_array_equal(labels.numbers["depth"], [0.5, 1.5, 2, np.nan])
    assert [one.negatives for one in labels.tasks()] == ["all"] * len(labels.tasks())


def test_pictures_without_prompts_are_draws_of_their_own(tmp_path):
    source = drawn(tmp_path, 4, 3)
    source.generations = [replace(generation, prompt="") for generation in source.generations]
    rows = ["id,animal", *(f"{one.id},{animal}" for one, animal in zip(source.generations, "abab", strict=True))]
    labels = read_label_file(write(tmp_path / "labels.csv", "\n".join(rows))).labels(source)
    assert labels.groups.tolist() == [0, 1, 2, 3]


def test_rows_may_be_json_and_known_by_their_prompts(source, tmp_path):
    rows = [
        {"prompt": one.prompt, "left": number % 2 == 0, "note": None} for number, one in enumerate(source.generations)
    ]
    labels = read_label_file(write(tmp_path / "labels.jsonl", "\n".join(map(json.dumps, rows)))).labels(source)
    assert labels.images.tolist() == list(range(6))
    positive, counted = labels.split(Task(Question("left", "left", "image"), "all"))
    assert positive.tolist() == [True, False] * 3
    assert counted.all()


def test_masks_cover_patches_as_far_as_they_go(source, tmp_path):
    """One of the picture's size, one much smaller, and a picture that has a mask of another concept only."""
    ids = [one.id for one in source.generations]
    for concept in ("cat", "dog"):
        (tmp_path / "animal" / concept).mkdir(parents=True)
    whole = np.zeros((128, 128), np.uint8)
    whole[:32, :40] = 255  # rows 0 and 1: two patches and a half
    Image.fromarray(whole).save(tmp_path / "animal" / "cat" / f"{ids[0]}.png")
    small = np.zeros((8, 8), np.uint8)
    small[7, 7] = 255
    Image.fromarray(small).save(tmp_path / "animal" / "dog" / f"{ids[1]}.png")
    file = read_label_file(tmp_path)
    labels = file.labels(source)
    assert labels.images.tolist() == [0, 1]
    assert labels.dropped == {"no mask": 4}
    positive, counted = labels.split(Task(Question("animal", "cat", "any"), "all"))
    expected = np.zeros((2, 8, 8), bool)
    expected[0, :2, :2] = True
    between = np.zeros((2, 8, 8), bool)
    between[0, :2, 2] = True
    np.testing.assert_array_equal(positive.reshape(2, 8, 8), expected)
    np.testing.assert_array_equal(counted.reshape(2, 8, 8), ~between)
    positive, counted = labels.split(Task(Question("animal", "cat", "interior"), "hard"))
    np.testing.assert_array_equal(positive.reshape(2, 8, 8), expected)
    expected[1, 7, 7] = True  # the other animal
    np.testing.assert_array_equal(counted.reshape(2, 8, 8), expected)
    positive, counted = labels.split(Task(Question("animal", "dog", "image"), "all"))
    assert (positive.tolist(), counted.tolist()) == ([False, True], [True, True])
    assert file.digest == read_label_file(tmp_path).digest
    Image.fromarray(whole).save(tmp_path / "animal" / "dog" / f"{ids[0]}.png")
    assert file.digest != read_label_file(tmp_path).digest


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("labels.txt", "id,a\n1,2", r"labels are a table, .csv or .jsonl, or a folder of masks: got .*labels.txt"),
        ("a.csv", "name,animal\nx,cat", "labels need a column id or prompt: .* has name, animal"),
        ("a.csv", "id,prompt\nx,cat", "labels need columns beside id and prompt"),
        ("a.csv", "", "labels need a column id or prompt: .* has nothing"),
        ("a.csv", "id,animal\nx,cat\nx,dog", "every id stands in one row: .* has 'x' twice"),
        ("a.csv", "id,animal\nx,cat,3\ny,dog", "line 2 must have as many cells as its head"),
        ("a.csv", "id,animal\nx,cat\ny", "line 3 must have as many cells as its head"),
        ("a.csv", "id,animal\nx,cat\ny,cat", "a label must differ between pictures: no column of .* has two values"),
        ("a.csv", "id,depth\nx,1\ny,2\nz,inf", "labels must be finite: column depth of .* has inf"),
        ("a.jsonl", '{"id": "x", "a": 1}\n{"id"', "line 2 must be JSON"),
        ("a.jsonl", "[1, 2]", "line 1 must be a JSON object"),
    ],
)
def test_wrong_tables_are_one_line_each(tmp_path, name, text, says):
    with pytest.raises(FluxIRError, match=says):
        read_label_file(write(tmp_path / name, text))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FluxIRError, match="which does not exist"):
        read_label_file(tmp_path / "none.txt")
    with pytest.raises(FluxIRError, match=r"cannot read the labels in .*none\.csv: No such file or directory"):
        read_label_file(tmp_path / "none.csv")
    with pytest.raises(FluxIRError, match=r"a folder of masks holds CONCEPT/ID\.png: .* has none"):
        read_label_file(tmp_path)
    (tmp_path / "latin.csv").write_bytes(b"id,a\nx,\xff\ny,b")
    with pytest.raises(FluxIRError, match="must be UTF-8: byte 0xff on line 2"):
        read_label_file(tmp_path / "latin.csv")


def test_labels_of_other_pictures_are_refused(source, tmp_path):
    file = read_label_file(write(tmp_path / "labels.csv", "id,animal\nx,cat\ny,dog"))
    with pytest.raises(
        FluxIRError, match=f"knows none of 6 generations by its id, such as '{source.generations[0].id}'"
    ):
        file.labels(source)


def test_wrong_masks_are_one_line_each(source, tmp_path):
    first = source.generations[0].id
    (tmp_path / "cat").mkdir()
    Image.new("L", (64, 32)).save(tmp_path / "cat" / f"{first}.png")
    with pytest.raises(FluxIRError, match=r"a mask has the form of its picture, 8 x 8 patches: .* has 64 x 32"):
        read_label_file(tmp_path).labels(source)
    (tmp_path / "cat" / f"{first}.png").write_bytes(b"no picture")
    with pytest.raises(FluxIRError, match="cannot read the mask"):
        read_label_file(tmp_path).labels(source)
    Image.new("L", (8, 8)).save(tmp_path / "stray.png")
    with pytest.raises(FluxIRError, match=r"masks are FOLDER/CONCEPT/ID.png"):
        read_label_file(tmp_path)
