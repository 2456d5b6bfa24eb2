"""The documentation site has every public name, and takes nothing from elsewhere. `.ci/run` builds it."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

import flux_ir

ROOT = Path(__file__).parents[1]
DESCRIBED = re.compile(r"^::: flux_ir\.(\S+)$", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def hook() -> dict:
    pytest.importorskip("mkdocs", reason="the site is made with `uv run --group docs mkdocs build`")
    return runpy.run_path(str(ROOT / ".ci" / "site_pages.py"))


def test_every_public_name_is_described_once():
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    described = [name for page in pages for name in DESCRIBED.findall(page.read_text(encoding="utf-8"))]
    assert sorted(name for name in described if "." not in name) == sorted(flux_ir.__all__)
    assert len(set(described)) == len(described)


def test_the_theme_has_no_web_fonts():
    # Of mkdocs.yml, which has no tags of its own, so the plain loader reads it.
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["theme"]["font"] is False


@pytest.mark.parametrize(
    "loaded",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href=//example.org/a.css>',
        '<img alt="a" src="http://example.org/a.png">',
    ],
)
def test_a_page_that_loads_from_elsewhere_stops_the_build(hook, loaded):
    page = type("Page", (), {"file": type("File", (), {"src_uri": "a.md"})})
    with pytest.raises(Exception, match=r"a\.md loads from elsewhere: .*//example\.org/a"):
        hook["on_post_page"](loaded, page, None)
    kept = '<a href="https://example.org">there</a><img src="images/a.png"><link href="a.css">'
    assert hook["on_post_page"](kept, page, None) == kept


@pytest.mark.parametrize(
    ("page", "text", "turned"),
    [
        ("index.md", "[the lens](docs/method.md#anchors)", "[the lens](method.md#anchors)"),
        ("index.md", "![a sheet\nof it](docs/images/a.jpg)", "![a sheet\nof it](images/a.jpg)"),
        ("index.md", "[a tour](docs/tour.ipynb)", "[a tour](tour.md)"),
        ("tour.md", "[the notebook](tour.ipynb)", "[the notebook](tour.ipynb)"),
        ("features.md", "in [recipes](../recipes/runs), all", "in recipes, all"),
        ("features.md", "in [recipes](../recipes/gone)", "in [recipes](../recipes/gone)"),
        ("reference/sae.md", "[numbers](../../benchmarks/RESULTS.md)", "[numbers](../measurements.md)"),
        ("index.md", "[there](https://example.org/a.md)", "[there](https://example.org/a.md)"),
        (
            "index.md",
            "```\n[a](docs/method.md)\n```\n[a](docs/method.md)",
            "```\n[a](docs/method.md)\n```\n[a](method.md)",
        ),
    ],
)
def test_links_between_files_become_links_between_pages(hook, page, text, turned):
    one = type("Page", (), {"file": type("File", (), {"src_uri": page})})
    assert hook["on_page_markdown"](text, one, None, None) == turned


def test_a_notebook_becomes_text_and_code(hook):
    text = hook["notebook_text"]((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    assert text.startswith("# A tour of flux_ir\n")
    assert text.count("```python\n") == text.count("\n```") / 2 > 5
