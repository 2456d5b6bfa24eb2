"""Curves to other programs; each is tested where its package is installed, without a network."""

import pytest

from flux_ir.commands.logging_to import NoLogger, check_logger, open_logger
from flux_ir.errors import FluxIRError

ROWS = {"a": {"step": 3, "tokens": 30, "fvu": 0.5, "loss": None}, "b": {"step": 3, "tokens": 30, "fvu": 0.25}}


def test_nothing_is_logged_unless_asked(tmp_path):
    logger = open_logger("none", tmp_path, run_id="run", first_step=0, settings={})
    assert isinstance(logger, NoLogger)
    logger.log(ROWS)
    logger.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_way_to_get_it(kind, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FluxIRError, match=f"--log {kind} needs the package {kind}") as caught:
        check_logger(kind)
    assert caught.value.hint == f"pip install 'flux-ir[{kind}]'"


def test_tensorboard_gets_a_curve_of_each_number_and_autoencoder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger("tensorboard", tmp_path, run_id="run", first_step=0, settings={})
    logger.log(ROWS)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["fvu/a", "fvu/b"]
    assert [(event.step, event.value) for event in events.Scalars("fvu/b")] == [(3, 0.25)]


def test_wandb_writes_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = open_logger("wandb", tmp_path, run_id="run", first_step=0, settings={"k": 4})
    logger.log(ROWS)
    logger.close()
    assert list(tmp_path.glob("wandb/offline-run-*-run/*.wandb"))
