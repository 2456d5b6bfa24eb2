"""What is told and where: notes and progress on stderr, results on stdout, every line whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flux_ir.api.progress import follow, phase
from flux_ir.commands.report import Report, bytes_at, host_memory, peak_host_bytes, peak_memory
from flux_ir.errors import in_units


def test_notes_go_to_stderr_as_they_are(capsys):
    text = "note: [red]no colour[/red] and [/] no markup, " + "however long the line is " * 10
    Report().note(text)
    captured = capsys.readouterr()
    assert captured.err == text + "\n"
    assert captured.out == ""


def test_results_go_to_stdout(capsys):
    Report().results.print("generation id: 0123abcd")
    captured = capsys.readouterr()
    assert captured.out == "generation id: 0123abcd\n"
    assert captured.err == ""


def test_a_stage_adds_up():
    report = Report()
    with phase(report.watch, "load"):
        pass
    first = report.seconds["load"]
    with phase(report.watch, "load"):
        pass
    assert report.seconds["load"] > first > 0
    assert list(report.seconds) == ["load"]


def test_following_a_loop_gives_its_items_and_times_it(capsys):
    report = Report()
    assert list(follow(report.watch, "sample", iter([1, 2, 3]), total=3)) == [1, 2, 3]
    assert report.seconds["sample"] > 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"sample .* 3/3", captured.err)


def test_an_error_in_a_followed_loop_passes(capsys):
    def steps():
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Report() as report:
        list(follow(report.watch, "sample", steps(), total=3))
    assert "1/3" in capsys.readouterr().err


def test_the_table_names_phases_memory_and_every_path_on_one_line(tmp_path, capsys):
    deep = tmp_path / "a very long name of a folder" / ("x" * 100)
    deep.mkdir(parents=True)
    (deep / "one.bin").write_bytes(b"x" * 1500)
    (deep / "inside").mkdir()
    (deep / "inside" / "two.bin").write_bytes(b"x" * 500)
    report = Report()
    report.seconds = {"load": 1.25, "sample": 120.5}
    report.table("generation 0123abcd", {"file": deep / "one.bin", "folder": deep}, {"host": 2_500_000_000})
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "generation 0123abcd",
        "load                 1.25 s",
        "sample             120.50 s",
        "in all             121.75 s",
        "peak memory, host    2.5 GB",
        f"file                 1.5 kB  {deep / 'one.bin'}",
        f"folder                 2 kB  {deep}",
    ]


def test_bytes_are_those_of_all_files_below(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"123")
    (tmp_path / "a" / "b" / "two").write_bytes(b"45")
    assert bytes_at(tmp_path / "a") == 5
    assert bytes_at(tmp_path / "a" / "one") == 3
    assert bytes_at(tmp_path / "nothing here") == 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (3_402_000, "3.4 MB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (80_700_000_000, "80.7 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_are_told_in_powers_of_ten(size, text):
    assert in_units(size) == text


def test_peak_memory_is_the_most_this_process_ever_held():
    code = (
        "from flux_ir.commands.report import peak_host_bytes; before = peak_host_bytes();"
        "held = bytearray(200_000_000); held[::1024] = bytes(len(held[::1024])); del held;"
        "print(before, peak_host_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 5e6 < before < 1e9
    assert after - before == pytest.approx(200e6, rel=0.2)
    assert peak_memory()["host"] == peak_host_bytes()


def test_no_module_for_peak_memory_is_no_error(monkeypatch):
    """As on Windows, which has neither `resource` nor /proc: the host's memory is just not told."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert peak_host_bytes() is None
    assert host_memory() == {}
