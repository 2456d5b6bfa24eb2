"""Files of prompts, and the work that follows: what each generation is called and which noise it starts from."""

import pytest

from flux_ir.collecting.prompts import WorkList, prompts_digest, read_prompts, work_item
from flux_ir.errors import FluxIRError


def written(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


# ---- Reading


GREEN = "ein gr\u00fcner Kreis"
PROMPTS = ["a red circle", 'a blue, "small" square', GREEN]
ROWS = ['{"prompt": "a red circle", "seed": 3}', "", '{"prompt": "a blue, \\"small\\" square"}']


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", f'a red circle\n\n  a blue, "small" square \r\n   \n{GREEN}'),
        ("b.jsonl", "\n".join([*ROWS, '{"prompt": "ein gr\\u00fcner Kreis"}\n'])),
        ("c.CSV", f'id,prompt\n1,a red circle\n2,"a blue, ""small"" square"\n3,{GREEN}\n'),
        ("d.txt", f'\ufeffa red circle\na blue, "small" square\n{GREEN}\n'),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, text):
    assert read_prompts(written(tmp_path, name, text)) == PROMPTS


def test_only_line_feeds_end_a_line_of_text(tmp_path):
    strange = "one\N{LINE SEPARATOR}still one\x0bstill one"
    assert read_prompts(written(tmp_path, "a.txt", f"{strange}\ntwo")) == [strange, "two"]


def test_a_csv_field_may_span_lines(tmp_path):
    assert read_prompts(written(tmp_path, "a.csv", 'prompt\n"two\nlines"\nthree\n')) == ["two\nlines", "three"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "a.txt holds no prompt"),
        ("a.txt", "\n \n", "a.txt holds no prompt"),
        ("a.jsonl", "", "a.jsonl holds no prompt"),
        ("a.csv", "prompt\n", "a.csv holds no prompt"),
        ("a.csv", "", "a.csv holds no prompt"),
        ("a.csv", "prompt,id\n\n\n,2\n", 'a.csv, line 4 must have a text "prompt": got {"prompt": "", "id": "2"}'),
        ("a.csv", 'prompt,id\n"x,1\n', "a.csv, line 2 must be CSV"),
        ("a.csv", "text,id\na,b\n", 'a.csv, line 2 must have a text "prompt": got only text, id'),
        ("a.csv", "id,prompt\n1,x\n2,\n", 'a.csv, line 3 must have a text "prompt"'),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"\n', "a.jsonl, line 3 must be JSON"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"text": "y", "id": 2}\n',
            'line 2 must have a text "prompt": got only text, id',
        ),
        ("a.jsonl", '{"prompt": 5}\n', 'line 1 must have a text "prompt": got {"prompt": 5}'),
        ("a.jsonl", '{"prompt": "  "}\n', 'line 1 must have a text "prompt"'),
        ("a.jsonl", '["x"]\n', 'line 1 must be a JSON object: got ["x"]'),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1 must be text that UTF-8 can hold"),
        ("a.pdf", "x", "--prompts must be a .txt, .jsonl, .csv file: got "),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, text, message):
    with pytest.raises(FluxIRError) as caught:
        read_prompts(written(tmp_path, name, text))
    assert message in caught.value.message
    assert caught.value.hint


def test_other_encodings_are_named_by_line(tmp_path):
    path = written(tmp_path, "a.txt", f"a red circle\n{GREEN}\n", "latin-1")
    with pytest.raises(FluxIRError, match="must be UTF-8: byte 0xfc on line 2"):
        read_prompts(path)


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(FluxIRError, match=r"cannot read the prompts in .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")


# ---- The work


def test_seeds_and_ids_are_hashes_that_never_change():
    # Written down: a collection of today must be gone on with tomorrow.
    assert work_item(0, "a red circle", 0) == ("5a8528d1a47e3a95", "a red circle", 0, 4246978437375072890)


def test_every_prompt_and_repeat_has_noise_of_its_own():
    work = WorkList(["a", "b", "c"], repeats=40, seed=5)
    items = work.items(0, len(work))
    assert len(items) == 120
    assert len({item.seed for item in items}) == len({item.id for item in items}) == 120
    assert all(0 <= item.seed < 2**63 and len(item.id) == 16 for item in items)
    assert [(item.prompt, item.repeat) for item in items[38:42]] == [("a", 38), ("a", 39), ("b", 0), ("b", 1)]


def test_a_prompt_on_several_lines_counts_on():
    work = WorkList(["a", "b", "a", "a"], repeats=2, seed=0)
    told = [(item.prompt, item.repeat) for item in work.items(0, 8)]
    assert told == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("a", 4), ("a", 5)]


def test_a_generation_does_not_depend_on_the_other_prompts():
    few, many = WorkList(["b"], repeats=2, seed=0), WorkList(["a", "b"], repeats=2, seed=0)
    assert few.items(0, 2) == many.items(2, 4)
    assert WorkList(["b"], repeats=2, seed=1).items(0, 2) != few.items(0, 2)


def test_slices_end_with_the_work():
    work = WorkList(["a"], repeats=3, seed=0)
    assert len(work.items(2, 64)) == 1
    assert work.items(64, 128) == []


def test_the_digest_of_prompts_knows_where_each_ends():
    assert prompts_digest(["ab", "c"]) != prompts_digest(["a", "bc"])
    assert prompts_digest(["a", "b"]) != prompts_digest(["b", "a"])
