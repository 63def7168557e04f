"""The dropout of attention weights outside of the fused kernel, for callers that want to see the weights.

The weights that survive are those that the kernels keep. On a CPU, a native kernel draws the random numbers. In plain
PyTorch, they take several times as long as the attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, empty, get_num_threads, is_grad_enabled  # not torch.empty: see `modes`

from fused_attn import modes
from fused_attn.attention import dropout
from fused_attn.attention.masks import Positions
from fused_attn.backends import events
from fused_attn.native import _C
from fused_attn.nn.element_dropout import is_readable


def drop_weights(weights: Tensor, seed: Tensor, p: float) -> Tensor:
    """The weights times 1 / (1 - p) where a call of `fused_attention` with this seed keeps them, and else times 0.

    weights: (B, H, L, S), all weights of the call
    seed: 0-d int64
    p: the dropout_p of the call, rounded as `dropout.threshold` says
    """
    if modes.is_dynamo_compiling() or not is_readable(weights) or weights.numel() == 0:
        return weights * _survivors(weights.shape, seed, p) * dropout.scale(p)
    return _apply(weights, seed, p) if is_grad_enabled() and weights.requires_grad else _run_kernel(weights, seed, p)


def _survivors(shape: torch.Size, seed: Tensor, p: float) -> Tensor:
    """(B, H, L, S) bool: which weights survive. In plain PyTorch."""
    batch, num_heads, *lengths = shape
    indices = (torch.arange(length, device=seed.device) for length in lengths)
    queries, keys = (Positions(index, torch.zeros_like(index)) for index in indices)
    return dropout.keep_mask(seed, p, batch, num_heads, queries, keys)


def _run_kernel(weights: Tensor, seed: Tensor, p: float) -> Tensor:
    weights = weights.contiguous()
    out = empty(weights.shape, dtype=weights.dtype)
    events.recorded_if_profiling("weights_dropout[cpu]", _C.weights_dropout)(weights, out, seed, p, get_num_threads())
    return out


class _WeightsDropout(torch.autograd.Function):
    """``apply(weights, seed, p)`` is `drop_weights` with a gradient, which may be differentiated in its turn."""

    @staticmethod
    def forward(ctx, weights: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return _run_kernel(weights, seed, p)

    @staticmethod
    def backward(ctx, dout: Tensor):
        (seed,) = ctx.saved_tensors
        return drop_weights(dout, seed, ctx.p), None, None


#: `_WeightsDropout.apply` without the code that torch runs for `torch.func`, see `derivatives.autograd`.
_apply = super(torch.autograd.Function, _WeightsDropout).apply
