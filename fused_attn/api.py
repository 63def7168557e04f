"""`fused_attention` and `fused_attention_varlen`: check, normalise, choose, run."""

from __future__ import annotations

import functools
import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_attn import checks, dispatch, dropout, jagged, masks, modes, ops, profiling, signature, transforms
from fused_attn.autograd import apply_fused_attention
from fused_attn.backends import reference
from fused_attn.backends.base import Backend
from fused_attn.checks import Meta
from fused_attn.layout import Layout
from fused_attn.masks import NO_MASK, CausalBiasMeta, MaskSpec
from fused_attn.problem import AttentionProblem


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled-dot-product attention, ``softmax(scale * query @ key^T + masks) @ value``, in one fused kernel.

    The first eight arguments are those of `torch.nn.functional.scaled_dot_product_attention`, with the same meaning.

    Args:
        query: (B, H, L, D). Any batch rank: (L, D), (H, L, D) and (..., H, L, D) work too.
        key: (B, H, S, D), or (B, Hkv, S, D) with ``enable_gqa``.
        value: (B, H, S, Dv), or (B, Hkv, S, Dv) with ``enable_gqa``.
        attn_mask: broadcastable to (B, H, L, S). Bool: True = attend. Floating point: added to the scores, and
            differentiable. A ``torch.nn.attention.bias`` causal bias is accepted and costs no memory.
        dropout_p: probability, in [0, 1], of dropping a weight after the softmax. Applied whenever positive.
        is_causal: query i sees the keys j <= i (upper-left alignment). Combines with every other mask by AND.
        scale: factor of the scores; default ``1 / sqrt(D)``.
        enable_gqa: query head h reads key/value head ``h // (H / Hkv)``.
        key_padding_mask: (B, S). Bool: True = IGNORE the key (as in `torch.nn.MultiheadAttention`). Floating point:
            added to the scores; -inf ignores the key. Ignored keys and values may hold NaN.
        window_size: (left, right), how many keys before and after its diagonal a query sees; -1 = unbounded.
        softcap: scores become ``softcap * tanh(score / softcap)`` before masks and bias; 0 = off.
        relative_bias: (H, L + S - 1) or (L + S - 1,). Column ``j - i + L - 1`` is added to score (i, j).
            Differentiable; `t5_relative_bias` and `alibi_bias` build it.
        sinks: (H,), a logit per head that joins the softmax denominator only. Differentiable.
        dropout_seed: int or 0-d int64 tensor that fixes the dropout pattern on every backend; default: drawn from
            torch's default generator.
        return_lse: also return the log-sum-exp of the scores.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; default: the first that can run, the
            reference last. A named one runs or raises with its reasons; `explain` tells them all.

    Query, key and value may be nested tensors (B, H, length, D) with ``layout=torch.jagged``. They need no padding mask
    and take no `attn_mask`; each sequence is attended to by itself, as in `fused_attention_varlen`, and `relative_bias`
    has the longest ones for L and S.

    Returns:
        out (B, H, L, Dv), whose memory order follows the query; with ``return_lse`` also lse (B, H, L), natural
        logarithm, float32 (float64 for float64 inputs), differentiable. A row that sees no key has out 0, lse -inf and
        gradients 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or modes.is_any_autocast_enabled():
        query, key, value = _autocast(query, key, value)
    metadata = None
    if not is_compiling and modes.is_direct():
        metadata = signature.read(query, key, value, attn_mask, key_padding_mask, relative_bias, sinks)
    if metadata is None and not is_compiling:
        others = (attn_mask, key_padding_mask, relative_bias, sinks, dropout_seed)
        if attn_mask is not None and masks.causal_bias(attn_mask) is not None:
            others = others[1:]  # a subclass that has nothing to say about us, and would make the output another
        if has_torch_function_variadic(query, key, value, *others) and not modes.is_pre_dispatch():
            return handle_torch_function(
                fused_attention, (query, key, value, *others),
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                key_padding_mask=key_padding_mask, window_size=window_size, softcap=softcap,
                relative_bias=relative_bias, sinks=sinks, dropout_seed=dropout_seed, return_lse=return_lse,
                backend=backend,
            )  # fmt: skip
    if metadata is None and jagged.is_nested(query, key, value):
        return _nested_attention(
            query, key, value, dropout_p, is_causal, scale, enable_gqa,
            attn_mask=attn_mask, key_padding_mask=key_padding_mask, window_size=window_size, softcap=softcap,
            relative_bias=relative_bias, sinks=sinks, dropout_seed=dropout_seed, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    problem, layout, chosen = _plan_of_call(
        is_compiling, metadata, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_padding_mask, window_size, softcap, relative_bias, sinks, backend,
    )  # fmt: skip
    if layout is not None:
        query, key, value = layout.flatten(query, key, value)
    if problem.is_plain:
        seed, mask = None, NO_MASK
    else:
        seed = _seed(problem, dropout_seed)
        mask = masks.mask_spec(problem, attn_mask, key_padding_mask, relative_bias, layout)
    if is_compiling:
        out, lse = ops.call(problem, backend, query, key, value, sinks, seed, mask)
    else:
        out, lse = _run(problem, chosen, metadata is not None, query, key, value, sinks, seed, mask, return_lse)
    if layout is not None:
        out, lse = layout.unflatten(out), None if lse is None else layout.unflatten_lse(lse)
    return (out, lse) if return_lse else out


def fused_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences: no padding is stored and no sequence sees another.

    Arguments that `fused_attention` also has mean the same, per sequence: positions, the causal diagonal (upper-left),
    the window, relative distances and dropout positions count from each sequence's own first row.

    Args:
        query: (total_q, H, D), the rows of all sequences one after the other.
        key: (total_k, H, D), or (total_k, Hkv, D) with ``enable_gqa``.
        value: (total_k, H, Dv), or (total_k, Hkv, Dv) with ``enable_gqa``.
        cu_seqlens_q: (num_sequences + 1,) int32; sequence n holds the query rows cu_seqlens_q[n] : cu_seqlens_q[n + 1].
        cu_seqlens_k: (num_sequences + 1,) int32, likewise for keys and values.
        max_seqlen_q: at least the longest query sequence.
        max_seqlen_k: at least the longest key sequence.
        relative_bias: (H, max_seqlen_q + max_seqlen_k - 1) or that without H; column ``j - i + max_seqlen_q - 1``.

    Returns:
        out (total_q, H, Dv); with ``return_lse`` also lse (H, total_q). Rows that no sequence owns, such as those
        behind ``cu_seqlens[-1]``, have out 0, lse -inf and gradients 0 where the offsets are not checked.

    Raises:
        TypeError, ValueError: an argument does not fit. The contents of cu_seqlens are checked on the CPU only, because
            reading them from a GPU would stall it.
    """
    is_compiling = torch.compiler.is_compiling()
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, relative_bias, sinks, dropout_seed)
    if not is_compiling and has_torch_function_variadic(*tensors) and not modes.is_pre_dispatch():
        return handle_torch_function(
            fused_attention_varlen, tensors,
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, is_causal, scale, enable_gqa,
            window_size=window_size, softcap=softcap, relative_bias=relative_bias, sinks=sinks,
            dropout_seed=dropout_seed, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if is_compiling or modes.is_any_autocast_enabled():
        query, key, value = _autocast(query, key, value)
    problem = _plan_of_packed(
        is_compiling,
        checks.meta("query", query),
        checks.meta("key", key),
        checks.meta("value", value),
        checks.meta("cu_seqlens_q", cu_seqlens_q),
        checks.meta("cu_seqlens_k", cu_seqlens_k),
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        tuple(window_size) if isinstance(window_size, list) else window_size,
        softcap,
        checks.optional_meta("relative_bias", relative_bias),
        checks.optional_meta("sinks", sinks),
    )
    if modes.can_read(cu_seqlens_q) and modes.can_read(cu_seqlens_k):
        checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
        checks.check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    mask = MaskSpec(
        relative_bias=masks.with_head_dim(relative_bias),
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
    )
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # (1, heads, total, D)
    seed = _seed(problem, dropout_seed)
    if is_compiling:
        out, lse = ops.call(problem, backend, query, key, value, sinks, seed, mask)
    else:
        chosen = dispatch.choose(problem, backend)
        out, lse = _run(problem, chosen, False, query, key, value, sinks, seed, mask, return_lse)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def _nested_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    attn_mask: None,
    key_padding_mask: None,
    return_lse: bool,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_attention` of nested tensors (B, heads, length, D): out (B, H, length, Dv), lse (B, H, length)."""
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None:
            raise checks.fail(name, "None with nested tensors, whose sequences have no padding", "a mask")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, Tensor) and x.dim() != 4:
            raise checks.fail(name, "a nested tensor (B, heads, length, head dim)", f"{x.dim()} dimensions")
    q, k, v = (jagged.pack(name, x, 2) for name, x in (("query", query), ("key", key), ("value", value)))
    if value.shape[2] != key.shape[2]:
        raise checks.fail("value", "the offsets of key, the same tensor", "others")
    out = fused_attention_varlen(
        q.rows, k.rows, v.rows, q.offsets.int(), k.offsets.int(), q.max_seqlen, k.max_seqlen,
        dropout_p, is_causal, scale, enable_gqa, return_lse=return_lse, **options,
    )  # fmt: skip
    if not return_lse:
        return q.like(out).transpose(1, 2)
    out, lse = out
    return q.like(out).transpose(1, 2), q.like(lse.transpose(0, 1)).transpose(1, 2)


