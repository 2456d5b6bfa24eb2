"""The whole first command on flux-tiny: what it leaves and says, and the same again. No test looks at quality."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ir.commands.capture import CaptureOptions
from flux_ir.commands.cli.option import flags
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.placement import plan
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode
from flux_ir.recording.reader import load_capture
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sites import block_outputs
from tests.commands.run_folder import (
    BLOCKS,
    DEPTH,
    DEPTH_SINGLE,
    LAST,
    QUICK,
    SCRIPT,
    SPEC,
    files_in,
    metadata_of,
    only,
    pixels_of,
    tensors_of,
)

COMPUTE = choose_dtype("auto", plan(torch.cuda.device_count()).devices)
EXIF_PROMPT, EXIF_SOFTWARE, EXIF_MAKE, EXIF_MODEL = 0x010E, 0x0131, 0x010F, 0x0110


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
    assert lines[0] == "transformer, autoencoder, T5, CLIP: the package's own"
    assert re.fullmatch(r"flux-tiny on (cpu|cuda:0) \(.*\), " + re.escape(f"{COMPUTE}, seed 1"), lines[1])
    for phase, count in (("load", 3), ("sample", 3), ("decode", 3 * len(BLOCKS))):
        assert [line for line in lines if re.match(rf"{phase} .* {count}/{count} ", line)]
    (note,) = [line for line in lines if line.startswith("note: ")]
    unknown = "'\"', ',', 'it', \"'\", 's', '[', ']', '[/', '\N{CAT}'."
    assert f"words never seen in training: {unknown}" in note
    assert "It knows these words: a, " in note
    assert len(lines) == 6  # nothing of other libraries


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
    assert metadata["options"].keys() == {flag.name for flag in flags(CaptureOptions)} - {"plan"}
    assert metadata["options"]["prompt"] == captured_run.prompt
    assert metadata["options"]["num_steps"] == 3
    assert metadata["captured_steps"] == [0, 1, 2]
    assert metadata["sites"] == [str(site) for site in block_outputs(DEPTH, DEPTH_SINGLE)]
    assert (metadata["dtype"], metadata["dtype_reason"]) == (COMPUTE.name, COMPUTE.reason)
    assert metadata["devices"].keys() == {"t5", "clip", "transformer", "ae_encoder", "ae_decoder"}
    assert metadata["offload"] == "none"
    assert metadata["rounding"]
    assert metadata["versions"] == {
        "flux_ir": version("flux-ir"),
        "torch": torch.__version__,
        "tokenizers": version("tokenizers"),
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
        assert {output.dtype for output in outputs} == {COMPUTE.dtype}
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
    suite = Suite(SPEC, locate_model(SPEC), plan(torch.cuda.device_count()), COMPUTE.dtype)
    with suite.text_encoders() as text:
        embedding = encode(*text, [captured_run.prompt])
    noise = noise_for([1], 128, 128, suite.placement.transformer, COMPUTE.dtype)
    inputs = prepare(noise, embedding, 128, 128)
    with suite.transformer() as model, suite.autoencoder() as autoencoder:
        *_, last = sample(model, inputs, load_capture(captured_run.folder).metadata["timesteps"], 2.5)
        pixels = decode(autoencoder, last.after, 128, 128, COMPUTE.dtype)
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


def test_help_loads_nothing_heavy():
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, str(SCRIPT), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "usage: capture_sample.py [--flag value ...]" in done.stdout
    assert all(f"--{flag.name}" in done.stdout or f"--[no]{flag.name}" in done.stdout for flag in flags(CaptureOptions))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "flux_ir.commands.cli.option" in imported
    assert not {"torch", "numpy", "fire", "rich", "transformers", "PIL"} & imported
