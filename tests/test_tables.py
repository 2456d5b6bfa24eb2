"""Files that people write: lines and rows with their numbers, and what is wrong named by them."""

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.tables import read_lines, read_rows


def test_only_line_feeds_end_a_line_and_a_mark_at_the_start_is_none(tmp_path):
    strange = "one\N{LINE SEPARATOR}still one\x0bstill one"
    (tmp_path / "a.txt").write_bytes(f"\ufeff{strange}\n\ntwo".encode())
    assert list(read_lines(tmp_path / "a.txt", what="texts")) == [(1, f"{strange}\n"), (2, "\n"), (3, "two")]


def test_rows_know_the_line_they_end_on(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": [2]}')
    assert list(read_rows(tmp_path / "a.jsonl", what="rows")) == [(1, {"a": 1}), (3, {"a": [2]})]
    (tmp_path / "a.CSV").write_text('a,b\n\n"two\nlines",x\nshort\n1,2,3\n')
    cells = [{"a": "two\nlines", "b": "x"}, {"a": "short", "b": None}, {"a": "1", "b": "2", None: ["3"]}]
    assert list(read_rows(tmp_path / "a.CSV", what="rows")) == list(zip((4, 5, 6), cells, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"', r"a\.jsonl, line 2 must be JSON: "),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl, line 1 must be a JSON object: got \[\"a\"\]"),
        ("a.csv", b'a,b\n"x,1\n', r"a\.csv, line 2 must be CSV: "),
        ("a.csv", b"a\nx\n\xe9\n", r"a\.csv must be UTF-8: byte 0xe9 on line 3"),
        ("a.jsonl", b'{"a": 1}\n\xe9', r"a\.jsonl must be UTF-8: byte 0xe9 on line 2"),
        ("none.csv", None, r"cannot read the rows in .*none\.csv: No such file"),
        ("none.jsonl", None, r"cannot read the rows in .*none\.jsonl: No such file"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FluxIRError, match=message) as raised:
        list(read_rows(tmp_path / name, what="rows"))
    assert raised.value.hint
