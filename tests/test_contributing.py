"""What those who pick the project up rely on: how it is cited, continuous integration, hooks before a commit."""

import re
import tomllib
from datetime import date
from pathlib import Path

import yaml

import flux_ir

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_says_what_the_project_says():
    citation = read_yaml("CITATION.cff")
    assert set(citation) >= {"cff-version", "message", "title", "authors"}  # what the format (1.2.0) requires
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"].split(":")[0] == flux_ir.__name__
    assert citation["version"] == flux_ir.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["keywords"] == PROJECT["project"]["keywords"]
    assert citation["authors"] == PROJECT["project"]["authors"]
    released = re.search(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert (citation["version"], citation["date-released"]) == (released[1], date.fromisoformat(released[2]))


def test_continuous_integration_runs_the_definition_of_clean_and_nothing_else():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    pythons = job["strategy"]["matrix"]["python"]
    assert pythons[0] == oldest
    assert len(pythons) >= 2
    assert all(f"Programming Language :: Python :: {python}" in PROJECT["project"]["classifiers"] for python in pythons)
    assert "://" not in text


def test_hooks_before_a_commit_are_steps_of_the_definition_of_clean():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (repository,) = yaml.safe_load(text)["repos"]
    assert repository["repo"] == "local"
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert [entry for entry in entries if entry not in steps] == []
    assert [hook["id"] for hook in repository["hooks"]] == [
        *("lint", "format", "types", "imports"),
        *("pages", "page-scripts"),
    ]


def test_biome_has_one_version_and_no_file_of_npm_names_a_host():
    text = (ROOT / ".ci" / "biome").read_text(encoding="utf-8")
    assert re.search(r"^BIOME=\d+\.\d+\.\d+$", text, flags=re.MULTILINE)
    for path in (ROOT / ".ci" / "biome", ROOT / "biome.jsonc"):
        assert "://" not in path.read_text(encoding="utf-8")
    assert not any((ROOT / name).exists() for name in ("package.json", "package-lock.json"))
