"""A small training for the tests, also as a program of its own: `python training_program.py OUT STEPS SETTING...`.

Settings: `shard`, `resample`, `bfloat16`, `whiten` (adds a BatchTopK), an architecture, `from=PATH` (a checkpoint) and
`save` (one at the end).
"""

import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from flux_ir.distributed import Ranks, joined
from flux_ir.sae.architectures.config import ARCHITECTURES, SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.data.whitening import whitening_of
from flux_ir.sae.training.checkpoints import SavedRun, TrainingCheckpoints
from flux_ir.sae.training.step import Member, Trainer, TrainSettings, state_of, train
from flux_ir.sites import Site

D, BATCH, TOTAL = 12, 32, 12
SITE, OTHER = Site.parse("single.1.img"), Site.parse("single.2.img")
ONE = Ranks()


def tokens(count=400, seed=0):
    """Sums of a few of 20 directions, far from the origin, in bf16 as captures are."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, D, generator=draw)
    strengths = torch.rand(count, 20, generator=draw) * (torch.rand(count, 20, generator=draw) < 0.15)
    return (strengths @ directions + 5).bfloat16()


def batches(start=0, ranks=ONE):
    """One process's shares of the batches of a run from a step on, {site: [tokens, D]}, without end."""
    rows, step, share = tokens(), start, BATCH // ranks.world_size
    while True:
        chosen = torch.randint(len(rows), (BATCH,), generator=torch.Generator().manual_seed(step))
        values = rows[chosen[ranks.rank * share : (ranks.rank + 1) * share]]
        yield {SITE: values, OTHER: values}
        step += 1


def make_trainer(architectures, ranks, *, d_sae=31, seeds=(0,), whiten=False, **changes):
    """A trainer of these architectures; 31 features, so that processes own shares of different sizes."""
    settings = {"total_steps": TOTAL, "batch_tokens": BATCH, "dead_after_tokens": 64, "learning_rate": 0.01, **changes}
    settings = TrainSettings(**settings)
    members = []
    for name in architectures:
        for seed in seeds:
            config = SAEConfig(name, D, d_sae, k=3, k_aux=4, seed=seed, l1_coefficient=0.1)
            sae = make_sae(config, sample=tokens().float())
            members.append(Member(f"{name}_s{seed}", SITE, sae, settings, ranks))
    if whiten:
        noise = torch.diag(torch.linspace(0.5, 2, D))
        whitening = whitening_of(tokens().float().mean(dim=0), noise)
        sae = make_sae(SAEConfig("batch_topk", D, d_sae, k=3, whitened=True), sample=whitening(tokens()))
        members.append(Member("whitened", OTHER, sae, settings, ranks, whitening=whitening))
    return Trainer(members, settings, ranks)


def main(out, steps, *words):
    """Train for so many steps in as many processes as there are; the first writes the weights to OUT."""
    chosen = [name for name in ARCHITECTURES if name in words] or ["topk"]
    start = next((Path(word.removeprefix("from=")) for word in words if word.startswith("from=")), None)
    with joined() as ranks:
        trainer = make_trainer(
            chosen,
            ranks,
            whiten="whiten" in words,
            shard_optimiser="shard" in words,
            resample_steps=3 if "resample" in words else None,
            ema_decay=0.9,
            # Adam makes steps of rounding errors where a gradient should be zero: they stay below 1e-5 at this rate.
            learning_rate=0.001,
            compute_dtype=torch.bfloat16 if "bfloat16" in words else torch.float32,
        )
        if start is not None:
            trainer.load(SavedRun(start))
        for progress in islice(train(trainer, batches(trainer.steps_done, ranks)), int(steps)):
            progress.read(ranks)
        if "save" in words:
            TrainingCheckpoints(Path(out).parent, ranks).save(
                trainer.steps_done, state_of(trainer, {}), trainer.tensors(), trainer.shard()
            )
        if ranks.is_first:
            save_file({name: tensor.clone() for name, tensor in trainer.tensors().items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
