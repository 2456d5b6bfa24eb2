"""How the first command fails: wrong words, weights and folders are one line, found early, and leave nothing."""

import re

import pytest

from flux_ir.commands.capture import main
from tests.commands.run_folder import DEPTH_SINGLE, QUICK, files_in, full_beyond, only


def refused(capsys, *words):
    """The error and the hint of a run that must fail with exactly these two lines after its progress."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert captured.err.splitlines()[-len(told) :] == told
    assert 1 <= len(told) <= 2
    assert told[0].startswith("error: ")
    return told[0].removeprefix("error: "), told[1].removeprefix("hint: ") if len(told) == 2 else ""


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("--width 100", "--width must be a multiple of 16: got 100", "use 96 or 112"),
        ("--height -16", "--height must be at least 16: got -16", ""),
        ("--model flux-tny", "--model must be one of .*: got 'flux-tny'", r"did you mean flux-tiny\?"),
        ("--num_steps 0", "--num_steps must be at least 1: got 0", ""),
        ("--sites duble.*", r"no site of this model matches 'duble\.\*'", "the nearest are double"),
        (f"--sites single.{DEPTH_SINGLE}", "no site of this model matches", "the nearest are single"),
        ("--sites t5.7,single.1", r"no site of this model matches 't5\.7'", "the nearest are t5"),
        ("--sites t5.*", "--sites keeps none: it keeps t5.0", "--should_decode_intermediates False"),
        ("--steps 1,3,4 --num_steps 3", "--steps counts from 0 to 2 with 3 steps: got 3, 4", "choose other --steps"),
        ("--sites double.*.txt", "--sites keeps none: it keeps double.0.txt", "--should_decode_intermediates False"),
        ("--checkpoint nowhere/x.safetensors", "--checkpoint must name .*: got 'nowhere/x.safetensors'", "correct"),
        ("--ae_checkpoint nowhere", "--ae_checkpoint must name .*: got 'nowhere'", "correct --ae_checkpoint"),
        ("--multi_gpu True --offload", "--multi_gpu True spreads .*, --offload keeps", "leave out"),
        ("--multi_gpu blocks --device cpu", "--multi_gpu blocks spreads .*, --device keeps", "leave out"),
        ("--multi_gpu layers", "--multi_gpu must be .*: got 'layers'", ""),
        ("--device cuda:99", "--device cuda:99 must be a GPU of this machine", "try --device cpu"),
        ("--device tpu", "--device must be cpu, cuda or cuda:N: got 'tpu'", "try --device cpu"),
        ("--attention cudnn --device cpu", "--attention cudnn is not there on cpu .*: flash and math are", "chooses"),
        ("--guidance nan", "--guidance must be a finite number", ""),
        ("--prompt=\udcff", r"--prompt must be UTF-8 text: got '\\udcff'", "check the encoding"),
        (f"--prompt={'x' * 60_001}", "at most 60000 bytes: got 60001", "--add_sampling_metadata False"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, error, hint, tmp_path, capsys):
    words = words.split() if "--prompt" not in words else [words]
    if "--model" not in words:
        words += ["--model", "flux-tiny"]
    told, advice = refused(capsys, *words, "--output_dir", str(tmp_path / "new" / "output"))
    assert re.search(error, told)
    assert re.search(hint, advice)
    assert list(tmp_path.iterdir()) == []


def test_wrong_weights_are_found_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08" + b"\0" * 20)
    words = (*QUICK, "--checkpoint", str(tmp_path / "cut.safetensors"), "--output_dir", str(tmp_path / "output"))
    error, _ = refused(capsys, *words)
    assert "cut.safetensors" in error
    assert files_in(tmp_path) == ["cut.safetensors"]
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "/dev/null/x"])
def test_an_output_folder_that_cannot_be_made_is_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    output_dir = tmp_path / place
    error, hint = refused(capsys, *QUICK, "--output_dir", str(output_dir))
    assert error.startswith(f"cannot write {output_dir}/")
    assert "--output_dir" in hint
    assert files_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_folder_that_was_there_stays_when_a_run_fails(output, capsys):
    output.mkdir()
    refused(capsys, *QUICK, "--checkpoint", "nowhere", "--output_dir", str(output))
    assert list(output.iterdir()) == []


def test_a_full_disk_is_known_before_weights_are_loaded_and_leaves_nothing(captured_run, tmp_path, output, capsys):
    needed = only(captured_run.folder, "intermediates/capture_*.pt").stat().st_size
    with full_beyond(needed - 1000):
        error, hint = refused(capsys, *captured_run.words, "--output_dir", str(output))
    assert re.search(r"cannot write .*capture_.*\.pt: File too large \(it needs \d+ bytes", error)
    assert "--steps" in hint
    assert list(tmp_path.iterdir()) == []
