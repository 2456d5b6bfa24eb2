"""ConceptAttention (Helbling et al., ICML 2025): where in the picture any word is, also one the prompt does not have.

Concepts are the first T5 token of words that are encoded alone. They pass the double blocks beside the text, with the
text's weights: they look at the image and at each other, and nothing looks at them, so the picture keeps its bits.
The map of a concept is the dot product of what attention gave it with what attention gave each image token, before the
output projection and without scaling; a softmax over the concepts says whose a token is most. So a map depends on what
else is in the list: it is a choice among these, and no measure of how much of a concept there is.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.flux1.blocks import ModulationOut, modulate
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.recording.hooks import NOT_CALLED, Listener, StepHooks, named
from flux_ir.shapes import Conditioning, Context, Heads
from flux_ir.sites import Site

Scores = Float[Tensor, "batch concepts img"]


def default_blocks(depth: int) -> list[int]:
    """The last fifth of the double blocks, as published for FLUX.1: 15 to 18 of 19."""
    return list(range(depth - max(1, round(depth / 5)), depth))


def concept_maps(scores: Scores) -> Scores:
    """Which concept each image token is most like: softmax over the concepts, of one block at one step."""
    return scores.softmax(dim=1)


class ConceptMapper(StepHooks):
    """Takes concepts through the double blocks of every forward while its `with` lasts, and hands on their scores.

    `concepts` are their embeddings, one token each. `take(step, block, scores)` is called for each of `blocks` (None:
    the last fifth) at each of `steps` (None: all). Weights are used as they are in the block, and no hook of others is
    called. Raises FluxIRError for a model that is compiled.
    """

    name = "concept mapper"

    def __init__(
        self,
        model: Transformer,
        concepts: Context,
        take: Callable[[int, int, Scores], None],
        *,
        blocks: Sequence[int] | None = None,
        steps: Collection[int] | None = None,
        first_step: int = 0,
    ) -> None:
        self.blocks = default_blocks(model.params.depth) if blocks is None else sorted(set(blocks))
        super().__init__(model, [Site("double", n, None, "k") for n in range(self.blocks[-1] + 1)], steps, first_step)
        self.concepts, self.take = concepts, take
        self._keys: Heads | None = None
        self._stream: Tensor | None = None
        self._vec: Conditioning | None = None

    def _hang(self, hooks: ExitStack) -> None:
        super()._hang(hooks)
        for site in self.sites:
            attention = self.model.get_submodule(f"double_blocks.{site.block}.attention")
            for module, take in ((attention.get_submodule("keys"), self._take_keys), (attention, self._take_block)):
                hooks.callback(module.register_forward_hook(Listener(take, site), with_kwargs=True).remove)

    def _check_end(self) -> None:
        super()._check_end()
        if self._to_come:
            raise self._incomplete()

    def _incomplete(self) -> FluxIRError:
        return FluxIRError(f"step {self._step} did not come to {named(self._to_come)}", hint=NOT_CALLED)

    def _begin_step(self, given: dict[str, Any]) -> None:
        # The pooled text of the concepts is zero: of `vector_in` its bias stays.
        y = torch.zeros_like(given["y"])
        if isinstance(self.model, StreamedFlux):  # modulations come before their blocks, and go again
            self._vec = self.model.modulate_ahead([given["timesteps"]], y, given.get("guidance"))[0]
        else:
            self._vec = self.model.conditioning(given["timesteps"], y, given.get("guidance"))
        concepts = self.concepts.to(given["txt"]).expand(given["txt"].shape[0], -1, -1)
        self._stream = self.model.txt_in(concepts)

    def _take_keys(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self._keys = output

    def _take_block(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """One block, once its attention is computed: that of the concepts, and what it makes of their stream."""
        if not self._active:
            return
        assert self._keys is not None
        assert self._stream is not None
        assert self._vec is not None
        img = slice(self._tokens.txt, self._tokens.txt + self._tokens.img)
        k, v = self._keys[:, :, img], args[2][:, :, img]
        block: Any = self.model.get_submodule(f"double_blocks.{site.block}")
        mods = self.model.modulation(replace(site, stream="txt", part=None), self._vec.to(k.device))
        out, self._stream = _through(block, mods, self._stream.to(k.device), k, v)
        self._keys = None
        if site.block in self.blocks:
            self.take(self._step, site.block, out.float() @ output[:, img].float().mT)
        self._to_come.discard(site)


def _through(block: Any, mods: Sequence[ModulationOut], x: Tensor, k: Heads, v: Heads) -> tuple[Tensor, Tensor]:
    """What attention gives the concepts in this block, heads joined, and their stream behind the block.

    As the text's half of the block, but with keys and values of concepts and image. Modules are run by their `forward`,
    which calls no hooks: recorders and edits of the text's sites must not hear the concepts. Concepts stand at position
    0 as text does, so rotation leaves their queries and keys as they are.
    """
    mod1, mod2 = mods
    normed = modulate(block.txt_norm1.forward(x), mod1.shift, mod1.scale)
    q, own_k, own_v = block.txt_attn.queries_keys_values(normed)
    attended = F.scaled_dot_product_attention(q, torch.cat([own_k, k], dim=2), torch.cat([own_v, v], dim=2))
    out = rearrange(attended, "b heads n d -> b n (heads d)")
    x = x + mod1.gate * block.txt_attn.proj.forward(out)
    x = x + mod2.gate * _in_turn(block.txt_mlp, modulate(block.txt_norm2.forward(x), mod2.shift, mod2.scale))
    return out, x


def _in_turn(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer.forward(x)
    return x
