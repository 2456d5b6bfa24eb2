"""What the tests share: shape checks for the whole package, the golden tensors, and small random networks.

The import hook must stand before the first import of `flux_ir`: it adds a shape and type check to every function of it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxtyping import install_import_hook

# Several processes share the tests and the processors (pytest-xdist): one thread each, for the programs they start too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# int is accepted where float is asked for, as type checkers accept it.
install_import_hook("flux_ir", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from flux_ir.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.flux2.autoencoder import Flux2AutoEncoder, Flux2AutoEncoderParams
from flux_ir.models.flux2.transformer import Flux2, Flux2Params

# A shell's `&` has its children ignore Ctrl-C, and theirs: tests that press it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

Network = TypeVar("Network", bound=nn.Module)
ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"


def pytest_xdist_auto_num_workers() -> int:
    """A process for each processor; no more than eight, which need 8 GB."""
    return min(os.cpu_count() or 1, 8)


class Golden(NamedTuple):
    """One golden file: its tensors by name, and its metadata (the network's params already parsed)."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    params: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the network that made these tensors."""
        return {name.removeprefix("weights."): t for name, t in self.tensors.items() if name.startswith("weights.")}


class FluxInputs(NamedTuple):
    """The arguments of `Flux.forward`, in order: `flux(*tiny_inputs())`."""

    img: Tensor
    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    timesteps: Tensor
    y: Tensor
    guidance: Tensor | None


class CapturedRun(NamedTuple):
    """One run of the whole command: the words it was given, what it said, and the folder it left."""

    words: tuple[str, ...]
    prompt: str
    stdout: str
    stderr: str
    folder: Path


class TextFolders(NamedTuple):
    """Small text encoders as transformers saves them: a folder each, with its tokenizer."""

    t5: Path
    clip: Path
    vocabulary: list[str]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Reads a golden file by its name: `golden("dev_like")`."""

    def read(name: str) -> Golden:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return Golden(tensors, metadata, json.loads(metadata.get("params", "{}")))

    return read


@pytest.fixture(scope="session")
def tiny_flux_params() -> FluxParams:
    """A transformer of 0.6 M parameters with every part of the real one but the guidance embedder."""
    return FluxParams(
        in_channels=64,
        out_channels=64,
        vec_in_dim=24,
        context_in_dim=40,
        hidden_size=64,
        mlp_ratio=4.0,
        num_heads=4,
        depth=2,
        depth_single_blocks=3,
        axes_dim=(4, 6, 6),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=False,
    )


@pytest.fixture
def tiny_flux(tiny_flux_params: FluxParams) -> Callable[..., Flux]:
    """Makes a random transformer in which every gate is open and every bias counts."""

    def make(*, guidance: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Flux:
        params = replace(tiny_flux_params, guidance_embed=guidance)
        return _randomised(Flux(params), seed).to(dtype)

    return make


@pytest.fixture(scope="session")
def tiny_flux2_params() -> Flux2Params:
    """FLUX.2's transformer as small as `tiny_flux_params`."""
    return Flux2Params(
        in_channels=128,
        context_in_dim=48,
        hidden_size=64,
        num_heads=4,
        depth=2,
        depth_single_blocks=3,
        guidance_embed=False,
        axes_dim=(4, 4, 4, 4),
    )


@pytest.fixture
def tiny_flux2(tiny_flux2_params: Flux2Params) -> Callable[..., Flux2]:
    """Makes a random FLUX.2 transformer in which every gate is open."""

    def make(*, guidance: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Flux2:
        params = replace(tiny_flux2_params, guidance_embed=guidance)
        return _randomised(Flux2(params), seed).to(dtype)

    return make


@pytest.fixture
def tiny_autoencoder() -> Callable[..., AutoEncoder]:
    """Makes a random autoencoder that reduces by 8 and has 16 latent channels."""
    params = AutoEncoderParams(
        resolution=64,
        in_channels=3,
        ch=32,
        out_ch=3,
        ch_mult=(1, 2, 2, 2),
        num_res_blocks=1,
        z_channels=16,
        scale_factor=0.3611,
        shift_factor=0.1159,
        norm_groups=8,
    )

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> AutoEncoder:
        return _randomised(AutoEncoder(params), seed).to(dtype)

    return make


@pytest.fixture
def tiny_flux2_autoencoder() -> Callable[..., Flux2AutoEncoder]:
    """Makes a random autoencoder of FLUX.2, as small as `tiny_autoencoder`, with statistics of its own per channel."""
    params = Flux2AutoEncoderParams(
        resolution=64,
        in_channels=3,
        ch=32,
        out_ch=3,
        ch_mult=(1, 2, 2, 2),
        num_res_blocks=1,
        z_channels=32,
        norm_groups=8,
    )

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Flux2AutoEncoder:
        network = _randomised(Flux2AutoEncoder(params), seed)
        draw = torch.Generator().manual_seed(seed)
        network.bn.running_mean.copy_(torch.randn(4 * params.z_channels, generator=draw))
        network.bn.running_var.copy_(0.5 + torch.rand(4 * params.z_channels, generator=draw))
        return network.to(dtype)

    return make


@pytest.fixture
def tiny_inputs(tiny_flux_params: FluxParams) -> Callable[..., FluxInputs]:
    """Makes inputs for `tiny_flux`: 7 text tokens and 4 x 3 image tokens (64 x 48 px), so mixed-up streams show."""

    def make(
        *, batch: int = 1, guidance: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> FluxInputs:
        draw = torch.Generator().manual_seed(seed)
        rows, columns, txt_tokens = 4, 3, 7
        img_ids = torch.zeros(rows, columns, 3)
        img_ids[..., 1] = torch.arange(rows)[:, None]
        img_ids[..., 2] = torch.arange(columns)[None, :]
        return FluxInputs(
            img=torch.randn(batch, rows * columns, tiny_flux_params.in_channels, generator=draw).to(dtype),
            img_ids=img_ids.reshape(1, rows * columns, 3).repeat(batch, 1, 1),
            txt=torch.randn(batch, txt_tokens, tiny_flux_params.context_in_dim, generator=draw).to(dtype),
            txt_ids=torch.zeros(batch, txt_tokens, 3),
            timesteps=torch.full((batch,), 0.75, dtype=dtype),
            y=torch.randn(batch, tiny_flux_params.vec_in_dim, generator=draw).to(dtype),
            guidance=None if guidance is None else torch.full((batch,), guidance, dtype=dtype),
        )

    return make


@pytest.fixture
def tiny_flux2_inputs(tiny_flux2_params: Flux2Params) -> Callable[..., FluxInputs]:
    """Makes inputs for `tiny_flux2`: 7 text tokens, counted by the last axis, and 4 x 3 image tokens (64 x 48 px)."""

    def make(
        *, batch: int = 1, guidance: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> FluxInputs:
        draw = torch.Generator().manual_seed(seed)
        txt_tokens = 7
        img_ids = torch.cartesian_prod(*map(torch.arange, (1, 4, 3, 1))).float()
        txt_ids = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, txt_tokens))).float()
        return FluxInputs(
            img=torch.randn(batch, len(img_ids), tiny_flux2_params.in_channels, generator=draw).to(dtype),
            img_ids=img_ids.repeat(batch, 1, 1),
            txt=torch.randn(batch, txt_tokens, tiny_flux2_params.context_in_dim, generator=draw).to(dtype),
            txt_ids=txt_ids.repeat(batch, 1, 1),
            timesteps=torch.full((batch,), 0.75, dtype=dtype),
            y=torch.zeros(batch, 0, dtype=dtype),
            guidance=None if guidance is None else torch.full((batch,), guidance, dtype=dtype),
        )

    return make


@pytest.fixture
def tiny_references(tiny_flux2_params: Flux2Params) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes `cond` and `cond_ids` of two reference pictures of 2 x 3 and 5 x 1 tokens, which stand at t = 10 and 20."""

    def make(*, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        grids = [(10, 2, 3), (20, 5, 1)]
        ids = [
            torch.cartesian_prod(torch.tensor([t]), torch.arange(rows), torch.arange(columns), torch.arange(1))
            for t, rows, columns in grids
        ]
        cond_ids = torch.cat(ids).float().repeat(batch, 1, 1)
        draw = torch.Generator().manual_seed(1)
        cond = torch.randn(batch, cond_ids.shape[1], tiny_flux2_params.in_channels, generator=draw)
        return cond.to(dtype), cond_ids

    return make


@pytest.fixture(scope="session")
def array(tmp_path_factory):
    """4,000 tokens that are sums of few of 30 directions, as a plain array."""
    draw = np.random.default_rng(0)
    strengths = draw.random((4000, 30)) * (draw.random((4000, 30)) < 0.1)
    path = tmp_path_factory.mktemp("arrays") / "tokens.npy"
    np.save(path, (strengths @ draw.normal(size=(30, 12)) + 4).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def captured_run(tmp_path_factory: pytest.TempPathFactory) -> CapturedRun:
    """The command as a user starts it: flux-tiny, three steps, every block. Read it only; copy the folder to change it.

    The words `[red]` and `[/red]` would be colours, were they taken for the markup of the progress bars' library.
    """
    prompt = 'a "large" red circle,\nit\'s on [red]white[/red] \N{CAT}'
    words = ("--model", "flux-tiny", "--seed", "1", "--num_steps", "3", "--lens", "euler", "--prompt", prompt)
    output_dir = tmp_path_factory.mktemp("output")
    command = [sys.executable, str(ROOT / "capture_sample.py"), *words, "--output_dir", str(output_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = output_dir.iterdir()
    return CapturedRun(words, prompt, done.stdout, done.stderr, folder)


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory: pytest.TempPathFactory, tiny_flux_params: FluxParams) -> TextFolders:
    """Random T5 and CLIP encoders as wide as `tiny_flux` takes them, which know 9 words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = ["a", "blue", "circle", "large", "on", "red", "small", "square", "white"]
    numbers = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *vocabulary])}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=7
    )
    t5_config = T5Config(
        vocab_size=12, d_model=tiny_flux_params.context_in_dim, d_kv=8, d_ff=48, num_layers=2, num_heads=2
    )
    clip_config = CLIPTextConfig(
        vocab_size=12,
        hidden_size=tiny_flux_params.vec_in_dim,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(t5_config).save_pretrained(folder / "t5")
        CLIPTextModel(clip_config).save_pretrained(folder / "clip")
    for encoder in ("t5", "clip"):
        tokenizer.save_pretrained(folder / encoder)
    return TextFolders(folder / "t5", folder / "clip", vocabulary)


@torch.no_grad()
def _randomised(network: Network, seed: int) -> Network:
    """The network with all parameters redrawn: matrices at unit gain, vectors around their rest value."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            rest = 0.0 if name.endswith("bias") else 1.0  # scales of norms rest at one
            parameter.copy_(rest + 0.1 * noise)
    return network.eval().requires_grad_(False)
