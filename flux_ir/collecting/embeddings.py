"""Embedded prompts, kept by content: computed once, read back as often as a prompt is drawn.

On a CPU prompts are encoded one by one, side by side on one thread each; on a GPU in chunks of one fixed size. Either
way the bits of a prompt's embedding depend on the prompt alone, and on nothing that is encoded along with it.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from threading import local
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flux_ir.collecting.storage import Storage, move_aside
from flux_ir.models.suite import TextEncoders
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.recorder import TextRecorder
from flux_ir.sites import Site
from flux_ir.threads import in_order

Made = TypeVar("Made")

CHUNK = 32
"""Prompts per call on a GPU, where the last call is filled up with empty prompts, and of a T5 that is streamed."""


class EmbeddedPrompt(NamedTuple):
    """One prompt as the transformer takes it: [1, txt_tokens, d] of T5, [1, pooled] of CLIP."""

    text: TextEmbedding
    used_txt: int
    """How many of the text tokens are the prompt's, and not padding."""
    layers: Mapping[Site, Tensor] = MappingProxyType({})
    """[1, tokens, d] of every layer of the text encoders that is kept."""


def embedding_name(prompt: str) -> str:
    """Where the embedding of a prompt lies in its collection, by the hash of the prompt."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return f"text/{digest[:2]}/{digest}.safetensors"


def needs_encoding(storage: Storage, prompt: str, *, needed: Collection[str], checksums: bool) -> bool:
    """Whether a prompt has to be encoded: it is needed and has no embedding, or has a broken one (moved aside)."""
    name = embedding_name(prompt)
    if not storage.exists(name):
        return prompt in needed
    if not checksums or read_embedding(storage, prompt) is not None:
        return False
    move_aside(storage, name)
    return True


def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], storage: Storage, sites: Sequence[Site] = ()
) -> Iterator[str]:
    """Encodes and keeps every prompt, with the layers at `sites`; yields each when it is kept."""
    for kept in _embedded(encoders, prompts, partial(_keep, storage), sites):
        yield from kept


def embed_prompts(encoders: TextEncoders, prompts: Sequence[str]) -> list[EmbeddedPrompt]:
    """Embeds prompts without a storage: the same bits as those that `encode_prompts` keeps."""
    return [embedded for chunk in _embedded(encoders, prompts, lambda _, embedded: embedded) for embedded in chunk]


def read_embedding(storage: Storage, prompt: str) -> EmbeddedPrompt | None:
    """The kept embedding; None where there is none, or its file is broken."""
    try:
        tensors = safetensors.torch.load(storage.read(embedding_name(prompt)))
        parts = [tensors.pop(name) for name in ("txt", "y", "used_txt")]
        digest = tensors.pop("sha256")
        layers = {site: tensors[str(site)] for site in sorted(map(Site.parse, tensors))}
        intact = torch.equal(digest, _digest(*parts, *layers.values()))
    except (FileNotFoundError, KeyError, safetensors.SafetensorError):
        return None
    txt, y, used_txt = parts
    return EmbeddedPrompt(TextEmbedding(txt, y), int(used_txt), layers) if intact else None


def read_used_txt(storage: Storage, prompt: str) -> int | None:
    """How many text tokens of a kept embedding are the prompt's, without reading the rest; None where it is broken."""
    try:
        with safetensors.safe_open(storage.local(embedding_name(prompt)), framework="pt") as file:
            return int(file.get_tensor("used_txt"))
    except (FileNotFoundError, safetensors.SafetensorError):
        return None


def embedding_content(embedded: EmbeddedPrompt) -> bytes:
    """The file of an embedded prompt: it has the same size for every prompt."""
    (txt, y), used_txt = embedded.text, torch.tensor(embedded.used_txt)
    digest = _digest(txt, y, used_txt, *(embedded.layers[site] for site in sorted(embedded.layers)))
    tensors = {"txt": txt, "y": y, "used_txt": used_txt, "sha256": digest}
    tensors |= {str(site): layer for site, layer in embedded.layers.items()}
    return safetensors.torch.save(tensors)


class _LayerOutputs(local):
    """The outputs of this thread's prompts at every layer: threads share the networks, and so their hooks."""

    def __init__(self) -> None:
        self.layers: dict[Site, Tensor] = {}

    def write_text(self, site: Site, value: Tensor) -> None:
        self.layers[site] = value.cpu()


def _embedded(
    encoders: TextEncoders,
    prompts: Sequence[str],
    then: Callable[[Sequence[str], list[EmbeddedPrompt]], Made],
    sites: Sequence[Site] = (),
) -> Iterator[Made]:
    """Embeds all prompts, a chunk at a time; yields what `then(prompts of the chunk, their embeddings)` returns.

    In order; on a CPU a chunk is one prompt, and `then` runs in the thread that embedded it. A T5 that is streamed
    takes its prompts one by one inside each block, in one thread: they have the same bits, and its weights come once.
    """
    if not prompts:
        return
    outputs = _LayerOutputs()
    with TextRecorder(encoders, sites, outputs):
        if _device(encoders).type != "cpu":
            for start in range(0, len(prompts), CHUNK):
                chunk = prompts[start : start + CHUNK]
                yield then(chunk, _embed_chunk(encoders, chunk, outputs, fill_to=CHUNK))
            return

        def embed(chunk: Sequence[str]) -> Made:
            return then(chunk, _embed_chunk(encoders, chunk, outputs))

        size, threads = (CHUNK, 1) if encoders.t5.streamed else (1, torch.get_num_threads())
        chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        yield from in_order(embed, chunks, threads, torch_threads=1)


def _embed_chunk(
    encoders: TextEncoders, prompts: Sequence[str], outputs: _LayerOutputs, *, fill_to: int = 1
) -> list[EmbeddedPrompt]:
    filled = [*prompts, *[""] * (fill_to - len(prompts))]
    txt, y = (part.cpu() for part in encode(encoders.t5, encoders.clip, filled))
    return [
        EmbeddedPrompt(
            TextEmbedding(txt[i : i + 1].clone(), y[i : i + 1].clone()),
            used_tokens(encoders, prompt),
            {site: layer[i : i + 1].clone() for site, layer in outputs.layers.items()},
        )
        for i, prompt in enumerate(prompts)
    ]


def used_tokens(encoders: TextEncoders, prompt: str) -> int:
    """How many of T5's tokens are the prompt's, with its end mark: the rest is padding."""
    return encoders.t5.tokenizer.used(prompt, encoders.t5.max_tokens)


def _keep(storage: Storage, prompts: Sequence[str], embedded: Sequence[EmbeddedPrompt]) -> Sequence[str]:
    for prompt, one in zip(prompts, embedded, strict=True):
        storage.publish(embedding_content(one), embedding_name(prompt))
    return prompts


def _digest(*tensors: Tensor) -> Tensor:
    """A checksum that lies beside the tensors: by it a broken file is recognised."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _device(encoders: TextEncoders) -> torch.device:
    return next(encoders.t5.parameters()).device
