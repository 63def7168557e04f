"""Inputs of any batch rank, as SDPA takes them, to the (B, heads, rows, columns) of the backends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.attention import checks


class Layout(NamedTuple):
    """How inputs of any batch rank become (B, heads, rows, columns), and the outputs back again."""

    batch_shape: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    has_heads: bool

    @classmethod
    def of(cls, query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool) -> Layout:
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
        return math.prod(self.batch_shape)

    def fits(self, query: torch.Size, key: torch.Size, value: torch.Size) -> bool:
        """True if the tensors have the shape (B, heads, rows, columns) already."""
        expected = (*self.batch_shape, self.num_heads), *((*self.batch_shape, self.num_kv_heads),) * 2
        return len(self.batch_shape) == 1 and expected == (query[:-2], key[:-2], value[:-2])

    def flatten(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._flat(query, self.num_heads),
            self._flat(key, self.num_kv_heads),
            self._flat(value, self.num_kv_heads),
        )

    def _flat(self, x: Tensor, heads: int) -> Tensor:
        return x.expand(*self.batch_shape, heads, *x.shape[-2:]).reshape(self.batch, heads, *x.shape[-2:])

    def unflatten(self, out: Tensor) -> Tensor:
        return out.reshape(*self._lead, *out.shape[-2:])

    def unflatten_lse(self, lse: Tensor) -> Tensor:
        return lse.reshape(*self._lead, lse.shape[-1])

    @property
    def _lead(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.num_heads) if self.has_heads else ()
