"""Programs that train TopK autoencoders, ours among them, behind one face: `step` on raw tokens, then `reconstruct`.

Each is built and stepped as its own documentation does, at its own defaults, warm-up shortened alike to a fifth of a
run that is shorter than its default. Imports stand where they are used: the peers are a dependency group of their own.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flux_ir.distributed import Ranks
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.training.step import Member, Trainer, TrainSettings


class Task(NamedTuple):
    """What all of them train: sizes, how long, on which device, and tokens to take statistics from."""

    d: int
    features: int
    k: int
    batch_tokens: int
    steps: int
    device: str
    sample: Tensor

    @property
    def warm_up(self) -> int:
        return min(1000, self.steps // 5)


class Contestant(Protocol):
    """One autoencoder in training."""

    def step(self, x: Tensor) -> None:
        """Forward, backward, optimiser and whatever normalisation the program does, on raw tokens [n, d]."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw tokens as the autoencoder would put them back."""


class Ours:
    """The trainer that `train_sae.py` runs."""

    def __init__(self, task: Task, dtype: torch.dtype) -> None:
        sae = make_sae(SAEConfig("topk", task.d, task.features, k=task.k), sample=task.sample, device=task.device)
        settings = TrainSettings(
            task.steps, task.batch_tokens, dead_after_tokens=10_000_000, warmup_steps=task.warm_up, compute_dtype=dtype
        )
        ranks = Ranks(0, 1, 0)
        self.sae = sae
        self.trainer = Trainer([Member("ours", None, sae, settings, ranks)], settings, ranks)

    def step(self, x: Tensor) -> None:
        self.trainer.step({None: x})

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)


class SAELens:
    """sae-lens: its `SAETrainer`, whose own `autocast` is the second way."""

    def __init__(self, task: Task, *, autocast: bool) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=task.d, d_sae=task.features, k=task.k, device=task.device)
        ).to(task.device)
        tokens = task.steps * task.batch_tokens
        config = SAETrainerConfig(tokens, task.batch_tokens, lr_end=3e-5, device=task.device, autocast=autocast)
        self.trainer = SAETrainer(config, self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)


class Sparsify:
    """eai-sparsify: `SparseCoder` stepped as its trainer does, by SignSGD with schedule-free averaging."""

    def __init__(self, task: Task, *, autocast: bool) -> None:
        if torch.device(task.device).type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its own switch: the decoder's kernel needs a GPU
        with contextlib.redirect_stdout(io.StringIO()):
            from schedulefree import ScheduleFreeWrapper
            from sparsify.config import SparseCoderConfig
            from sparsify.sign_sgd import SignSGD
            from sparsify.sparse_coder import SparseCoder

        config = SparseCoderConfig(num_latents=task.features, k=task.k)
        self.sae = SparseCoder(task.d, config, task.device, dtype=torch.float32)
        self.sae.b_dec.data = task.sample.mean(dim=0).to(task.device)
        rate = 5e-3 / (task.features / 2**14) ** 0.5
        self.optimiser = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=rate), momentum=0.95)
        self.optimiser.train()
        self.autocast = _autocast(task.device, enabled=autocast)
        self.tokens_since_fired = torch.zeros(task.features, dtype=torch.long, device=task.device)

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        with self.autocast():
            out = self.sae(x)
        out.fvu.backward()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[out.latent_indices.flatten()] = 0
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        self.optimiser.eval()
        return self.sae(x).sae_out


class DictionaryLearning:
    """dictionary-learning: its `TopKTrainer`."""

    def __init__(self, task: Task, *, autocast: bool) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer = TopKTrainer(
            task.steps,
            task.d,
            task.features,
            task.k,
            layer=0,
            lm_name="none",
            warmup_steps=task.warm_up,
            device=task.device,
        )
        self.autocast = _autocast(task.device, enabled=autocast)
        self.number = 0

    def step(self, x: Tensor) -> None:
        with self.autocast():
            self.trainer.update(self.number, x)
        self.number += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


class Overcomplete:
    """overcomplete: its `train_sae`, one batch at a time. Criterion and Adam at 5e-4 are those of its documentation."""

    def __init__(self, task: Task, *, autocast: bool) -> None:
        _give_back_get_cmap()
        from overcomplete.sae import TopKSAE
        from overcomplete.sae.train import train_sae

        self.sae = TopKSAE(task.d, task.features, top_k=task.k, device=task.device)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=5e-4)
        self.train, self.device = train_sae, task.device
        self.autocast = _autocast(task.device, enabled=autocast)

    def step(self, x: Tensor) -> None:
        with self.autocast():
            self.train(self.sae, [x], _mean_square, self.optimiser, nb_epochs=1, monitoring=0, device=self.device)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.eval()(x)[2]


def contestants(task: Task) -> Iterator[tuple[str, Callable[[], Contestant]]]:
    """Names and how to build them: ours, then every peer at its defaults and under bf16 autocast."""
    yield "ours, bf16", lambda: Ours(task, torch.bfloat16)
    yield "ours, float32", lambda: Ours(task, torch.float32)
    peers: dict[str, Any] = {
        "sae-lens": SAELens,
        "eai-sparsify": Sparsify,
        "dictionary-learning": DictionaryLearning,
        "overcomplete": Overcomplete,
    }
    for name, peer in peers.items():
        yield name, lambda peer=peer: peer(task, autocast=False)
        yield f"{name}, bf16 autocast", lambda peer=peer: peer(task, autocast=True)


def _mean_square(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    return (x - x_hat).square().mean()


def _autocast(device: str, *, enabled: bool) -> Callable[[], Any]:
    kind = torch.device(device).type
    return lambda: torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled)


def _give_back_get_cmap() -> None:
    """For overcomplete, which asks for `matplotlib.cm.get_cmap`: matplotlib 3.11 has it under another name."""
    import matplotlib

    if not hasattr(matplotlib.cm, "get_cmap"):
        matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap
