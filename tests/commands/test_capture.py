"""The whole first command on flux-tiny: what it leaves, what it says, and how it fails. No test looks at quality."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ir.capture.store import load_capture
from flux_ir.commands.capture import CaptureOptions, main
from flux_ir.commands.generation import settle
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.sources import locate_model
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode
from flux_ir.options import flags
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sites import Site, block_outputs

SCRIPT = Path(__file__).parents[2] / "capture_sample.py"
SPEC = get_spec("flux-tiny")
DEPTH, DEPTH_SINGLE = SPEC.flux.depth, SPEC.flux.depth_single_blocks
LAST = f"single.{DEPTH_SINGLE - 1}"
BLOCKS = [f"double_block_{i}" for i in range(DEPTH)] + [f"single_block_{i}" for i in range(DEPTH_SINGLE)]
SMALL = ("--model", "flux-tiny", "--num_steps", "1", "--sites", LAST)
QUICK = (*SMALL, "--should_decode_intermediates", "False")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
EXIF_PROMPT, EXIF_SOFTWARE, EXIF_MAKE, EXIF_MODEL = 0x010E, 0x0131, 0x010F, 0x0110


@pytest.fixture(autouse=True)
def no_named_weights(monkeypatch):
    """No variable of this machine leads to other weights."""
    for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def run(output, capsys):
    """Runs the command with these words, which must succeed. Returns the run's folder."""

    def capture(*words):
        known = set(output.iterdir()) if output.exists() else set()
        assert main([*words, "--output_dir", str(output)]) == 0, capsys.readouterr().err
        (made,) = set(output.iterdir()) - known
        return made

    return capture


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def metadata_of(folder):
    return json.loads(only(folder, "intermediates/metadata_*.json").read_text(encoding="utf-8"))


def pixels_of(path):
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture.convert("RGB"))


def tensors_of(folder):
    capture = load_capture(folder)
    tensors = {f"{site} {step}": capture.read(site, step) for site in capture.sites for step in capture.steps}
    for step in capture.steps:
        context = capture.context(step)
        tensors |= {f"img {step}": context.img, f"y {step}": context.y}
    return tensors


# ---- What it leaves


def test_everything_is_at_its_name(captured_run):
    names = [re.sub(r"_\d{8}_\d{6}_", "_{time}_", name) for name in files_in(captured_run.folder)]
    decoded = [f"intermediates/decoded/step_{step}/{block}.jpg" for step in range(3) for block in BLOCKS]
    assert names == sorted(
        [
            "img_0.jpg",
            "contact_sheet.jpg",
            "intermediates/capture_{time}_flux-tiny.pt",
            "intermediates/metadata_{time}_flux-tiny.json",
            "intermediates/lens.json",
            *decoded,
        ]
    )
    assert re.fullmatch(r"[0-9a-f]{8}", captured_run.folder.name)
    capture, metadata = (only(captured_run.folder, f"intermediates/{kind}_*").stem for kind in ("capture", "metadata"))
    assert capture.removeprefix("capture") == metadata.removeprefix("metadata")


def test_every_block_and_step_is_a_picture_and_the_last_is_the_final_one(captured_run):
    decoded = captured_run.folder / "intermediates" / "decoded"
    pictures = {path.relative_to(decoded).as_posix(): pixels_of(path) for path in decoded.rglob("*.jpg")}
    assert len(pictures) == 3 * len(BLOCKS)
    assert {picture.shape for picture in pictures.values()} == {(128, 128, 3)}
    assert len({picture.tobytes() for picture in pictures.values()}) > len(BLOCKS)
    final = pixels_of(captured_run.folder / "img_0.jpg")
    assert np.array_equal(final, pictures[f"step_2/single_block_{DEPTH_SINGLE - 1}.jpg"])


def test_the_contact_sheet_shows_every_block_and_step(captured_run):
    sheet = pixels_of(captured_run.folder / "contact_sheet.jpg")
    assert sheet.shape[0] > len(BLOCKS) * 128
    assert sheet.shape[1] > 3 * 128