def explain(
    *args, backend: str | None = None, device: torch.device | str | int | None = None, **kwargs
) -> dispatch.Explanation:
    """Which backend `fused_attention` would choose for these arguments, and why not the others. Computes nothing.

    Args:
        device: as if the tensors were there, with an int or ``"cuda:0"`` for a GPU of this machine; also an NVIDIA
            architecture such as ``"sm_90"``, for a GPU that is not here.

    Raises:
        TypeError, ValueError: as `fused_attention`; or for nested tensors, whose problem depends on their offsets; or
            device is none, or the number of a GPU that is not here.

    >>> print(explain(query, key, value, is_causal=True, device="sm_90"))
    """
    call = inspect.signature(fused_attention).bind(*args, **kwargs)
    call.apply_defaults()
    arguments = call.arguments
    if jagged.is_nested(*call.args[:3]):
        raise checks.fail("query, key and value", "dense tensors for explain", "nested ones")
    for name in ("dropout_seed", "return_lse", "backend"):
        del arguments[name]
    arguments["query"], arguments["key"], arguments["value"] = _autocast(*call.args[:3])
    # As under compilation, with no backend chosen yet.
    problem = _plan_of_call(True, None, **arguments, backend=None).problem
    return dispatch.explain(problem if device is None else problem.on(device), backend)


