"""Attention in parts: for a sequence whose keys, or queries, do not lie in one place.

`attention_partial` computes the attention of some queries to some keys, `merge` joins the results of several key
parts, and `attention_partial_backward` computes the gradients of one part from the merged result. Offsets say where the
part lies in the whole attention, so that all parts together hide, bias and drop the same entries as one call would.

>>> import torch
>>> from fused_attn import fused_attention
>>> from fused_attn.partial import attention_partial, merge
>>> query, key, value = torch.randn(3, 1, 2, 8, 16).unbind()
>>> parts = [
...     attention_partial(query, k, v, key_offset=offset, is_causal=True)
...     for k, v, offset in zip(key.split(4, 2), value.split(4, 2), (0, 4))
... ]
>>> out, lse = merge(*zip(*parts))
>>> torch.testing.assert_close(out, fused_attention(query, key, value, is_causal=True))
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fused_attn import modes, planning, running
from fused_attn.attention import checks, formula, masks
from fused_attn.attention.inputs import Gradients, Inputs, Results, Saved, Wanted
from fused_attn.attention.problem import NO_ORIGIN, AttentionProblem, DropoutOrigin
from fused_attn.backends import dispatch, events
from fused_attn.derivatives import ops


@dataclass(frozen=True, kw_only=True)
class PartialOptions:
    """The options of a part. Those without a comment have the meaning that they have in `fused_attention`."""

    query_offset: int = 0  # the position of the first query in the whole sequence of queries
    key_offset: int = 0  # the position of the first key in the whole sequence of keys
    batch_offset: int = 0  # the number of the first batch entry, which dropout counts
    head_offset: int = 0  # the number of the first query head, which dropout counts
    #: The queries of the whole attention. Column ``j - i + seqlen_q - 1`` of relative_bias is added to score (i, j).
    #: Default: as many queries as keys.
    seqlen_q: int | None = None
    attn_mask: Tensor | None = None  # broadcastable to (B, H, L, S) of this part
    dropout_p: float = 0.0
    dropout_seed: int | Tensor | None = None  # required with dropout_p, because all parts need the same seed
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    key_padding_mask: Tensor | None = None  # (B, S) of this part
    window_size: tuple[int, int] | None = None
    softcap: float = 0.0
    relative_bias: Tensor | None = None  # of the whole attention
    num_splits: int | None = None
    backend: str | None = None

    @classmethod
    def of(cls, function: str, given: dict) -> PartialOptions:
        """The options that a caller has given by name. function: the name of the called function, for the error."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise TypeError(f"{function}: expected options among {', '.join(known)}, got {', '.join(unknown)}")
        return cls(**given)


