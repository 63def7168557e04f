"""What every backend offers. Backends are siblings: none imports another."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fused_attn.attention.inputs import Gradients, Inputs, Saved, Wanted
from fused_attn.attention.problem import AttentionProblem


class Backend(Protocol):
    """The tensors are those of `Inputs`, query, key and value with any strides."""

    name: str
    #: True if `forward` is differentiable PyTorch code. Then torch finds the gradients, and `backward` is not called.
    is_composite: bool

    def __hash__(self) -> int: ...

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why this backend cannot run the problem; empty when it can."""

    def forward(self, problem: AttentionProblem, inputs: Inputs, needs_lse: bool) -> tuple[Tensor, Tensor | None]:
        """(out (B, H, L, Dv) of the query's dtype, lse (B, H, L) of the accumulate dtype, or None if not needed)."""

    def backward(self, problem: AttentionProblem, inputs: Inputs, saved: Saved, wanted: Wanted) -> Gradients: ...


def clear_rows(lse: Tensor | None, *tensors: Tensor | None) -> None:
    """What a row that no packed sequence owns is to hold, since no kernel visits it: 0, and -inf in lse.

    All rows are written, because only the offsets say which ones have no owner, and to read those the host would have
    to wait for a GPU.
    """
    if lse is not None:
        lse.fill_(float("-inf"))
    for x in tensors:
        if x is not None:
            x.zero_()