class Plan(NamedTuple):
    """What a call's metadata determines.

    layout: None when the tensors already are (B, heads, rows, columns)
    backend: None under compilation, where the operator chooses when it runs
    """

    problem: AttentionProblem
    layout: Layout | None
    backend: Backend | None


def _plan_of_call(
    is_compiling: bool,
    metadata: bytes | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    window_size: tuple[int, int] | None,
    softcap: float,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    backend: str | None,
) -> Plan:
    """metadata: the `signature` of the tensors, where it could be read."""
    try:
        causal_bias = None
        if metadata is None:
            causal_bias = None if attn_mask is None else masks.causal_bias(attn_mask)
            if not (query.layout is key.layout is value.layout is torch.strided):
                raise TypeError("sparse")  # whose, is said below
            metadata = (
                (query.shape, query.dtype, query.device),
                (key.shape, key.dtype, key.device),
                (value.shape, value.dtype, value.device),
                None if attn_mask is None or causal_bias is not None else checks.meta("attn_mask", attn_mask),
                None if key_padding_mask is None else checks.meta("key_padding_mask", key_padding_mask),
                None if relative_bias is None else checks.meta("relative_bias", relative_bias),
                None if sinks is None else checks.meta("sinks", sinks),
            )
        window_size = tuple(window_size) if isinstance(window_size, list) else window_size
        arguments = (backend, metadata, causal_bias, dropout_p, is_causal, scale, enable_gqa, window_size, softcap)
        # Sizes under compilation are symbolic: not hashable, and traced once anyway.
        return _plan(*arguments) if is_compiling else _cached_plan(*arguments)
    except (AttributeError, RuntimeError, TypeError) as error:
        # Only now, because asking every time would cost as much as finding the plan.
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.meta(name, x)
        if "unhashable" not in str(error):
            raise
        plan = _plan(*arguments)  # raises, and says which argument it is, unless sizes are symbolic as in `make_fx`
        return plan._replace(backend=dispatch.choose.__wrapped__(plan.problem, backend))


