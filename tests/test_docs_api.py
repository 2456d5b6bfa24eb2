"""The examples of docs/api.md, one after the other, as they stand."""

import re
from pathlib import Path

import flux_ir

TEXT = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## (\d+)\. .*?```python\n(.*?)```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_there_are_twelve_examples():
    assert [number for number, _ in EXAMPLES] == [str(number) for number in range(1, 13)]
    assert TEXT.count("```python") == len(EXAMPLES)


def test_every_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, code in EXAMPLES:
        exec(compile(code, f"docs/api.md, example {number}", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) > 20
    assert (tmp_path / "square.png").is_file()
    used = set(re.findall(r"flux_ir\.(\w+)", TEXT))
    assert used - {"FluxIRError"} <= set(flux_ir.__all__) | {"py"}
