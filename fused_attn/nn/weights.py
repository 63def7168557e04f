"""The attention weights, computed from the log-sum-exp, because the fused kernel never forms weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.attention import formula
from fused_attn.nn.weights_dropout import drop_weights


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    relative_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The weights by which `fused_attention` multiplied the values, dropout included. The weights are differentiable.

    >>> import torch
    >>> from fused_attn import fused_attention
    >>> from fused_attn.nn.weights import attention_weights
    >>> query, key, value = (torch.randn(2, 8, 10, 64) for _ in range(3))
    >>> out, lse = fused_attention(query, key, value, scale=0.125, return_lse=True)
    >>> weights = attention_weights(query, key, lse, scale=0.125)
    >>> torch.testing.assert_close(weights @ value, out)

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        lse: (B, H, L), from ``fused_attention(..., return_lse=True)``.
        scale: the `scale` of that call.
        attn_mask: the `attn_mask` of that call, broadcastable to (B, H, L, S). Causal masks and ranges of keys are
            given as a tensor, too.
        key_padding_mask: the `key_padding_mask` of that call, (B, S).
        relative_bias: the `relative_bias` of that call, (H, L + S - 1) or (L + S - 1,).
        dropout_p: the `dropout_p` of that call.
        dropout_seed: the `dropout_seed` of that call, a 0-d int64 tensor, if dropout_p is positive.

    Returns:
        (B, H, L, S), of the dtype of lse. A row that sees no key is zero.
    """
    _, num_heads, seqlen_q, _ = query.shape
    seqlen_k, device = key.shape[2], query.device
    is_padding = None
    if key_padding_mask is not None:
        is_padding = key_padding_mask
        if key_padding_mask.is_floating_point():
            is_padding = key_padding_mask == float("-inf")
        # Ignored keys may hold NaN, and 0 * NaN is NaN.
        key = key.masked_fill(is_padding[:, None, :, None], 0.0)
    if key.shape[1] != num_heads:
        key = key.repeat_interleave(num_heads // key.shape[1], dim=1)

    rows, columns = (torch.arange(n, device=device) for n in (seqlen_q, seqlen_k))
    distance = columns - rows[:, None]  # (L, S)
    with formula.without_autocast(device):  # as the kernel, whose scores have full precision
        scores = (query.to(lse.dtype) * scale) @ key.to(lse.dtype).transpose(-2, -1)
    if relative_bias is not None:
        scores = scores + relative_bias[..., distance + (seqlen_q - 1)]
    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        scores = scores + key_padding_mask[:, None, None, :]
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + attn_mask
    elif attn_mask is not None:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    if is_padding is not None:
        scores = scores.masked_fill(is_padding[:, None, None, :], float("-inf"))

    # A row that sees no key has lse -inf, and -inf - -inf is NaN. With lse 0 in its place the row is exp(-inf) = 0.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    if dropout_p:
        assert dropout_seed is not None, "dropout_p needs the seed that forward has drawn"
        return drop_weights(weights, dropout_seed, dropout_p)
    return weights
