"""The command `collect` on flux-tiny, as users start it: one process or two, killed, stopped, and with wrong input."""

import _thread
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from flux_ir.activations.tokens import open_source
from flux_ir.collecting.one_job import one_job_at
from flux_ir.collecting.storage import LocalStorage
from flux_ir.commands.cli.option import flags
from flux_ir.commands.collect import CollectOptions, main
from flux_ir.commands.collecting import settle, tokens_per_generation
from flux_ir.distributed import Ranks
from flux_ir.models.registry import get_spec

SPEC = get_spec("flux-tiny")
SMALL = ("--model", "flux-tiny", "--width", "64", "--height", "48", "--num_steps", "3", "--steps", "0,1")
ONE_SITE = ("--sites", "double.1.img")
WORDS = ("red", "green", "blue", "yellow", "small", "large")
PROMPTS = [f"a {word} {other} {shape}" for word in WORDS for other in WORDS for shape in ("circle", "square")]


@pytest.fixture(autouse=True)
def no_named_weights(monkeypatch):
    """No variable of this machine leads to other weights, or makes this process one of many."""
    for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of 72 prompts: two groups."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def words(prompts):
    """What the command is given, but for the folder."""
    return ["--prompts", str(prompts), *SMALL, *ONE_SITE, "--repeats", "2"]


@pytest.fixture(scope="module")
def plain(words, tmp_path_factory):
    """The folder that one process makes and nothing interrupts: 144 generations. Read it only."""
    folder = tmp_path_factory.mktemp("captures") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(variable, raising=False)
        assert main([*words, "--output_dir", str(folder)]) == 0
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_of(folder):
    return [*folder.glob("groups/*/*.pt"), *folder.glob("text/*/*")]


# ---- What it leaves, and what it says


def test_a_collection_is_a_training_set(plain):
    source = open_source(plain)
    assert [str(site) for site in source.sites] == ["double.1.img"]
    assert (source.steps, len(source.generations)) == ([0, 1], 144)
    block = source.read(143, source.sites[0], 1)
    assert (block.prompt, tuple(block.values.shape)) == (PROMPTS[-1], (12, SPEC.flux.hidden_size))