def _plan(backend: str | None, tensors: bytes | tuple[tuple | None, ...], *options) -> Plan:
    """tensors: query, key, value, attn_mask, key_padding_mask, relative_bias, sinks, as `Meta` or as `signature`."""
    tensors = signature.metas(tensors) if isinstance(tensors, bytes) else tensors
    inputs, others = [Meta(*x) for x in tensors[:3]], tensors[3:]
    try:
        return _checked_plan(backend, *inputs, *others, *options)
    except ValueError as error:
        swapped = checks.with_heads_and_rows_swapped(*inputs)
        if swapped is None:
            raise
        try:
            _checked_plan(backend, *swapped, *others, *options)
        except (TypeError, ValueError):
            raise error from None
        raise ValueError(
            f"{error}; these shapes would fit as (B, L, H, D), which x.transpose(-3, -2) makes (B, H, L, D)"
        ) from None


def _checked_plan(
    backend: str | None,
    query: Meta,
    key: Meta,
    value: Meta,
    attn_mask: Meta | None,
    key_padding_mask: Meta | None,
    relative_bias: Meta | None,
    sinks: Meta | None,
    causal_bias: CausalBiasMeta | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window_size: tuple[int, int] | None,
    softcap: float,
) -> Plan:
    if backend is not None and backend not in dispatch.BACKEND_NAMES:
        raise checks.fail("backend", f"None or one of {dispatch.BACKEND_NAMES}", repr(backend))
    checks.check_query_key_value(query, key, value, min_dim=2)
    checks.check_scalars(dropout_p, is_causal, scale, enable_gqa, softcap)
    window_size = checks.check_window(window_size)
    if value.shape[-2] != key.shape[-2]:
        raise checks.fail("value", f"the length of key, {key.shape[-2]}", f"shape {tuple(value.shape)}")

    layout = Layout.of(query.shape, key.shape, value.shape, enable_gqa)
    (seqlen_q, head_dim), (seqlen_k, value_dim) = query.shape[-2:], value.shape[-2:]
    diagonal_offset = 0
    if causal_bias is not None:
        checks.check_causal_bias(causal_bias, is_causal, seqlen_q, seqlen_k)
        is_causal, diagonal_offset = True, causal_bias.offset
    if attn_mask is not None:
        checks.check_attn_mask(attn_mask, query, (*layout.batch_shape, layout.num_heads, seqlen_q, seqlen_k))
    if key_padding_mask is not None:
        checks.check_padding(key_padding_mask, query, layout.batch_shape, seqlen_k)
    if relative_bias is not None:
        checks.check_relative_bias(relative_bias, query, layout.num_heads, max(seqlen_q + seqlen_k - 1, 0))
    if sinks is not None:
        checks.check_sinks(sinks, query, layout.num_heads)
    is_additive = attn_mask is not None and attn_mask.dtype != torch.bool
    problem = AttentionProblem(
        batch=layout.batch,
        num_heads=layout.num_heads,
        num_kv_heads=layout.num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=query.dtype,
        device=query.device,
        scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        band=masks.band_of(is_causal, window_size, diagonal_offset),
        has_mask=attn_mask is not None and not is_additive,
        has_key_padding=key_padding_mask is not None,
        has_bias=is_additive,
        has_relative_bias=relative_bias is not None,
        has_sinks=sinks is not None,
        has_float_padding=key_padding_mask is not None and key_padding_mask.dtype != torch.bool,
    )
    return Plan(problem, None if layout.fits(query.shape, key.shape, value.shape) else layout, None)


