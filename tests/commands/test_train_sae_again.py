"""`train_sae.py` killed, stopped, in two processes and called again: it goes on, and ends with the same."""

import signal
import time

import torch

from flux_ir.sae.files.folder import load_sae
from tests.commands.small_training import finish, start


def contents(folder):
    """The bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_for_checkpoint(process, saes):
    """Returns once the process has saved one."""
    while not list(saes.glob("*/.training/*/step_*[0-9]")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_run_that_is_killed_and_gone_on_with_ends_with_the_same_bytes(array, tmp_path, capsys):
    """SIGKILL in the middle of the real command; a checkpoint every few steps."""
    words = ("--k", "4", "--epochs", "12", "--checkpoint_tokens", "640", "--pool_gb", "0.0001", "--ema", "0.99")
    process = start(array, tmp_path / "killed", *words)
    wait_for_checkpoint(process, tmp_path / "killed")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finish(array, tmp_path / "killed", *words)
    assert "going on after" in capsys.readouterr().err
    finish(array, tmp_path / "whole", *words)
    assert contents(tmp_path / "killed").keys() == contents(tmp_path / "whole").keys()
    for name, whole in contents(tmp_path / "whole").items():
        gone_on = contents(tmp_path / "killed")[name]
        if name.endswith("training.json"):  # it names its folder
            whole, gone_on = (text.replace(b"/killed", b"/whole") for text in (whole, gone_on))
        assert gone_on == whole, name


def test_ctrl_c_saves_and_tells_how_to_go_on(array, tmp_path):
    words = ("--k", "4", "--epochs", "200", "--checkpoint_tokens", "640")
    process = start(array, tmp_path, *words)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert out == ""
    (newest,) = list(tmp_path.glob("*/.training/*"))
    told = int(err.split("stopped after ")[1].split(" tokens")[0].replace(",", ""))
    assert max(int(path.name.removeprefix("step_")) for path in newest.iterdir()) * 64 == told


def test_two_processes_end_with_the_weights_of_one(array, tmp_path):
    words = ("--k", "4", "--max_tokens", "1280", "--lr", "0.001")
    finish(array, tmp_path / "one", *words)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out, err = (process := start(array, tmp_path / "two", *words, launcher=launcher)).communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("measured on held-out tokens") == 1
    one, two = (load_sae(tmp_path / which / "tokens" / "array_topk_k4_x4_s0") for which in ("one", "two"))
    for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, msg=name)


def test_a_finished_run_is_not_trained_again(train):
    train("--k", "4")
    code, out, err, _ = train("--k", "4")
    assert code == 0
    assert "already trained" in err
    assert "array_topk_k4_x4_s0" in out


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(train):
    train("--k", "4")
    before = contents(train("--k", "4")[3])
    code, _, err, saes = train("--k", "4", "--lr", "0.1")
    assert code == 2
    assert "belongs to other settings: lr was None and is 0.1" in err
    assert "--name" in err
    assert contents(saes) == before


def test_a_finished_run_cannot_be_made_longer(train):
    train("--k", "4", "--max_tokens", "1280")
    code, _, err, _ = train("--k", "4", "--max_tokens", "2560")
    assert code == 2
    assert "tokens was 1280 and is 2560" in err
    assert "cannot be made longer" in err
