"""Curves to other programs; each is tested where its package is installed, without a network."""

import pytest
import torch

from flux_ir.api.curve_loggers import NoLogger, check_logger, open_logger
from flux_ir.api.progress import unwatched
from flux_ir.api.train_sae import plan_run
from flux_ir.api.training_data import open_data
from flux_ir.api.training_run import TrainingRun
from flux_ir.api.training_settings import TrainSAESettings
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.training.checkpoints import MomentShard

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


def test_two_runs_never_share_an_id_and_one_that_goes_on_keeps_its_own(array, tmp_path):
    settings = TrainSAESettings(captures=array, k=(4,), batch_tokens=64, device="cpu", output_dir=tmp_path)

    def run():
        data = open_data(settings, Ranks())
        planned = plan_run(settings, data, data.sites, torch.device("cpu"), Ranks())
        return TrainingRun(planned, settings, data, Ranks(), unwatched, lambda: False)

    first, second = run(), run()
    assert first.log_id != second.log_id
    first.checkpoints.save(1, {"described": first.described, "log_id": first.log_id}, {}, MomentShard({}, {}))
    assert run().log_id == first.log_id
