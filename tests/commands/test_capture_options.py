"""What the options of the first command do: what is kept and shown, sizes, precision, devices, any prompt."""

import json
import re

import pytest
import torch

from flux_ir.api.capture import CaptureSettings, settle
from flux_ir.api.models import encode_prompt, load_model
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import TextRecorder
from flux_ir.sites import Site
from tests.commands.run_folder import BLOCKS, DEPTH, LAST, QUICK, SMALL, SPEC, files_in, metadata_of, pixels_of

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


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


def test_layers_of_the_text_encoders_are_kept_once_and_change_nothing(captured_run, run):
    folder = run(*captured_run.words, "--sites", "t5.*,clip.1,single.*", "--steps", "0,1")
    assert (folder / "img_0.jpg").read_bytes() == (captured_run.folder / "img_0.jpg").read_bytes()
    capture = load_capture(folder)
    layers = [*(f"t5.{layer}" for layer in range(SPEC.t5_layers)), "clip.1"]
    assert list(map(str, capture.text_sites)) == layers
    assert metadata_of(folder)["sites"][: len(layers)] == layers
    assert capture.read("t5.2").shape == (1, SPEC.text_tokens, SPEC.flux.context_in_dim)
    assert capture.read("clip.1").shape == (1, SPEC.clip_tokens, SPEC.flux.vec_in_dim)
    suite = load_model("flux-tiny", parts=["text"])
    with suite.text_encoders() as text, TextRecorder(text, "t5.2") as recorder:
        encode_prompt(suite, captured_run.prompt)
    assert torch.equal(capture.read("t5.2"), recorder.sink.read("t5.2"))


def test_nothing_is_decoded_on_request(run, capsys):
    folder = run(*SMALL, "--should_decode_intermediates=False")
    kinds = [name.split("_")[0] for name in files_in(folder)]
    assert kinds == ["img", "intermediates/capture", "intermediates/metadata"]
    assert not re.search("^(decode|numbers|contact)", capsys.readouterr().out, flags=re.MULTILINE)


def test_sizes_and_precision_are_as_asked_for(run):
    folder = run(*SMALL, "--width", "48", "--height", "80", "--dtype", "float32", "--guidance", "4")
    assert pixels_of(folder / "img_0.jpg").shape == (80, 48, 3)
    assert {path.name for path in folder.glob("contact_sheet*")} == {"contact_sheet.jpg", "contact_sheet_x0.jpg"}
    capture = load_capture(folder)
    assert capture.dtype == torch.float32
    assert capture.shape(Site.parse(LAST)) == (1, SPEC.text_tokens + 15, SPEC.flux.hidden_size)
    assert capture.context(0).guidance == metadata_of(folder)["guidance"] == 4.0


@NO_GPU
@pytest.mark.parametrize(
    ("word", "note"),
    [
        ("--multi_gpu True", "--multi_gpu needs two GPUs and there is no GPU: everything on cpu"),
        ("--multi_gpu blocks", "--multi_gpu needs two GPUs and there is no GPU: everything on cpu"),
        ("--offload True", "no GPU is visible; all of it fits, so nothing is offloaded"),
    ],
)
def test_a_machine_without_gpus_is_told_and_works(run, capsys, word, note):
    folder = run(*QUICK, *word.split())
    assert f"flux-tiny on cpu ({note})" in capsys.readouterr().err
    assert metadata_of(folder)["devices"]["transformer"] == "cpu"


@pytest.mark.gpu
def test_offload_changes_no_bit_of_what_a_gpu_draws(run):
    words = ("--model", "flux-tiny", "--seed", "1", "--num_steps", "2", "--prompt", "a red circle")
    resident, offloaded = run(*words, "--device", "cuda"), run(*words, "--offload")
    assert metadata_of(resident)["devices"] == metadata_of(offloaded)["devices"]
    assert metadata_of(offloaded)["devices"]["transformer"] == "cuda:0"
    assert (metadata_of(resident)["offload"], metadata_of(offloaded)["offload"]) == ("none", "parts")
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


def test_defaults_are_those_of_the_model():
    job = settle(CaptureSettings())
    assert (job.spec.name, *job.picture.grid, job.picture.num_steps) == ("flux-schnell", 256, 256, 4)
    assert job.picture.timesteps == [1.0, 0.75, 0.5, 0.25, 0.0]
    job = settle(CaptureSettings(model="flux-dev", width=512, height=768))
    assert (job.picture.grid.tokens, job.picture.num_steps, len(job.sites)) == (1536, 50, 2 * 19 + 38)
    assert job.picture.timesteps[25] > 0.5  # shifted towards the noise
    assert (job := settle(CaptureSettings(model="flux-tiny"))).picture.grid == (128, 128)
    assert 0 <= job.seed < 2**31