def test_the_table_says_what_there_is(words, plain, capsys):
    assert main([*words, "--output_dir", str(plain)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("collection complete; every file has its size and checksum\n")
    assert re.search(r"^generations +144  0 of them now$", told.out, flags=re.MULTILINE)
    assert re.search(r"^tokens +3456$", told.out, flags=re.MULTILINE)
    assert re.search(rf"^where +{re.escape(str(plain))}$", told.out, flags=re.MULTILINE)
    assert "144 generations, 1 site, no step runs after 1" in told.err


def test_a_changed_setting_is_refused_with_the_difference(words, plain, capsys):
    assert main([*words, "--seed", "1", "--output_dir", str(plain)]) == 2
    assert "was collected with other settings: seed 0 there, 1 now\n" in capsys.readouterr().err


def test_everything_on_demand_is_in_the_folder(tmp_path, capsys):
    prompts = tmp_path / "two.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": "a blue unicorn"}\n')
    extra = ("--save_images", "--save_latents", "--tokens_per_image", "5", "--dtype", "float8_e4m3fn")
    sites = ("--sites", "double.1.img,single.0")
    folder = tmp_path / "out"
    assert main(["--prompts", str(prompts), *SMALL, *sites, *extra, "--output_dir", str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    told = capsys.readouterr()
    assert "note: flux-tiny: 1 of the first 2 new prompts, such as 'a blue unicorn': words never seen" in told.err
    assert len(rows) == 2
    for row in rows:
        assert all((folder / row[name]["path"]).stat().st_size == row[name]["bytes"] for name in ("image", "latent"))
    block = open_source(folder).read(0, open_source(folder).sites[0], 1)
    assert block.values.dtype == torch.float8_e4m3fn
    assert len(block.positions) == 5
    tokens = 2 * 2 * (5 + SPEC.text_tokens + 5)
    assert re.search(rf"^tokens +{tokens}$", told.out, flags=re.MULTILINE)


# ---- Many processes


def test_two_processes_write_the_same_bytes(words, plain, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "flux_ir", "collect", *words, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == files_of(plain)
    assert "flux-tiny on 2 processes, each on a cpu device" in done.stderr
    assert done.stdout.count("collection complete") == 1
    assert re.search(r"collect .* 144/144", done.stderr)  # the bar counts both


# ---- Killed and stopped


def lives(words, folder, moments):
    """Starts the command again and again, each time killed as soon as so many more files are there, and a bit later."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flux_ir.commands.collecting"])  # imports once: a life begins at once
    survived = 0
    for files, seconds in moments:
        before = len(names_of(folder))
        life = context.Process(target=main, args=([*words, "--output_dir", str(folder)],))
        life.start()
        while life.is_alive() and len(names_of(folder)) < before + files:
            time.sleep(0.001)
        time.sleep(seconds)
        life.kill()
        life.join()
        survived += life.exitcode == 0
    return survived


def check_killed(words, plain, folder, *, kills, seed):
    draw = random.Random(seed)
    most = len(names_of(plain)) // kills
    moments = [(draw.randint(0, most), draw.random() * 0.05) for _ in range(kills)]
    assert lives(words, folder, moments) < kills // 2  # most of them died
    assert not (folder / "broken").exists()
    assert main([*words, "--output_dir", str(folder)]) == 0
    assert files_of(folder) == files_of(plain)


def test_killed_at_twenty_random_moments_the_folder_is_the_same(words, plain, tmp_path):
    check_killed(words, plain, tmp_path / "killed", kills=20, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_at_sixty_random_moments_the_folder_is_the_same(words, plain, tmp_path, seed):
    check_killed(words, plain, tmp_path / "killed", kills=60, seed=seed)


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(words, plain, tmp_path, capsys):
    def press_once_it_runs():
        while len(list(tmp_path.glob("groups/*/*.pt"))) < 10:
            time.sleep(0.001)
        _thread.interrupt_main()

    threading.Thread(target=press_once_it_runs, daemon=True).start()
    assert main([*words, "--output_dir", str(tmp_path)]) == 130
    told = capsys.readouterr()
    assert told.out == ""
    stopped = f"stopped: what is finished is kept in {tmp_path}; the same command goes on from there"
    assert told.err.splitlines()[-1] == stopped
    kept = len(list(tmp_path.glob("groups/*/*.pt")))
    assert 10 <= kept < 144
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert f"{144 - kept} of them now" in capsys.readouterr().out
    assert files_of(tmp_path) == files_of(plain)


# ---- Wrong input


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (("--sites", "double.9.img"), "no site of this model matches 'double.9.img'", "the nearest are double."),
        (("--steps", "1,3"), "--steps counts from 0 to 2 with 3 steps: got 3", "more --num_steps"),
        (("--tokens_per_image", "13"), "--tokens_per_image must be at most the 12 image tokens", "leave it out"),
        (("--tokens_per_image", "0"), "--tokens_per_image must be at least 1: got 0", ""),
        (("--model", "flux-tinny"), "--model must be one of", "did you mean flux-tiny?"),
        (("--width", "60"), "--width must be a multiple of 16: got 60", "use 48 or 64"),
        (("--batch_size", "65"), "--batch_size must be at most 64: got 65", ""),
        (("--device", "tpu"), "--device must be cpu, cuda or cuda:N: got 'tpu'", ""),
        (("--prompts", "no/such.txt"), "cannot read the prompts in no/such.txt", "check the path"),
        (("--sites", ""), "--sites must be names separated by commas: got ''", "write --sites NAME,NAME"),
        (("--output_dir", ""), "--output_dir must name a folder or a URL: got ''", "write --output_dir captures/NAME"),
        (("--sits", "single.0"), "--sits: no such flag; did you mean --sites?", ""),
    ],
)
def test_wrong_input_is_one_clear_line_before_anything_is_made(prompts, tmp_path, capsys, more, message, hint):
    given = {"--prompts": str(prompts), "--output_dir": str(tmp_path / "out"), "--model": "flux-tiny"}
    given |= dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | {"--sites": "single.0", more[0]: more[1]}
    assert main([word for pair in given.items() for word in pair]) == 2
    error, _, told = capsys.readouterr().err.strip().partition("\n")
    assert message in error
    assert hint in told
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be_is_one_clear_line(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*words, "--output_dir", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_a_second_job_in_the_same_folder_is_refused_and_changes_nothing(words, plain, tmp_path, capsys):
    folder = tmp_path / "twice"
    with one_job_at(LocalStorage(folder), Ranks()):
        assert main([*words, "--output_dir", str(folder)]) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error == f"error: another process is collecting into {folder}"
    assert hint.startswith("hint: wait until it is done")
    assert list(folder.iterdir()) == []
    assert main([*words, "--output_dir", str(folder)]) == 0  # the folder is free again
    assert files_of(folder) == files_of(plain)


# ---- Options


def test_every_flag_says_what_it_does():
    assert all(flag.facts.help and flag.facts.group for flag in flags(CollectOptions))


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from flux_ir.commands.collect import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "--tokens_per_image" in done.stdout


def test_the_network_runs_in_float32_only_for_float32(prompts):
    def settled(dtype):
        options = CollectOptions(
            prompts=Path(prompts), sites=("single.0",), output_dir="unused", model="flux-tiny", dtype=dtype
        )
        return settle(options).recipe

    assert settled("float32").network_dtype == torch.float32
    assert settled("float16").network_dtype == settled("float8_e4m3fn").network_dtype == torch.bfloat16
    assert tokens_per_generation(settled("bfloat16")) == SPEC.default_steps * (64 + SPEC.text_tokens)
