"""Positions for `FusedMultiheadAttention`: rotary embedding and T5's learnable relative bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_attn.attention import checks
from fused_attn.attention.relative_bias import check_buckets, t5_relative_bias


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., 2021) in the half-split order of GPT-NeoX and Llama.

    Columns i and i + D/2 of a row at position p turn by the angle ``p * base ** (-2 i / D)``. The module has no
    parameters and no buffers. The angles are computed in float32, or in float64 for float64 inputs, whatever dtype the
    model is cast to.

    >>> import torch
    >>> from fused_attn.nn import RotaryEmbedding
    >>> RotaryEmbedding(64)(torch.randn(2, 8, 10, 64)).shape  # (B, H, L, D), rows at positions 0 to 9
    torch.Size([2, 8, 10, 64])

    Args:
        head_dim: D, an even number.
        base: a larger base means slower rotation.

    Raises:
        TypeError: head_dim is no int, or base is no number.
        ValueError: head_dim is odd or negative, or base is not positive and finite.
    """

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        checks.check_integer("head_dim", head_dim)
        checks.check_number("base", base)
        if head_dim < 0 or head_dim % 2:
            raise checks.fail("head_dim", "an even number of columns to rotate in pairs", head_dim)
        if not 0 < base < math.inf:
            raise checks.fail("base", "a positive, finite number", base)
        self.head_dim = head_dim
        self.base = base

    def forward(self, x: Tensor, seq_dim: int = -2, offset: int | Tensor = 0) -> Tensor:
        """Rotates the rows of x by their positions. Row n of dimension `seq_dim` has the position ``offset + n``.

        Args:
            x: (..., D), floating point.
            seq_dim: the dimension of x that counts positions.
            offset: the position of the first row. With a tensor (B,) of integers, each batch entry has its own first
                position. The batch is then the other one of the first two dimensions of x.

        Returns:
            A tensor of the shape and dtype of x.

        Raises:
            TypeError: x is no tensor, or seq_dim is no int.
            ValueError: x does not have D columns or is not floating point, or has no dimension seq_dim before them.
        """
        checks.check_tensor("x", x)
        checks.check_integer("seq_dim", seq_dim)
        if not x.is_floating_point():
            raise checks.fail("x", "a floating-point tensor", x.dtype)
        if x.shape[-1] != self.head_dim:
            raise checks.fail("x", f"head_dim={self.head_dim} columns", f"shape {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not -x.dim() <= seq_dim < x.dim() or seq_dim % x.dim() == x.dim() - 1:
            raise checks.fail("seq_dim", f"a dimension of x before the last one, {tuple(x.shape)}", seq_dim)
        seq_dim %= x.dim()
        exponent = torch.arange(0, self.head_dim, 2, device=x.device, dtype=dtype) / self.head_dim
        if isinstance(offset, Tensor):
            row = torch.arange(x.shape[seq_dim], device=x.device)
            position = (offset + row[:, None] if seq_dim == 0 else offset[:, None] + row).to(dtype)
            sizes = (*x.shape[:2], *(1 for _ in range(x.dim() - 3)))
        else:
            position = torch.arange(offset, offset + x.shape[seq_dim], device=x.device, dtype=dtype)
            sizes = tuple(x.shape[d] if d == seq_dim else 1 for d in range(x.dim() - 1))
        angle = position[..., None] * self.base**-exponent
        angle = angle.view(*sizes, self.head_dim // 2)
        cos, sin = angle.cos(), angle.sin()
        first, second = x.to(dtype).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, for ``print(module)``."""
        return f"head_dim={self.head_dim}, base={self.base}"


class T5RelativeBias(nn.Module):
    """T5's learnable relative position bias, for ``FusedMultiheadAttention(relative_bias=...)``.

    >>> import torch
    >>> from fused_attn import FusedMultiheadAttention
    >>> from fused_attn.nn import T5RelativeBias
    >>> attention = FusedMultiheadAttention(64, 4, batch_first=True, relative_bias=T5RelativeBias(num_heads=4))
    >>> x = torch.randn(2, 10, 64)
    >>> out, _ = attention(x, x, x, need_weights=False)

    Distances share the rows of a table, called buckets. The weight (num_buckets, H) is this table. The weight
    starts at zero, which is attention without positions. T5's own ``relative_attention_bias.weight`` can be loaded.
    One instance may serve all layers, as in T5.

    T5 itself does not scale its scores by ``1 / sqrt(head_dim)``. If you load T5's weights, multiply the weight of the
    query projection by ``sqrt(head_dim)``.

    Args:
        num_buckets: rows of the table. If bidirectional, half of them are for keys after the query.
        num_heads: H.
        bidirectional: True for encoders, False for causal decoders.
        max_distance: all distances from this one on share a bucket.

    Raises:
        TypeError: a number is no int, or bidirectional is no bool.
        ValueError: num_heads is below 1, there are too few buckets, or max_distance is too small for the buckets.
    """

    def __init__(
        self,
        num_buckets: int = 32,
        num_heads: int = 8,
        bidirectional: bool = True,
        max_distance: int = 128,
        device=None,
        dtype=None,
    ):
        super().__init__()
        checks.check_integer("num_buckets", num_buckets)
        checks.check_integer("num_heads", num_heads)
        check_buckets("num_buckets", num_buckets, bidirectional, max_distance)
        if num_heads < 1:
            raise checks.fail("num_heads", "at least 1", num_heads)
        self.num_heads = num_heads
        self.bidirectional = bidirectional
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to zero, which is attention without positions."""
        nn.init.zeros_(self.weight)

    def forward(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """The bias (H, L + S - 1), the `relative_bias` of `fused_attention`.

        Args:
            seqlen_q: L, the number of queries.
            seqlen_k: S, the number of keys.
        """
        return t5_relative_bias(self.weight, seqlen_q, seqlen_k, self.bidirectional, self.max_distance)

    def extra_repr(self) -> str:
        """The arguments, for ``print(module)``."""
        return (
            f"num_buckets={self.weight.shape[0]}, num_heads={self.num_heads}, bidirectional={self.bidirectional}, "
            f"max_distance={self.max_distance}"
        )