def _varlen_plan(
    query: Meta,
    key: Meta,
    value: Meta,
    cu_seqlens_q: Meta,
    cu_seqlens_k: Meta,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window_size: tuple[int, int] | None,
    softcap: float,
    relative_bias: Meta | None,
    sinks: Meta | None,
) -> AttentionProblem:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 3:
            raise checks.fail(name, "shape (total, heads, head dim)", f"shape {tuple(x.shape)}")
    checks.check_query_key_value(query, key, value, min_dim=3)
    checks.check_scalars(dropout_p, is_causal, scale, enable_gqa, softcap)
    window_size = checks.check_window(window_size)
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query)
    checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise checks.fail(
            "cu_seqlens_k", f"the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}", tuple(cu_seqlens_k.shape)
        )
    if value.shape[:2] != key.shape[:2]:
        raise checks.fail("value", f"the rows and heads of key, {tuple(key.shape[:2])}", f"shape {tuple(value.shape)}")
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    checks.check_heads(num_heads, num_kv_heads, num_kv_heads, enable_gqa)
    if relative_bias is not None:
        checks.check_relative_bias(relative_bias, query, num_heads, max(max_seqlen_q + max_seqlen_k - 1, 0))
    if sinks is not None:
        checks.check_sinks(sinks, query, num_heads)
    return AttentionProblem(
        batch=cu_seqlens_q.shape[0] - 1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlen_q=max_seqlen_q,
        seqlen_k=max_seqlen_k,
        head_dim=query.shape[2],
        value_dim=value.shape[2],
        dtype=query.dtype,
        device=query.device,
        scale=1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale),
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        band=masks.band_of(is_causal, window_size),
        is_packed=True,
        has_relative_bias=relative_bias is not None,
        has_sinks=sinks is not None,
    )


# Padded batches bring many lengths; a plan is a few hundred bytes.
_cached_varlen_plan = functools.lru_cache(maxsize=4096, typed=True)(_varlen_plan)


def _plan_of_packed(is_compiling: bool, *arguments) -> AttentionProblem:
    if is_compiling:
        return _varlen_plan(*arguments)
    try:
        return _cached_varlen_plan(*arguments)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _varlen_plan(*arguments)  # symbolic sizes, or an argument that this call names


# Typed, or is_causal=1 would pass as the True that has been checked before.
@functools.lru_cache(maxsize=4096, typed=True)
def _cached_plan(backend: str | None, *arguments) -> Plan:
    plan = _plan(backend, *arguments)
    return plan._replace(backend=dispatch.choose(plan.problem, backend))


def _run(
    problem: AttentionProblem,
    backend: Backend,
    is_direct: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    mask: MaskSpec,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse); lse may be None where it was not asked for.

    is_direct: the tensors are plain ones and `modes.is_direct`.
    """
    if profiler._is_profiler_enabled:
        backend = profiling.named(backend)
    if backend.is_composite:
        return backend.forward(problem, query, key, value, sinks, seed, mask, True)
    if not is_direct:
        if modes.in_forward_mode():
            return reference.forward(problem, query, key, value, sinks, seed, mask, True)
        if modes.in_functorch():
            return transforms.TransformableAttention.apply(backend, problem, query, key, value, sinks, seed, *mask)
        if modes.is_observed(query, key, value):
            return ops.call(problem, backend.name, query, key, value, sinks, seed, mask)
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (not problem.is_plain and _requires_grad(mask.bias, mask.relative_bias, sinks))
    ):
        others = () if problem.is_plain else (sinks, seed, *mask)
        result = apply_fused_attention((backend, problem, return_lse), query, key, value, *others)
        return result if return_lse else (result, None)
    return backend.forward(problem, query, key, value, sinks, seed, mask, return_lse)


def _requires_grad(bias: Tensor | None, relative_bias: Tensor | None, sinks: Tensor | None) -> bool:
    return (
        (bias is not None and bias.requires_grad)
        or (relative_bias is not None and relative_bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )


def _seed(problem: AttentionProblem, dropout_seed: int | Tensor | None) -> Tensor | None:
    if not problem.dropout_p:
        return None
    if dropout_seed is None:
        return dropout.draw_seed(problem.device)
    return checks.check_dropout_seed(dropout_seed, problem.device)


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, what autocast does to the inputs of SDPA: floats but float64 take its dtype."""
    if not (isinstance(query, Tensor) and torch.is_autocast_enabled(query.device.type)):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (query, key, value)
    )