def test_the_generation_id_comes_first_and_the_table_last(captured_run):
    folder = captured_run.folder
    lines = captured_run.stdout.splitlines()
    assert lines[:2] == [f"generation id: {folder.name}", f"generation {folder.name}"]
    phases = ["load", "text", "sample", "picture", "decode", "contact sheet", "in all"]
    assert re.findall(r"^(.*?)  +[\d.]+ s$", captured_run.stdout, flags=re.MULTILINE) == phases
    assert re.search(r"^peak memory, host +[\d.]+ [MG]B$", captured_run.stdout, flags=re.MULTILINE)
    told = re.findall(r"^(?:\w|,| )+?  +[\d.]+ k?M?B  (.+)$", captured_run.stdout, flags=re.MULTILINE)
    assert set(map(Path, told)) == {
        folder / "img_0.jpg",
        only(folder, "intermediates/capture_*.pt"),
        only(folder, "intermediates/metadata_*.json"),
        folder / "intermediates" / "lens.json",
        folder / "intermediates" / "decoded",
        folder / "contact_sheet.jpg",
    }


def test_progress_and_notes_go_to_stderr_alone(captured_run):
    lines = captured_run.stderr.splitlines()
    assert re.fullmatch(r"flux-tiny on (cpu|cuda:0) \(.*\), bfloat16, seed 1", lines[0])
    for phase, count in (("load", 4), ("sample", 3), ("decode", 3 * len(BLOCKS))):
        assert [line for line in lines if re.match(rf"{phase} .* {count}/{count} ", line)]
    (note,) = [line for line in lines if line.startswith("note: ")]
    unknown = "'\"', ',', 'it', \"'\", 's', '[', ']', '[/', '\N{CAT}'."
    assert f"words never seen in training: {unknown}" in note
    assert "It knows these words: a, " in note
    assert len(lines) == 5  # nothing of other libraries


