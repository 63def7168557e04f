"""Biases that depend only on the distance between query and key: T5's and ALiBi's, for the argument `relative_bias`.

A bias is (H, L + S - 1). Its column n belongs to the distance j - i = n - (L - 1) between query i and key j.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_attn import modes
from fused_attn.attention import checks


def t5_relative_bias(
    table: Tensor, seqlen_q: int, seqlen_k: int, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """T5's bucketed relative position bias (Raffel et al., 2020, section 2.1), differentiable in the table.

    All distances of a bucket share a row of the table. Half of the buckets hold one distance each. The ranges of the
    other half grow logarithmically with the distance, up to ``max_distance``.

    Args:
        table: (num_buckets, H), the weight of T5's ``relative_attention_bias`` embedding.
        seqlen_q: L.
        seqlen_k: S.
        bidirectional: True = keys after the query have buckets of their own (encoders). False = these keys share
            bucket 0 (causal decoders).
        max_distance: all distances from this one on share a bucket.

    Returns:
        (H, L + S - 1) of the table's dtype; (H, 0) for L = S = 0.

    Raises:
        TypeError: table is no tensor, a number is no int, or bidirectional is no bool.
        ValueError: table has another shape or too few buckets, a length is negative, or max_distance is too small for
            the buckets.
    """
    if has_torch_function_variadic(table, seqlen_q, seqlen_k):
        return handle_torch_function(
            t5_relative_bias, (table, seqlen_q, seqlen_k), table, seqlen_q, seqlen_k, bidirectional, max_distance
        )
    checks.check_tensor("table", table)
    _check_seqlens(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    if table.dim() != 2:
        raise ValueError(f"table: expected shape (num_buckets, H), got {tuple(table.shape)}")
    check_buckets("table", table.shape[0], bidirectional, max_distance)
    distance = _distances(seqlen_q, seqlen_k, table.device)
    num_buckets = table.shape[0]
    first_bucket: Tensor | int = 0
    if bidirectional:
        num_buckets //= 2
        first_bucket = num_buckets * (distance > 0)
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    # The operations stand in the order of T5's own code. Another order would round differently, so distances at the
    # edge of a bucket could move to another bucket.
    octaves = torch.log(distance.clamp(min=1) / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (octaves * (num_buckets - num_exact)).long()
    bucket = torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))
    return table[first_bucket + bucket].t()


def check_buckets(name: str, num_buckets: int, bidirectional: bool, max_distance: int) -> None:
    """Raises TypeError or ValueError unless T5's formula has a bucket for every distance.

    name: the argument that determines num_buckets, for the error message
    """
    checks.check_flag("bidirectional", bidirectional)
    checks.check_integer("max_distance", max_distance)
    least = 4 if bidirectional else 2
    if num_buckets < least:
        raise ValueError(f"{name}: expected at least {least} buckets with {bidirectional=}, got {num_buckets}")
    num_exact = num_buckets // least
    if not max_distance > num_exact:
        raise ValueError(
            f"max_distance: expected more than {num_exact}, the distances with buckets of their own among "
            f"{num_buckets} with {bidirectional=}, got {max_distance}"
        )


def alibi_bias(slopes: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """ALiBi's linear penalty ``-slope * |i - j|`` (Press et al., 2022), differentiable in the slopes.

    The distances count from the upper left. flash_attn counts them from the lower right, as ``|i + S - L - j|``. For
    that, exchange the lengths: ``alibi_bias(slopes, S, L)``.

    Args:
        slopes: (H,).
        seqlen_q: L.
        seqlen_k: S.

    Returns:
        (H, L + S - 1) of the slopes' dtype; (H, 0) for L = S = 0.

    Raises:
        TypeError: slopes is no tensor, or a length is no int.
        ValueError: slopes has another shape or is not floating point, or a length is negative.
    """
    if has_torch_function_variadic(slopes, seqlen_q, seqlen_k):
        return handle_torch_function(alibi_bias, (slopes, seqlen_q, seqlen_k), slopes, seqlen_q, seqlen_k)
    checks.check_tensor("slopes", slopes)
    _check_seqlens(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    if slopes.dim() != 1:
        raise ValueError(f"slopes: expected shape (H,), got {tuple(slopes.shape)}")
    if not slopes.is_floating_point():
        raise checks.fail("slopes", "a floating-point tensor", slopes.dtype)
    return -slopes[:, None] * _distances(seqlen_q, seqlen_k, slopes.device).abs()


def _check_seqlens(**seqlens: int) -> None:
    """Checks lengths, by their names. `torch.jit.trace` makes tensors of them, and its trace holds for all lengths."""
    for name, seqlen in seqlens.items():
        if not (isinstance(seqlen, Tensor) and modes.is_jit_tracing()):
            checks.check_seqlen(name, seqlen)


def _distances(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """(L + S - 1,) integers: the distance j - i that each column of a bias belongs to, from -(L - 1) to S - 1."""
    columns: Any = seqlen_q + seqlen_k - 1
    # The second form is that of the check of relative_bias. torch.export proves that both are the same.
    columns = columns.clamp(min=0) if isinstance(columns, Tensor) else max(columns, 0)
    return torch.arange(columns, device=device) + (1 - seqlen_q)
