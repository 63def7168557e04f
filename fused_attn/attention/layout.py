"""Reshapes inputs of any batch rank, which SDPA accepts, to the (B, heads, rows, columns) of the backends, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.attention import checks


class Layout(NamedTuple):
    """How inputs of any batch rank become (B, heads, rows, columns), and how outputs get the rank of the inputs.

    batch_shape: the dimensions before the heads, after broadcasting
    num_heads, num_kv_heads: H and Hkv, after broadcasting
    has_heads: one of the inputs has a dimension for heads, that is, three or more dimensions
    """

    batch_shape: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    has_heads: bool

    @classmethod
    def of(cls, query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool) -> Layout:
        """The layout of inputs with these shapes, (..., heads, rows, columns) each.

        Raises:
            ValueError: the batch dimensions do not broadcast, or the numbers of heads do not fit.
        """
        leads = [shape[:-2] for shape in (query, key, value)]
        try:
            batch_shape = tuple(torch.broadcast_shapes(*(lead[:-1] for lead in leads)))
        except RuntimeError:
            shapes = ", ".join(str(tuple(shape)) for shape in (query, key, value))
            raise checks.fail("query, key, value", "batch dimensions that broadcast", f"shapes {shapes}") from None
        of_query, of_key, of_value = (lead[-1] if lead else 1 for lead in leads)
        num_heads = checks.check_heads(of_query, of_key, of_value, enable_gqa)
        return cls(batch_shape, num_heads, of_key if enable_gqa else num_heads, any(leads))

    @property
    def batch(self) -> int:
        """B, the product of the batch dimensions."""
        return math.prod(self.batch_shape)

    def fits(self, query: torch.Size, key: torch.Size, value: torch.Size) -> bool:
        """True if the tensors have the shape (B, heads, rows, columns) already."""
        expected = (*self.batch_shape, self.num_heads), *((*self.batch_shape, self.num_kv_heads),) * 2
        return len(self.batch_shape) == 1 and expected == (query[:-2], key[:-2], value[:-2])

    def flatten(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as (B, H, L, D), (B, Hkv, S, D) and (B, Hkv, S, Dv)."""
        return (
            self._flat(query, self.num_heads),
            self._flat(key, self.num_kv_heads),
            self._flat(value, self.num_kv_heads),
        )

    def _flat(self, x: Tensor, heads: int) -> Tensor:
        """x (..., rows, columns) as (B, heads, rows, columns), broadcast where needed."""
        return x.expand(*self.batch_shape, heads, *x.shape[-2:]).reshape(self.batch, heads, *x.shape[-2:])

    def unflatten(self, out: Tensor) -> Tensor:
        """out (B, H, L, Dv) with the dimensions of the inputs, (..., L, Dv)."""
        return out.reshape(*self._lead, *out.shape[-2:])

    def unflatten_lse(self, lse: Tensor) -> Tensor:
        """lse (B, H, L) with the dimensions of the inputs, (..., L)."""
        return lse.reshape(*self._lead, lse.shape[-1])

    @property
    def _lead(self) -> tuple[int, ...]:
        """The dimensions of the output before its rows."""
        return (*self.batch_shape, self.num_heads) if self.has_heads else ()