def attention_partial(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The attention of these queries to these keys alone, in the form that `merge` takes. Differentiable.

    Args:
        query: (B, H, L, D), the queries from position ``query_offset`` on.
        key: (B, Hkv, S, D), the keys from position ``key_offset`` on.
        value: (B, Hkv, S, Dv).
        options: see `PartialOptions`. Sinks are no option: `join_sinks` adds them once, after `merge`.

    Returns:
        out (B, H, L, Dv), float32 (float64 for float64 inputs); lse (B, H, L) of the same dtype, natural logarithm. The
        kernel rounds the out of a part to the dtype of the query, once. A row that sees none of these keys has out 0
        and lse -inf.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    out, lse = attend(query, key, value, PartialOptions.of("attention_partial", options))
    return out.to(lse.dtype), lse


def attend(
    query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_partial` with an out of the query's dtype. Sinks are right only if all keys are here."""
    out, lse, _ = results(query, key, value, options, sinks, return_max=False)
    assert lse is not None, "it was asked for"
    return out, lse


def results(
    query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, sinks: Tensor | None, return_max: bool
) -> Results:
    """All results of a part, out of the query's dtype. See `attend`."""
    problem, inputs, _ = _planned(query, key, value, options, sinks)
    if torch.compiler.is_compiling():
        return ops.call(problem, options.backend, inputs, return_max)
    backend = dispatch.choose(problem, options.backend)
    return running.run(problem, backend, modes.is_direct(), inputs, return_lse=True, return_max=return_max)


def attention_partial_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    into: Gradients | None = None,
    **options,
) -> Gradients:
    """The gradients that one part of the keys contributes, without autograd.

    The probs of the part follow from the lse of the whole row, so every part gets the merged out and lse, after
    `join_sinks` if there are sinks. The sum of the contributions of all parts is the gradient.

    Args:
        dout: (B, H, L, Dv), the gradient of the merged out.
        query: (B, H, L, D), as in `attention_partial`; likewise key, value and options.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        out: (B, H, L, Dv), the merged out.
        lse: (B, H, L), the merged lse.
        dlse: (B, H, L), the gradient of the merged lse; None = zero.
        into: gradients of the types that this function returns. The contributions are added to these tensors, in place.
            Where there is None, the contribution is returned and not added.
        options: see `PartialOptions`.

    Returns:
        `Gradients` query, key, value and, with a relative bias or a floating-point attn_mask or key_padding_mask,
        relative_bias (the gradient of the whole one), bias and key_bias. All are float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    chosen = PartialOptions.of("attention_partial_backward", options)
    problem, inputs, columns = _planned(query, key, value, chosen)
    backend = dispatch.choose(problem, chosen.backend)
    for name, x, shape in (
        ("dout", dout, (*query.shape[:3], problem.value_dim)),
        ("out", out, (*query.shape[:3], problem.value_dim)),
        ("lse", lse, query.shape[:3]),
        ("dlse", dlse, query.shape[:3]),
    ):
        if x is not None and tuple(x.shape) != tuple(shape):
            raise checks.fail(name, f"shape {tuple(shape)}", f"shape {tuple(x.shape)}")
    saved = Saved(out=out.to(query.dtype), lse=lse.to(problem.accumulate_dtype), dout=dout.to(query.dtype), dlse=dlse)
    wanted = Wanted(
        query=True,
        key=True,
        value=True,
        bias=problem.has_bias,
        key_bias=inputs.key_bias is not None,
        relative_bias=problem.has_relative_bias,
    )
    with torch.no_grad():
        # The reference backend computes out and lse again, which would be those of this part alone.
        backward = formula.backward_from_saved if backend.is_composite else events.named(backend).backward
        found = backward(problem, inputs, saved, wanted)
        found = Gradients(*(None if x is None else x.to(problem.accumulate_dtype) for x in found))
        if chosen.relative_bias is not None:
            assert found.relative_bias is not None, "it was wanted"
            whole = found.relative_bias.new_zeros(chosen.relative_bias.shape)
            whole[..., columns] = found.relative_bias.reshape(whole[..., columns].shape)
            found = found._replace(relative_bias=whole)
        if into is None:
            return found
        return Gradients(
            *(x if sum_ is None or x is None else sum_.add_(x) for x, sum_ in zip(found, into, strict=True))
        )


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins the parts of the same queries over different keys. Differentiable.

    Each part weighs exp(lse of the part - lse of the whole row).

    Args:
        outs: (B, H, L, Dv) of each part.
        lses: (B, H, L) of each part; -inf for rows that saw no key of the part.

    Returns:
        out (B, H, L, Dv) and lse (B, H, L) of the whole. A row that saw no key in any part has out 0 and lse -inf.

    Raises:
        ValueError: there are no parts, or as many outs as lses were expected.
    """
    if not outs or len(outs) != len(lses):
        raise checks.fail("lses", f"one for each of the outs, and at least one; there are {len(outs)} outs", len(lses))
    each = torch.stack(tuple(lses))  # (parts, B, H, L)
    row_max = each.detach().amax(0)
    is_empty = row_max == float("-inf")
    weights = torch.exp(each - row_max.masked_fill(is_empty, 0.0))
    total = weights.sum(0).masked_fill(is_empty, 1.0)
    lse = (row_max.masked_fill(is_empty, 0.0) + total.log()).masked_fill(is_empty, float("-inf"))
    weights = (weights / total).unsqueeze(-1)
    out = outs[0] * weights[0]
    for other, weight in zip(outs[1:], weights[1:], strict=True):
        out = out + other * weight
    return out, lse


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of a merged attention with the sinks (H,) in the denominator of the softmax. Differentiable.

    A row that saw no key keeps out 0 and lse -inf, as in `fused_attention`.
    """
    is_empty = lse == float("-inf")
    sink = sinks.to(lse.dtype)[:, None]
    joined = torch.logaddexp(lse.masked_fill(is_empty, 0.0), sink)
    weight = torch.exp(lse.masked_fill(is_empty, 0.0) - joined)
    return out * weight.unsqueeze(-1), joined.masked_fill(is_empty, float("-inf"))


def _planned(
    query: Tensor, key: Tensor, value: Tensor, options: PartialOptions, sinks: Tensor | None = None
) -> tuple[AttentionProblem, Inputs, slice]:
    """(the problem, the tensors of the call, the columns of the relative bias that belong to the part)."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise checks.fail(name, "a tensor (B, heads, rows, columns)", getattr(x, "shape", type(x).__name__))
    for name in ("query_offset", "key_offset", "batch_offset", "head_offset"):
        if not isinstance(offset := getattr(options, name), int) or offset < 0:
            raise checks.fail(name, "an int of at least 0", repr(offset))
    seed = None
    if options.dropout_p:
        if options.dropout_seed is None:
            raise checks.fail("dropout_seed", "a seed, which all parts share", "None")
        seed = checks.check_dropout_seed(options.dropout_seed, query.device)
    columns = _columns(query.shape[2], key.shape[2], options)
    relative_bias = None if options.relative_bias is None else options.relative_bias[..., columns]
    tensors = (query, key, value, options.attn_mask, relative_bias, sinks, options.key_padding_mask, None)
    numbers = (
        options.dropout_p, options.is_causal, options.scale, options.enable_gqa, options.window_size, options.softcap,
        options.num_splits,
    )  # fmt: skip
    is_compiling = torch.compiler.is_compiling()
    plan = planning.plan(is_compiling, None, tensors, numbers, options.backend)
    origin = DropoutOrigin(options.batch_offset, options.head_offset, options.query_offset, options.key_offset)
    problem = (_move if is_compiling else _moved)(plan.problem, origin)
    bias, key_bias, mask, key_padding = masks.score_masks(problem, options.attn_mask, options.key_padding_mask, None)
    relative_bias = None if relative_bias is None else masks.with_head_dim(relative_bias)
    inputs = Inputs(
        query,
        key,
        value,
        bias=bias,
        key_bias=key_bias,
        relative_bias=relative_bias,
        sinks=sinks,
        seed=seed,
        mask=mask,
        key_padding=key_padding,
    )
    return problem, inputs, columns


def _columns(seqlen_q: int, seqlen_k: int, options: PartialOptions) -> slice:
    """The columns of the whole relative bias that the scores of a part use. They form the relative bias of the part."""
    if options.relative_bias is None:
        return slice(0)
    count = options.relative_bias.shape[-1]
    whole_q = options.seqlen_q
    if whole_q is None:
        if count % 2 == 0:
            raise checks.fail("seqlen_q", f"an int, as relative_bias has an even number of columns, {count}", "None")
        whole_q = (count + 1) // 2
    # Column 0 of the part belongs to its last query and its first key.
    first = options.key_offset - (options.query_offset + seqlen_q - 1) + whole_q - 1
    last = first + max(seqlen_q + seqlen_k - 1, 0)
    if first < 0 or last > count:
        raise checks.fail(
            "relative_bias", f"the L + S - 1 columns of the whole attention, of which this part uses {first} to {last}",
            f"{count} columns",
        )  # fmt: skip
    return slice(first, last)


def _move(problem: AttentionProblem, origin: DropoutOrigin) -> AttentionProblem:
    """The problem of a part whose first query and key stand at the positions of origin."""
    band = problem.band
    if not band.is_unbounded:
        band = band._replace(offset=band.offset + origin.query - origin.key)
    return replace(problem, band=band, dropout_origin=origin if problem.dropout_p else NO_ORIGIN)


_moved = functools.lru_cache(maxsize=4096)(_move)
