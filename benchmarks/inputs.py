"""The tensors of a case."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import BLOCK, Case

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class Inputs:
    """The random tensors of a case.

    query, key, value, dout: (B, H, L, D), or (total, H, D) if the case is packed. D is `Case.value_dim` for value and
        dout. In causal cases with padding, dout is 0 in the rows of padding, because training takes no loss there.
    bias: (1, H, L, S), or (H, L + S - 1) if the bias is relative, or None
    sinks: (H,), or None. A sink weighs about as much as all keys together, so that an error in it shows.
    dropout_seed: 0-d int64 if the case has dropout, or None
    padding: (B, S) bool, True means padding, or None
    cu_seqlens: (B + 1,) int32 if the case is packed, or None
    """

    def __init__(self, case: Case, device: torch.device | str = "cpu", rows_first: bool = False) -> None:
        """rows_first: the tensors lie in memory as (B, L, H, D), as the projections of a model leave them."""
        self.case, self.device = case, torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(0)
        self._dtype = DTYPES[case.dtype]
        rows, keys = case.seqlen_q, case.seqlen_k

        def heads_of(heads: int, length: int, head_dim: int) -> Tensor:
            if case.is_packed:
                return self._randn(sum(case.lengths), heads, head_dim)
            if rows_first:
                return self._randn(case.batch, length, heads, head_dim).transpose(1, 2)
            return self._randn(case.batch, heads, length, head_dim)

        self.query = heads_of(case.heads, rows, case.head_dim)
        self.dout = heads_of(case.heads, rows, case.value_dim)
        self.key = heads_of(case.kv_heads, keys, case.head_dim)
        self.value = heads_of(case.kv_heads, keys, case.value_dim)
        self.bias = None
        if case.mask == "bias":
            self.bias = self._randn(1, case.heads, rows, keys)
        elif case.mask == "relative-bias":
            self.bias = self._randn(case.heads, rows + keys - 1)
        self.sinks = self._randn(case.heads) + math.log(keys) if case.mask == "sinks" else None
        self.dropout_seed = torch.tensor(7, device=self.device) if case.dropout_p else None
        self.lengths = torch.tensor(case.lengths, device=self.device)
        self.padding = None
        if case.is_padded:
            self.padding = torch.arange(keys, device=self.device) >= self.lengths[:, None]
            if case.is_causal:
                self.dout = self.dout.masked_fill(self.padding[:, None, :, None], 0.0)
        self.cu_seqlens = None
        if case.is_packed:
            self.cu_seqlens = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
        if case.direction != "forward":
            for x in self.leaves.values():
                x.requires_grad_()

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by name."""
        names = "query", "key", "value", "bias", "sinks"
        named = zip(names, (*self.qkv, self.bias, self.sinks), strict=True)
        return {name: x for name, x in named if x is not None}

    def visible(self) -> Tensor:
        """The whole mask, (B or 1, 1, L, S) bool, True means visible. If the case is packed, the causal mask alone."""
        case = self.case
        row = torch.arange(case.seqlen_q, device=self.device)[:, None]
        column = torch.arange(case.seqlen_k, device=self.device)
        visible = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=self.device)
        if case.is_causal:
            visible = column <= row
        if case.window is not None:
            visible = visible & (column > row - case.window)
        if case.mask == "blocks":
            block = torch.zeros(-(-case.length // BLOCK), -(-case.length // BLOCK), dtype=torch.bool)
            block[tuple(zip(*case.visible_blocks, strict=True))] = True
            visible = block.to(self.device)[row // BLOCK, column // BLOCK]
        if case.mask == "shared-question":
            begin, end = self.key_ranges().unbind(-1)  # (L, 2)
            visible = ((column >= begin[..., None]) & (column < end[..., None])).any(1)
        visible = visible[None, None]
        return visible if self.padding is None else visible & ~self.padding[:, None, None, :]

    def key_ranges(self) -> Tensor:
        """The ranges of mask "shared-question", (L, 2, 2) int32: the question, and the token's own answer up to it."""
        starts = torch.tensor(self.case.segment_starts, device=self.device)
        row = torch.arange(self.case.length, device=self.device)
        own = starts[torch.searchsorted(starts, row, right=True) - 1]
        question = own.clamp(max=int(starts[1]) if len(starts) > 1 else self.case.length)
        ranges = [torch.stack([torch.zeros_like(own), question], -1), torch.stack([own, row + 1], -1)]
        return torch.stack(ranges, 1).int()

    def dense_bias(self) -> Tensor:
        """The relative bias as a dense bias (1, H, L, S), which is a leaf of its own for autograd."""
        rows, keys = self.case.seqlen_q, self.case.seqlen_k
        # Row i of the dense bias is the part of the relative one that begins at L - 1 - i, so the order is reversed.
        windows = self.bias.detach().unfold(1, keys, 1)[:, :rows]
        return windows.flip(1)[None].contiguous().requires_grad_(self.bias.requires_grad)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=self._dtype, device=self.device)
