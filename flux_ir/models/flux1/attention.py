"""Attention with rotary positions: how text and image tokens look at each other. Next: `blocks`."""

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from flux_ir.shapes import Heads, PositionIds, Rotation, Tokens

AttentionWord = Literal["auto", "flash", "efficient", "cudnn", "math"]
"""Which of PyTorch's kernels computes attention; auto: the one that PyTorch chooses by device, dtype and shape."""


def rotary_table(ids: PositionIds, axes_dim: Sequence[int], theta: float) -> Rotation:
    """Rotations of rotary position embedding (Su et al., 2021) as complex numbers e^(i angle), per pair of channels.

    `axes_dim[i]` channels of every head turn with `ids[..., i]`. Two float32 each, whatever the network's dtype: bf16
    angles would merge neighbouring positions.
    """
    angles = torch.cat([_angles(ids[..., i], dim, theta) for i, dim in enumerate(axes_dim)], dim=-1)
    return torch.complex(angles.cos().float(), angles.sin().float())[:, None]


def _angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    # float64 as in the reference: theta ** x in float32 is off in the last digits and the golden tensors show it.
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return positions.double()[..., None] * (1.0 / theta**exponent)


def rotate(x: Heads, rotation: Rotation) -> Heads:
    """Turn each pair of channels of `x` by its position's angle; float32 inside, the dtype of `x` outside."""
    if torch.compiler.is_compiling():  # compilers generate no code for complex numbers
        return _rotate_real(x, rotation)
    # One complex product: on a CPU several times faster than sines and cosines apart, and the same to the bit.
    pairs = torch.view_as_complex(rearrange(x.float(), "b heads n (d pair) -> b heads n d pair", pair=2))
    turned = torch.view_as_real(pairs * rotation)
    return rearrange(turned, "b heads n d pair -> b heads n (d pair)").to(x.dtype)


def _rotate_real(x: Heads, rotation: Rotation) -> Heads:
    cos, sin = torch.view_as_real(rotation).unbind(dim=-1)
    first, second = rearrange(x.float(), "b heads n (d pair) -> pair b heads n d", pair=2)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rearrange(turned, "b heads n d pair -> b heads n (d pair)").to(x.dtype)


class Rotate(nn.Module):
    """`rotate` as a module: its output is the site of a block's queries, or of its keys."""

    def forward(self, x: Heads, rotation: Rotation) -> Heads:
        return rotate(x, rotation)


class Kernel(nn.Module):
    """softmax(q k / sqrt(head width)) v, by the kernel of this name; auto: the one that PyTorch chooses.

    A module of its own so that one that also gives the softmax's log-sum-exp can stand in its place for a while.
    """

    def __init__(self, name: AttentionWord = "auto") -> None:
        super().__init__()
        self.name: AttentionWord = name

    def forward(self, q: Heads, k: Heads, v: Heads) -> Heads:
        return attend(q, k, v, self.name)


class Attention(nn.Module):
    """Scaled dot-product attention over rotated queries and keys, heads joined again; no mask: padding is attended.

    It has no weights. A module of its own so that whoever hangs hooks on it sees queries, keys, values and the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.kernel = Rotate(), Rotate(), Kernel()

    def forward(self, q: Heads, k: Heads, v: Heads, rotation: Rotation) -> Tokens:
        out = self.kernel(self.queries(q, rotation), self.keys(k, rotation), v)
        return rearrange(out, "b heads n d -> b n (heads d)")


# ---- The kernels


def attend(q: Heads, k: Heads, v: Heads, kernel: AttentionWord) -> Heads:
    """Attention by one kernel, with the bits that `torch.nn.functional.scaled_dot_product_attention` has with it.

    The operators are called by name: PyTorch's own switch (`sdpa_kernel`) is one for the whole process, and threads
    that compute side by side would turn it for each other.
    """
    ops = torch.ops.aten
    match kernel:
        case "auto":
            return F.scaled_dot_product_attention(q, k, v)
        case "flash" if q.device.type == "cpu":
            results = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        case "flash":
            results = ops._scaled_dot_product_flash_attention(q, k, v)
        case "efficient" | "cudnn":
            # A backward pass needs the logarithms of the sums.
            needs_sums = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
            results = getattr(ops, f"_scaled_dot_product_{kernel}_attention")(q, k, v, None, needs_sums)
        case "math":
            results = ops._scaled_dot_product_attention_math(q, k, v)
    out: Tensor = results[0]
    return out


def attention_kernels(heads: int, head_dim: int, device: torch.device | str, dtype: torch.dtype) -> list[AttentionWord]:
    """The kernels that compute on a device with heads of this width, beside auto: each is tried on a few tokens."""
    q = torch.zeros(1, heads, 64, head_dim, device=device, dtype=dtype)
    return [word for word in get_args(AttentionWord) if word != "auto" and _computes(q, word)]


def _computes(q: Heads, kernel: AttentionWord) -> bool:
    try:
        attend(q, q, q, kernel)
    except RuntimeError:  # what PyTorch raises for a device, a dtype or a width that a kernel does not have
        return False
    return True


def attention_backend(
    heads: int, head_dim: int, device: torch.device | str, dtype: torch.dtype, kernel: AttentionWord = "auto"
) -> str:
    """The kernel that `Attention` computes with: flash_attention, efficient_attention, cudnn_attention or math.

    Which one auto is depends on the device, the dtype, the head's width and PyTorch's version, and the bits depend on
    it.
    """
    if kernel != "auto":
        return kernel if kernel == "math" else f"{kernel}_attention"
    q = torch.empty(1, heads, 512, head_dim, device=device, dtype=dtype)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


Network = TypeVar("Network", bound=nn.Module)


def use_kernel(network: Network, kernel: AttentionWord) -> Network:
    """Have all `Attention` of a network computed by this kernel; returns the network."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.kernel.name = kernel
    return network


def kernel_of(network: nn.Module) -> AttentionWord:
    """The kernel that a network's `Attention` is computed by."""
    return next((module.kernel.name for module in network.modules() if isinstance(module, Attention)), "auto")


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale: normalised in float32, cast back, then scaled (eps 1e-6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Heads) -> Heads:
        x32 = x.float()
        inverse_rms = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + 1e-6)
        return (x32 * inverse_rms).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """Separate RMS norms for queries and keys (Dehghani et al., 2023), so that attention logits stay bounded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Heads, k: Heads, v: Heads) -> tuple[Heads, Heads]:
        """Normalised queries and keys in the dtype of `v` (a float32 scale would lift bf16 queries to float32)."""
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class SelfAttention(nn.Module):
    """The attention weights of one stream of a double block. It has no forward: both streams attend together."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, proj_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def queries_keys_values(self, x: Tokens) -> tuple[Heads, Heads, Heads]:
        """Normalised queries and keys, and values, of one stream's tokens."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.num_heads)
        q, k = self.norm(q, k, v)
        return q, k, v
