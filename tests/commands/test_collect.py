"""The command `collect` on flux-tiny, as users start it: one process or two, killed, stopped, and with wrong input."""

import _thread
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.collecting.storage import LocalStorage, one_job_at
from flux_ir.commands.cli.option import flags
from flux_ir.commands.collect import CollectOptions, main
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
    """A file of 72 prompts: two shards."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def words(prompts):
    """What the command is given, but for the folder."""
    return ["--prompts", str(prompts), *SMALL, *ONE_SITE]


@pytest.fixture(scope="module")
def plain(words, tmp_path_factory):
    """The folder that one process makes and nothing interrupts: 72 generations. Read it only."""
    folder = tmp_path_factory.mktemp("captures") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(variable, raising=False)
        assert main([*words, "--output_dir", str(folder)]) == 0
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- What it leaves, and what it says


def test_a_collection_is_a_training_set(plain):
    source = open_source(plain)
    assert [str(site) for site in source.sites] == ["double.1.img"]
    assert (source.steps, len(source.generations)) == ([0, 1], 72)
    block = source.read(71, source.sites[0], 1)
    assert (block.prompt, tuple(block.values.shape)) == (PROMPTS[-1], (12, SPEC.flux.hidden_size))


def test_the_table_says_what_there_is(words, plain, capsys):
    assert main([*words, "--output_dir", str(plain)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("collection complete; every file has its size and checksum\n")
    assert re.search(r"^generations +72  0 of them now$", told.out, flags=re.MULTILINE)
    assert re.search(r"^tokens +1728$", told.out, flags=re.MULTILINE)
    assert re.search(rf"^where +{re.escape(str(plain))}$", told.out, flags=re.MULTILINE)
    assert "generations 72, sites 1, no step runs after 1" in told.err


def test_a_changed_setting_is_refused_with_the_difference(words, plain, capsys):
    assert main([*words, "--seed", "1", "--output_dir", str(plain)]) == 2
    assert "was collected with other settings: seed 0 there, 1 now\n" in capsys.readouterr().err


def test_everything_on_demand_is_in_the_folder(tmp_path, capsys):
    prompts = tmp_path / "two.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": "a blue unicorn"}\n')
    extra = ("--save_images", "--save_latents", "--tokens_per_image", "5", "--store_dtype", "float8_e4m3fn")
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
    assert re.search(r"collect .* 72/72", done.stderr)  # the bar counts both


# ---- Stopped (killed: see `collecting.test_collector_broken`)


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(words, plain, tmp_path, capsys):
    def press_once_it_runs():
        while not list(tmp_path.glob("shards/*")):
            time.sleep(0.001)
        _thread.interrupt_main()

    threading.Thread(target=press_once_it_runs, daemon=True).start()
    assert main([*words, "--output_dir", str(tmp_path)]) == 130
    told = capsys.readouterr()
    assert told.out == ""
    stopped = f"stopped: what is finished is kept in {tmp_path}; the same command goes on from there"
    assert told.err.splitlines()[-1] == stopped
    assert len(list(tmp_path.glob("shards/*"))) == 1
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert "8 of them now" in capsys.readouterr().out  # the other shard
    assert files_of(tmp_path) == files_of(plain)


# ---- Wrong input


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (("--sites", "double.9.img"), "no site of this model matches 'double.9.img'", "the nearest are double."),
        (
            ("--steps", "1,3"),
            "steps to keep must be among the schedule's 3, counted from 0: got [3]",
            "more --num_steps",
        ),
        (("--tokens_per_image", "13"), "--tokens_per_image must be from 1 to the 12 image tokens", "leave it out"),
        (("--tokens_per_image", "0"), "--tokens_per_image must be at least 1: got 0", ""),
        (("--model", "flux-tinny"), "--model must be one of", "did you mean flux-tiny?"),
        (("--width", "60"), "--width must be a multiple of 16: got 60", "use 48 or 64"),
        (("--batch_size", "65"), "--batch_size must be from 1 to 64: got 65", "try 8"),
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


def test_the_dtype_that_was_once_kept_is_refused_with_the_flag_that_says_it_now():
    program = (
        "from flux_ir.commands.collect import main; "
        "main(['--prompts', 'p.txt', '--sites', 'single.0', '--output_dir', 'out', '--dtype', 'float16'])"
    )  # in a program of its own: here, types are checked before the options are
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [
        "error: --dtype is what the network computes in, auto, bfloat16 or float32: got 'float16'",
        "hint: what is kept is said by --store_dtype float16",
    ]


def test_a_file_where_the_folder_should_be_is_one_clear_line(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*words, "--output_dir", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_a_second_job_in_the_same_folder_is_refused_and_changes_nothing(words, plain, tmp_path, capsys):
    folder = tmp_path / "twice"
    with one_job_at(LocalStorage(folder), Ranks()):
        assert main([*words, "--output_dir", str(folder)]) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error == f"error: another process is at work in {folder}"
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
