"""Training in one process: what every architecture must do, and what is saved and taken up again."""

import importlib.util
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES
from flux_ir.sae.training.checkpoints import SavedRun, TrainingCheckpoints
from flux_ir.sae.training.step import TrainingNumbers, state_of, train

_SPEC = importlib.util.spec_from_file_location("training_program", Path(__file__).with_name("training_program.py"))
program = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(program)
batches, make_trainer, tokens, BATCH, TOTAL = program.batches, program.make_trainer, program.tokens, 32, 12

ONE = Ranks()
SITE = program.SITE


def trained(trainer, steps=TOTAL):
    """Take so many steps; returns what the last told."""
    *_, last = islice(train(trainer, batches(trainer.steps_done)), steps)
    return last


def saved(trainer, folder):
    """A checkpoint of the trainer, read again."""
    path = TrainingCheckpoints(folder, ONE).save(
        trainer.steps_done, state_of(trainer, {}), trainer.tensors(), trainer.shard()
    )
    return SavedRun(path)


def assert_same_bits(one, other):
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    for name, tensor in one.shard().tensors.items():
        assert torch.equal(tensor, other.shard().tensors[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns(architecture):
    """By the FVU of the whole dictionary: a matryoshka also loses what its first two features leave."""
    trainer = make_trainer([architecture], ONE, total_steps=100)
    told = [progress.read(ONE)[f"{architecture}_s0"]["fvu"] for progress in train(trainer, batches())]
    assert told[0] > 0.5
    assert sum(told[-20:]) / 20 < 0.2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_rows_have_length_one_after_every_step(architecture):
    trainer = make_trainer([architecture], ONE)
    for _ in train(trainer, batches()):
        norms = trainer.members[0].sae.W_dec.detach().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_run_ends_with_the_same_bits(architecture, tmp_path):
    """Weights, averages, thresholds, dead counters and moments; resampling draws among them."""
    changes = {"ema_decay": 0.9, "resample_steps": 3, "clip": 0.5}
    whole, first, second = (make_trainer([architecture], ONE, **changes) for _ in range(3))
    trained(whole)
    trained(first, 5)
    second.load(saved(first, tmp_path))
    assert second.steps_done == 5
    trained(second, TOTAL - 5)
    assert_same_bits(whole, second)


def test_the_statistics_of_the_data_are_in_every_checkpoint(tmp_path):
    trainer = make_trainer(["topk"], ONE)
    trained(trainer, 2)
    checkpoint = saved(trainer, tmp_path)
    raw = tokens().float()
    torch.testing.assert_close(checkpoint.shared["topk_s0/buffers/norm_mean"], raw.mean(dim=0))
    length = (raw - raw.mean(dim=0)).norm(dim=1).mean()
    torch.testing.assert_close(checkpoint.shared["topk_s0/buffers/norm_scale"], raw.shape[1] ** 0.5 / length)


def test_a_member_trains_beside_others_as_it_does_alone():
    alone = make_trainer(["topk"], ONE, seeds=(1,))
    together = make_trainer(["topk", "l1"], ONE, seeds=(0, 1))
    trained(alone)
    trained(together)
    assert [member.name for member in together.members] == ["topk_s0", "topk_s1", "l1_s0", "l1_s1"]
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor, together.tensors()[name]), name


def test_a_step_tells_tensors_and_leaves_them_on_the_device():
    progress = trained(make_trainer(["topk"], ONE), 3)
    assert (progress.optimiser_step, progress.tokens) == (3, 3 * BATCH)
    assert all(isinstance(number, torch.Tensor) and number.ndim == 0 for number in progress.numbers["topk_s0"])
    assert progress.read(ONE)["topk_s0"].keys() == set(TrainingNumbers._fields)


def test_dead_features_are_counted_in_tokens():
    trainer = make_trainer(["topk"], ONE, dead_after_tokens=10**9)
    trained(trainer, 4)
    counter = trainer.members[0].dead.tokens_since_fired
    assert set(counter.tolist()) <= {0, BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH}


def test_auxk_revives_features_that_would_stay_dead():
    dead_shares = {}
    for coefficient in (0.0, 1 / 32):
        trainer = make_trainer(["topk"], ONE, total_steps=100, d_sae=60, learning_rate=0.03)
        member = trainer.members[0]
        member.sae.config = replace(member.sae.config, aux_coefficient=coefficient, k_aux=20)
        with torch.no_grad():
            member.sae.b_enc[:30] = -4  # half of them start dead
        trained(trainer, 100)
        dead_shares[coefficient] = member.dead.dead(640).float().mean().item()
    assert dead_shares[0.0] >= 0.5
    assert dead_shares[1 / 32] < 0.3


def test_resampled_features_are_new_and_their_moments_forgotten():
    plain, resampled = (make_trainer(["l1"], ONE, d_sae=60, resample_steps=steps) for steps in (None, 3))
    for trainer in (plain, resampled):
        with torch.no_grad():
            trainer.members[0].sae.b_enc[:7] = -50
        trained(trainer, 3)
    before, after = (trainer.members[0] for trainer in (plain, resampled))
    changed = (before.sae.W_dec != after.sae.W_dec).any(dim=1)
    assert changed[:7].all()
    assert (after.optimiser.first["encoder"][changed] == 0).all()
    assert (after.optimiser.first["encoder"][~changed] != 0).any()
    assert (after.dead.tokens_since_fired[changed] == 0).all()


def test_nothing_is_resampled_in_the_second_half():
    plain, resampled = (make_trainer(["l1"], ONE, resample_steps=steps) for steps in (None, 7))
    for trainer in (plain, resampled):
        with torch.no_grad():
            trainer.members[0].sae.b_enc[:7] = -50
        trained(trainer)
    assert_same_bits(plain, resampled)


def test_rounded_products_train_float32_weights():
    trainer = make_trainer(["topk"], ONE, compute_dtype=torch.bfloat16)
    trained(trainer)
    sae = trainer.members[0].sae
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert torch.equal(sae.encoder_bf16, sae.encoder.detach().bfloat16())
    assert torch.equal(sae.decoder_bf16, sae.W_dec.detach().bfloat16())
    assert (sae.encoder != sae.encoder.bfloat16()).any()


def test_a_resumed_run_with_rounded_products_ends_with_the_same_bits(tmp_path):
    whole, first, second = (make_trainer(["topk"], ONE, compute_dtype=torch.bfloat16) for _ in range(3))
    trained(whole)
    trained(first, 5)
    second.load(saved(first, tmp_path))
    trained(second, TOTAL - 5)
    assert_same_bits(whole, second)


def test_the_average_lies_between_the_weights_and_has_unit_rows_when_finished():
    plain, averaged = make_trainer(["topk"], ONE), make_trainer(["topk"], ONE, ema_decay=0.99)
    trained(plain)
    trained(averaged)
    assert torch.equal(plain.members[0].sae.encoder, averaged.members[0].sae.encoder)
    last, finished = plain.members[0].finish(), averaged.members[0].finish()
    assert not torch.equal(last.encoder, finished.encoder)
    torch.testing.assert_close(finished.W_dec.detach().norm(dim=1), torch.ones(31))
    assert finished.encoder_bf16 is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer = make_trainer(["topk"], ONE)
    trained(trainer, 1)
    with pytest.raises(FluxIRError, match="lacks topk_s1/"):
        make_trainer(["topk"], ONE, seeds=(1,)).load(saved(trainer, tmp_path))


def test_data_that_ends_too_early_is_said():
    trainer = make_trainer(["topk"], ONE)
    with pytest.raises(FluxIRError, match="ended after 4 of 12 optimiser steps"):
        list(train(trainer, islice(batches(), 4)))


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(FluxIRError, match="32 tokens for each process: got 31"):
        make_trainer(["topk"], ONE).step({SITE: tokens()[:31]})


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(FluxIRError, match="equal shares: got 32 tokens, 3 processes"):
        make_trainer(["topk"], Ranks(0, 3, 0))


def test_twins_are_refused():
    with pytest.raises(FluxIRError, match="the same name"):
        make_trainer(["topk", "topk"], ONE)
