"""Lines of prose in the documentation are at most 100 columns wide, so that a change of a sentence can be read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDTH = 100
PAGES = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "docs/reference", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
]


def wide_lines(text: str) -> list[str]:
    """The lines of prose that are wider; tables, code in fences and lines that are one link are not prose."""
    wide, fence = [], ""
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and fence in ("", mark.group(1)):
            fence = "" if fence else mark.group(1)
        elif not fence and len(line) > WIDTH and not re.match(r"\s*\|", line):
            wide += [] if re.fullmatch(r"\s*!?\[[^\[\]]*\]\(\S+\)[.,:]?", line) else [line]
    return wide


def test_there_are_pages():
    assert {"README.md", "CHANGELOG.md", "docs/log.md", "benchmarks/RESULTS.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_at_most_100_columns_wide(page):
    assert wide_lines((ROOT / page).read_text(encoding="utf-8")) == []


LONG = "word " * 20 + "word"


@pytest.mark.parametrize("prose", [LONG, f"- {LONG}", f"## {LONG}", f"```\n{LONG}\n```\n{LONG}", f"{LONG} [a](b.md)"])
def test_a_wide_line_of_prose_is_found(prose):
    assert wide_lines(prose) == [prose.splitlines()[-1]]


@pytest.mark.parametrize(
    "other", [f"| {LONG} | b |", f"```\n{LONG}\n```", f"  ```python\n{LONG}\n  ```", f"![{LONG}](a.png)", LONG[:100]]
)
def test_tables_code_and_links_may_be_wider(other):
    assert wide_lines(other) == []