def test_the_metadata_say_how_to_repeat_the_run(captured_run):
    metadata = metadata_of(captured_run.folder)
    capture = load_capture(captured_run.folder)
    first = {
        "generation_id": captured_run.folder.name,
        "model": "flux-tiny",
        "prompt": captured_run.prompt,
        "width": 128,
        "height": 128,
        "num_steps": 3,
        "timesteps": [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0],
        "seed": 1,
        "guidance": 2.5,
    }
    assert {key: metadata[key] for key in first} == first
    assert re.fullmatch(r"\d{8}_\d{6}", metadata["timestamp"])
    assert metadata["timestamp"] in capture.path.name
    assert metadata["options"].keys() == {flag.name for flag in flags(CaptureOptions)}
    assert metadata["options"]["prompt"] == captured_run.prompt
    assert metadata["options"]["num_steps"] == 3
    assert metadata["captured_steps"] == [0, 1, 2]
    assert metadata["sites"] == [str(site) for site in block_outputs(DEPTH, DEPTH_SINGLE)]
    assert metadata["dtype"] == "bfloat16"
    assert metadata["devices"].keys() == {"t5", "clip", "transformer", "ae_encoder", "ae_decoder"}
    assert metadata["offload"] is False
    assert metadata["rounding"]
    assert metadata["versions"] == {
        "flux_ir": version("flux-ir"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    for part in ("transformer", "autoencoder"):
        assert Path(metadata["files"][part]["path"]).is_file()
        assert metadata["files"][part]["origin"] == "the package"
    assert {key: metadata[key] for key in capture.metadata} == capture.metadata


def test_the_capture_is_the_original_programs_dictionary(captured_run):
    path = only(captured_run.folder, "intermediates/capture_*.pt")
    file = torch.load(path, weights_only=True, mmap=True)
    width, txt_tokens = SPEC.flux.hidden_size, SPEC.text_tokens
    assert txt_tokens != 64
    assert list(file["double_blocks"]) == [f"block_{i}" for i in range(DEPTH)]
    assert list(file["single_blocks"]) == [f"block_{i}" for i in range(DEPTH_SINGLE)]
    for pairs in file["double_blocks"].values():
        assert [(img.shape[1:], txt.shape[1:]) for img, txt in pairs] == [((64, width), (txt_tokens, width))] * 3
    for outputs in file["single_blocks"].values():
        assert [output.shape for output in outputs] == [(1, txt_tokens + 64, width)] * 3
        assert {output.dtype for output in outputs} == {torch.bfloat16}
    context = file["denoising_context"]
    assert [y.shape for y in context["y"]] == [(1, SPEC.flux.vec_in_dim)] * 3
    assert [img.shape for img in context["img_state"]] == [(1, 64, 64)] * 3
    assert context["txt_seq_len"] == [txt_tokens] * 3
    assert context["timestep_pairs"] == list(pairwise(file["metadata"]["timesteps"]))
    assert context["guidance"] == 2.5


def test_the_numbers_beside_the_pictures_are_complete(captured_run):
    report = json.loads((captured_run.folder / "intermediates" / "lens.json").read_text())
    assert report["generation_id"] == captured_run.folder.name
    assert list(report["sites"]) == [str(site) for site in block_outputs(DEPTH, DEPTH_SINGLE) if site.stream != "txt"]
    for site, rows in report["sites"].items():
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert -1 <= row["cosine"] <= 1
            assert (row["relative_distance"] == 0) is (site == LAST)
            equal = site == LAST and row["step"] == 2  # the final picture itself
            assert (row["psnr_euler_db"] is None) is equal
            assert equal or 0 < row["psnr_euler_db"] < 60


def test_the_picture_says_what_made_it(captured_run):
    with Image.open(captured_run.folder / "img_0.jpg") as picture:
        exif = picture.getexif()
    assert exif[EXIF_SOFTWARE] == "AI generated;txt2img;flux"
    assert exif[EXIF_MAKE] == "Black Forest Labs"
    assert exif[EXIF_MODEL] == "flux-tiny"
    assert exif[EXIF_PROMPT].startswith('a "large" red circle')


def test_the_prompt_stays_out_of_the_picture_on_request(run):
    with Image.open(run(*QUICK, "--add_sampling_metadata", "False") / "img_0.jpg") as picture:
        assert EXIF_PROMPT not in picture.getexif()
        assert picture.getexif()[EXIF_MODEL] == "flux-tiny"


# ---- The same again


def test_the_same_seed_gives_the_same_bytes(captured_run, run):
    again = run(*captured_run.words)
    names = [name for name in files_in(again) if name.endswith(".jpg")]
    assert names == [name for name in files_in(captured_run.folder) if name.endswith(".jpg")]
    for name in names:
        assert (again / name).read_bytes() == (captured_run.folder / name).read_bytes(), name
    one, other = tensors_of(captured_run.folder), tensors_of(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_capturing_changes_no_bit_of_the_picture(captured_run):
    suite = Suite(SPEC, locate_model(SPEC), plan(torch.cuda.device_count()), torch.bfloat16)
    with suite.text_encoders() as text:
        embedding = encode(*text, [captured_run.prompt])
    noise = noise_for([1], 128, 128, suite.placement.transformer, torch.bfloat16)
    inputs = prepare(noise, embedding, 128, 128)
    with suite.transformer() as model, suite.autoencoder() as autoencoder:
        *_, last = sample(model, inputs, load_capture(captured_run.folder).metadata["timesteps"], 2.5)
        pixels = decode(autoencoder, last.after, 128, 128)
    expected = jpeg_bytes(pixels, model="flux-tiny", prompt=captured_run.prompt)
    assert (captured_run.folder / "img_0.jpg").read_bytes() == expected


def test_a_seed_that_was_drawn_is_recorded_and_repeats_the_picture(run):
    first = run(*QUICK, "--prompt", "a red circle")
    seed = metadata_of(first)["seed"]
    assert metadata_of(first)["options"]["seed"] is None
    again = run(*QUICK, "--prompt", "a red circle", "--seed", str(seed))
    other = run(*QUICK, "--prompt", "a red circle")
    assert (again / "img_0.jpg").read_bytes() == (first / "img_0.jpg").read_bytes()
    assert (other / "img_0.jpg").read_bytes() != (first / "img_0.jpg").read_bytes()


# ---- What the options do


def test_lens_sites_and_steps_choose_what_is_kept_and_shown(run):
    words = ("--sites", "double.*.img,single.1,*.mlp", "--steps", "2,0", "--lens", "both")
    folder = run("--model", "flux-tiny", "--num_steps", "3", "--seed", "1", *words)
    blocks = [*BLOCKS[:DEPTH], "single_block_1"]
    for lens in ("decoded", "decoded_x0"):
        pictures = files_in(folder / "intermediates" / lens)
        assert pictures == sorted(f"step_{step}/{block}.jpg" for step in (0, 2) for block in blocks)
    assert (folder / "contact_sheet.jpg").is_file()
    assert (folder / "contact_sheet_x0.jpg").is_file()
    early, late = (
        [(folder / "intermediates" / lens / f"step_{step}/single_block_1.jpg").read_bytes() for step in (0, 2)]
        for lens in ("decoded", "decoded_x0")
    )
    assert early[0] != late[0]
    assert early[1] == late[1]  # at the last step the lenses coincide
    capture = load_capture(folder)
    assert capture.steps == metadata_of(folder)["captured_steps"] == [0, 2]
    kept = {*(Site("double", i, "img") for i in range(DEPTH)), Site("single", 1)}
    kept |= {Site("double", i, stream, "mlp") for i in range(DEPTH) for stream in ("img", "txt")}
    assert set(capture.sites) == kept
    rows = json.loads((folder / "intermediates" / "lens.json").read_text())["sites"]["single.1"]
    assert [row["step"] for row in rows] == [0, 2]
    assert all(row["psnr_euler_db"] and row["psnr_x0_db"] and row["cosine"] is None for row in rows)


def test_what_is_captured_changes_neither_the_picture_nor_other_tensors(captured_run, run):
    words = ("--sites", "single.0.img,double.1.txt.attn", "--steps", "1", "--should_decode_intermediates=False")
    folder = run(*captured_run.words, *words)
    assert (folder / "img_0.jpg").read_bytes() == (captured_run.folder / "img_0.jpg").read_bytes()
    half = load_capture(folder).read(Site("single", 0, "img"), 1)
    assert torch.equal(half, load_capture(captured_run.folder).read(Site("single", 0, "img"), 1))


def test_nothing_is_decoded_on_request(run, capsys):
    folder = run(*SMALL, "--should_decode_intermediates=False")
    kinds = [name.split("_")[0] for name in files_in(folder)]
    assert kinds == ["img", "intermediates/capture", "intermediates/metadata"]
    assert not re.search("^(decode|numbers|contact)", capsys.readouterr().out, flags=re.MULTILINE)


def test_sizes_and_precision_are_as_asked_for(run):
    folder = run(*SMALL, "--width", "48", "--height", "80", "--dtype", "float32", "--guidance", "4")
    assert pixels_of(folder / "img_0.jpg").shape == (80, 48, 3)
    capture = load_capture(folder)
    assert capture.dtype == torch.float32
    assert capture.shape(Site.parse(LAST)) == (1, SPEC.text_tokens + 15, SPEC.flux.hidden_size)
    assert capture.context(0).guidance == metadata_of(folder)["guidance"] == 4.0


@NO_GPU
@pytest.mark.parametrize(
    ("word", "note"),
    [
        ("--multi_gpu", "--multi_gpu needs two GPUs and there is no GPU: everything on cpu"),
        ("--offload", "no GPU is visible; --offload has nothing to move without a GPU"),
    ],
)
def test_a_machine_without_gpus_is_told_and_works(run, capsys, word, note):
    folder = run(*QUICK, word, "True")
    assert f"flux-tiny on cpu ({note})" in capsys.readouterr().err
    assert metadata_of(folder)["devices"]["transformer"] == "cpu"


@pytest.mark.gpu
def test_offload_changes_no_bit_of_what_a_gpu_draws(run):
    words = ("--model", "flux-tiny", "--seed", "1", "--num_steps", "2", "--prompt", "a red circle")
    resident, offloaded = run(*words, "--device", "cuda"), run(*words, "--offload")
    assert metadata_of(resident)["devices"] == metadata_of(offloaded)["devices"]
    assert metadata_of(offloaded)["devices"]["transformer"] == "cuda:0"
    assert (metadata_of(resident)["offload"], metadata_of(offloaded)["offload"]) == (False, True)
    for name in files_in(resident):
        if name.endswith(".jpg"):
            assert (resident / name).read_bytes() == (offloaded / name).read_bytes(), name


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "say 'hi' [/] [link=x]\r\n\t\N{FAMILY} e\N{COMBINING ACUTE ACCENT} {0} %s `ls` \\n",
        "a red circle " * 800,
        "x" * 10_000,
    ],
    ids=["empty", "hostile", "10 kB of words", "10 kB of one word"],
)
def test_any_prompt_is_kept_as_it_was_typed(run, capsys, prompt):
    folder = run(*SMALL, f"--prompt={prompt}")
    assert metadata_of(folder)["prompt"] == prompt
    assert metadata_of(folder)["options"]["prompt"] == prompt
    assert load_capture(folder).metadata["prompt"] == prompt
    captured = capsys.readouterr()
    assert max(map(len, captured.err.splitlines())) < 1000
    assert (folder / "contact_sheet.jpg").is_file()


# ---- What is wrong


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
        ("--steps 1,3,4 --num_steps 3", "--steps counts from 0 to 2 with 3 steps: got 3, 4", "choose other --steps"),
        ("--sites double.*.txt", "--sites keeps none: it keeps double.0.txt", "--should_decode_intermediates False"),
        ("--checkpoint nowhere/x.safetensors", "--checkpoint must name .*: got 'nowhere/x.safetensors'", "correct"),
        ("--ae_checkpoint nowhere", "--ae_checkpoint must name .*: got 'nowhere'", "correct --ae_checkpoint"),
        ("--multi_gpu True --offload", "--multi_gpu True spreads .*, --offload keeps", "leave out"),
        ("--device cuda:99", "--device cuda:99 must be a GPU of this machine", "try --device cpu"),
        ("--device tpu", "--device must be cpu, cuda or cuda:N: got 'tpu'", "try --device cpu"),
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


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes meanwhile: what a full disk is to it, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_known_before_weights_are_loaded_and_leaves_nothing(captured_run, tmp_path, output, capsys):
    needed = only(captured_run.folder, "intermediates/capture_*.pt").stat().st_size
    with full_beyond(needed - 1000):
        error, hint = refused(capsys, *captured_run.words, "--output_dir", str(output))
    assert re.search(r"cannot write .*capture_.*\.pt: File too large \(it needs \d+ bytes", error)
    assert "--steps" in hint
    assert list(tmp_path.iterdir()) == []


# ---- What stops it. The words make a run long enough to be met in the middle of a phase.

SAMPLING = ("--num_steps", "3000", "--sites", "single.0.txt", "--should_decode_intermediates", "False")
DECODING = ("--num_steps", "8", "--lens", "both")


@pytest.fixture
def start(output):
    """Starts the command in a process of its own."""
    started = []

    def begin(*words):
        command = [sys.executable, str(SCRIPT), "--model", "flux-tiny", *words, "--output_dir", str(output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process, condition):
    """Until something is there. The process must not end before."""
    for _ in range(30_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail("it never came")


def sampling_began(process):
    """The note on an unknown word is the last thing said before the first step."""
    for line in process.stderr:
        if line.startswith("note: "):
            break
    time.sleep(0.2)


def decoded_in(output):
    return list(output.glob("*/intermediates/decoded*/*/*.jpg"))


def check_whole(output):
    """Every file with a final name is complete."""
    for path in [path for path in output.rglob("*") if path.is_file()]:
        if path.suffix == ".jpg":
            pixels_of(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            tensors_of(path)
        else:
            assert path.suffix == ".partial"


def test_ctrl_c_while_sampling_leaves_nothing(start, tmp_path):
    process = start("--prompt", "cat", *SAMPLING)
    sampling_began(process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "stopped; what was finished is kept"
    assert "Traceback" not in stderr
    assert re.fullmatch(r"generation id: [0-9a-f]{8}\n", stdout)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_decoding_keeps_what_is_finished(start, output):
    process = start("--prompt", "a red circle", *DECODING)
    wait_for(process, lambda: decoded_in(output))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "stopped; what was finished is kept"
    assert "Traceback" not in stderr
    (folder,) = output.iterdir()
    assert (folder / "img_0.jpg").is_file()
    assert load_capture(folder).steps == list(range(8))
    assert 0 < len(decoded_in(output)) < 8 * 2 * len(BLOCKS)
    assert not list(output.rglob("*.partial"))
    check_whole(output)


def test_a_killed_run_leaves_no_broken_file_under_a_final_name(start, output):
    process = start("--prompt", "a red circle", *DECODING)
    wait_for(process, lambda: decoded_in(output))
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    check_whole(output)
    assert len(decoded_in(output)) < 8 * 2 * len(BLOCKS)


# ---- Before it starts


def test_help_loads_nothing_heavy():
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, str(SCRIPT), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "usage: capture_sample.py [--flag value ...]" in done.stdout
    assert all(f"--{flag.name}" in done.stdout or f"--[no]{flag.name}" in done.stdout for flag in flags(CaptureOptions))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "flux_ir.options" in imported
    assert not {"torch", "numpy", "fire", "rich", "transformers", "PIL"} & imported


def test_defaults_are_those_of_the_model():
    job = settle(CaptureOptions())
    assert (job.spec.name, job.width, job.height, len(job.timesteps) - 1) == ("flux-schnell", 256, 256, 4)
    assert job.timesteps == [1.0, 0.75, 0.5, 0.25, 0.0]
    job = settle(CaptureOptions(model="flux-dev", width=512, height=768))
    assert (job.img_tokens, len(job.timesteps) - 1, len(job.sites)) == (1536, 50, 2 * 19 + 38)
    assert job.timesteps[25] > 0.5  # shifted towards the noise
    assert (job := settle(CaptureOptions(model="flux-tiny"))).width == job.height == 128
    assert 0 <= job.seed < 2**31
