"""The functions `fused_attention`, `fused_attention_varlen`, `fused_attention_paged` and `explain`.

Each call is planned (`planning.py`: arguments are checked, a backend is chosen) and then run (`running.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_attn import modes, planning, running
from fused_attn.attention import checks, dropout, jagged, masks, signature
from fused_attn.attention.causal_bias import causal_bias
from fused_attn.attention.inputs import NO_OTHERS, Inputs, inputs_of
from fused_attn.attention.problem import AttentionProblem
from fused_attn.backends import dispatch


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
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    diagonal_alignment: str = checks.UPPER_LEFT,
    num_splits: int | None = None,
    return_lse: bool = False,
    return_max: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled-dot-product attention, ``softmax(scale * query @ key^T + masks) @ value``, in one fused kernel.

    The first eight arguments are those of `torch.nn.functional.scaled_dot_product_attention`, with the same meaning.

    Args:
        query: (B, H, L, D). Any batch rank: (L, D), (H, L, D) and (..., H, L, D) work too. B in the shapes below is
            the batch shape: a key_padding_mask is (S,) for a query (H, L, D), and key_lengths are ().
        key: (B, H, S, D), or (B, Hkv, S, D) with ``enable_gqa``.
        value: (B, H, S, Dv), or (B, Hkv, S, Dv) with ``enable_gqa``.
        attn_mask: broadcastable to (B, H, L, S). Bool: True = attend. Floating point: added to the scores, and
            differentiable. A causal bias of ``torch.nn.attention.bias`` is accepted and takes no memory.
        dropout_p: the probability, in [0, 1], of dropping a weight after the softmax; rounded to a multiple of
            1 / 65536. Dropout is applied whenever it is positive, because a function knows no training mode.
        is_causal: query i sees the keys j <= i, or as `diagonal_alignment` says. Combines with every other mask by AND.
        scale: factor of the scores; default ``1 / sqrt(D)``.
        enable_gqa: query head h reads key/value head ``h // (H / Hkv)``.
        key_padding_mask: (B, S). Bool: True = IGNORE the key (as in `torch.nn.MultiheadAttention`). Floating point:
            added to the scores, and differentiable; -inf ignores the key. Ignored keys and values may hold NaN.
        key_lengths: (B,) int32 on the device of query. Batch entry b has the keys j < key_lengths[b]. All others are
            ignored and may hold NaN. Combines with every other mask by AND. The host does not read the lengths of a GPU
            tensor, so a CUDA graph can be replayed with others. `relative_bias` does not follow the lengths.
        key_ranges: (..., L, N, 2) int32, broadcastable to (B, H, L) before N. Query i sees key j only if
            ``key_ranges[..., i, n, 0] <= j < key_ranges[..., i, n, 1]`` for one of its N ranges. One range for each
            query is (L, 1, 2): N is never left out. Combines with every other mask by AND. A range may be empty,
            overlap others, or reach outside of the keys. A document mask, a prefix LM or answers that share a question
            need no (L, S) tensor then. docs/masks.md has examples. `key_ranges_of` converts a mask, and
            `key_ranges_of_segments` makes the ranges of packed documents.
        window_size: (left, right), how many keys before and after its diagonal a query sees; -1 = unbounded.
        softcap: scores become ``softcap * tanh(score / softcap)`` before masks and bias; 0 = off.
        relative_bias: (H, L + S - 1) or (L + S - 1,). Column ``j - i + L - 1`` is added to score (i, j).
            Differentiable; `t5_relative_bias` and `alibi_bias` build it.
        sinks: (H,), a logit per head that joins the softmax denominator only. Differentiable.
        dropout_seed: int or 0-d int64 tensor that fixes the dropout pattern on every backend; default: drawn from
            torch's default generator.
        diagonal_alignment: where the diagonal of `is_causal` and `window_size` lies if L != S. ``"upper_left"``: query
            i stands at key i, as in torch. ``"lower_right"``: query i stands at key ``S - L + i``, so the last query
            stands at the last key, as in flash_attn. With `key_lengths`, the diagonal ends at the last key of each
            entry: S is then ``key_lengths[b]``. ``causal_lower_right(L, S)`` as `attn_mask` stands for this alignment,
            of the window, too, and ``is_causal=True``. `relative_bias` and dropout count from the first row and the
            first key.
        num_splits: into how many parts the keys are cut for a kernel that computes few queries with many keys, 1 to
            256. The parts are equal shares of the keys of each batch entry. So no bit of out and lse depends on the
            other entries of the batch. The default follows from the shapes of the whole batch. Where a number is
            given, the keys of more than 128 queries are not cut on a GPU, and packed queries are cut only if they are
            so few that the kernels for decoding run.
        return_lse: also return the log-sum-exp of the scores.
        return_max: also return the largest score of each row. On an NVIDIA GPU, this can make the forward pass slower.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; default: the first that can run, the
            reference last. A backend that is named here runs, or the call raises ValueError with the reasons why it
            cannot. `explain` lists the reasons of all backends. Second derivatives and forward-mode differentiation
            run the reference, whatever is named.

    Query, key and value may be nested tensors (B, H, length, D) with ``layout=torch.jagged``. Masks are refused then,
    because such sequences have no padding. No sequence sees another one, as in `fused_attention_varlen`. The L and S of
    `relative_bias` are the longest lengths. Key and value have equal lengths. If they do not share one offsets tensor,
    each call compares the lengths, for which a GPU waits; compiled code cannot compare them, and raises ValueError.

    Returns:
        out (B, H, L, Dv), whose memory order follows the query; or a tuple of out and what is asked for, in this order:

        - with ``return_lse``, lse (B, H, L), natural logarithm, float32 (float64 for float64 inputs), differentiable;
        - with ``return_max``, max (B, H, L), in the dtype of lse, without gradient: the largest score of the visible
          keys, as the score enters the softmax, after scale, softcap and biases. Sinks and dropout take no part.
          QK-clip (Kimi K2, arXiv 2507.20534) watches this number; see docs/numerics.md.

        A row that sees no key has out 0, lse -inf, max -inf and gradients 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came. The
            contents of key_lengths are checked on the CPU only. Elsewhere, a length counts as the nearest in [0, S].
    """
    can_be_direct = modes.is_direct()
    is_compiling = not can_be_direct and torch.compiler.is_compiling()
    if is_compiling or modes.is_any_autocast_enabled():
        query, key, value = modes.autocast(query, key, value)
    call = plan = None
    if can_be_direct:
        call = signature.read(
            query, key, value, attn_mask, relative_bias, sinks, key_padding_mask, key_lengths, key_ranges,
            dropout_p, is_causal, scale, enable_gqa, window_size, softcap, diagonal_alignment, num_splits, backend,
            return_lse, return_max,
        )  # fmt: skip
        plan = planning.dense.by_signature.get(call)
    is_direct = call is not None
    handler = None if is_direct else _handler(
        is_compiling, query, key, value, attn_mask, relative_bias, sinks, key_padding_mask, key_lengths, key_ranges,
        dropout_seed,
    )  # fmt: skip
    if handler is not None:
        return handler(
            query, key, value,
            attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            key_padding_mask=key_padding_mask, key_lengths=key_lengths, key_ranges=key_ranges,
            window_size=window_size, softcap=softcap, relative_bias=relative_bias, sinks=sinks,
            dropout_seed=dropout_seed, diagonal_alignment=diagonal_alignment, num_splits=num_splits,
            return_lse=return_lse, return_max=return_max, backend=backend,
        )  # fmt: skip
    if plan is None:
        checks.check_flags(return_lse=return_lse, return_max=return_max)
        tensors = (query, key, value, attn_mask, relative_bias, sinks, key_padding_mask, key_lengths, key_ranges)
        options = (dropout_p, is_causal, scale, enable_gqa, window_size, softcap, diagonal_alignment, num_splits)
        plan = planning.plan(is_compiling, tensors, options, backend)
        if call is not None:
            planning.dense.store(call, plan)
    problem, layout, chosen = plan
    new_inputs = Inputs if is_compiling else inputs_of
    if layout is not None:
        query, key, value = layout.flatten(query, key, value)
    if problem.is_plain:
        if dropout_seed is not None:
            checks.check_dropout_seed(dropout_seed)
        inputs = new_inputs(query, key, value, *NO_OTHERS)
    else:
        bias, key_bias, mask, key_padding = masks.score_masks(problem, attn_mask, key_padding_mask, layout)
        if relative_bias is not None:
            relative_bias = masks.with_head_dim(relative_bias)
        seed = _seed(problem, dropout_seed) if problem.dropout_p or dropout_seed is not None else None
        if key_ranges is not None:
            key_ranges = masks.ranges_of_scores(key_ranges, layout)
        if key_lengths is not None and layout is not None:
            key_lengths = key_lengths.reshape(problem.batch)
        inputs = new_inputs(
            query, key, value, bias, key_bias, relative_bias, sinks, seed, mask, key_ranges, key_padding,
            key_lengths, None, None, None,
        )  # fmt: skip
    out, lse, row_max = running.run(problem, chosen, backend, is_direct, inputs, return_lse, return_max)
    of_rows: Sequence[Tensor] = _asked_for(lse, row_max, return_lse, return_max) if return_lse or return_max else ()
    if layout is not None:
        out, of_rows = layout.unflatten(out), [layout.unflatten_lse(x) for x in of_rows]
    return (out, *of_rows) if of_rows else out


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
    diagonal_alignment: str = checks.UPPER_LEFT,
    return_lse: bool = False,
    return_max: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over packed sequences: no padding is stored and no sequence sees another.

    The arguments that `fused_attention` has, too, have the same meaning for each sequence. Positions count from the
    first row of the sequence. With ``diagonal_alignment="lower_right"``, the causal diagonal and the window end at the
    last query and the last key of each sequence, as in flash_attn_varlen_func.

    Args:
        query: (total_q, H, D), the rows of all sequences one after the other.
        key: (total_k, H, D), (total_k, Hkv, D) with ``enable_gqa``, or (total_k, 1, D), whose head all queries share.
        value: (total_k, H, Dv), (total_k, Hkv, Dv) or (total_k, 1, Dv), as key.
        cu_seqlens_q: (num_sequences + 1,) int32; sequence n holds the query rows cu_seqlens_q[n] : cu_seqlens_q[n + 1].
        cu_seqlens_k: (num_sequences + 1,) int32, likewise for keys and values.
        max_seqlen_q: at least the longest query sequence.
        max_seqlen_k: at least the longest key sequence.
        relative_bias: (H, max_seqlen_q + max_seqlen_k - 1) or (max_seqlen_q + max_seqlen_k - 1,). Column
            ``j - i + max_seqlen_q - 1`` is added to score (i, j).

    Returns:
        out (total_q, H, Dv); with ``return_lse`` also lse (H, total_q), and with ``return_max`` also max (H, total_q).
        If the offsets are not checked, there may be rows that belong to no sequence, such as rows behind
        ``cu_seqlens[-1]``. These have out 0, lse -inf, max -inf and gradients 0.

    Raises:
        TypeError, ValueError: an argument does not fit. The contents of cu_seqlens are checked on the CPU only, because
            the host would have to wait for a GPU.
    """
    can_be_direct = modes.is_direct()
    is_compiling = not can_be_direct and torch.compiler.is_compiling()
    if is_compiling or modes.is_any_autocast_enabled():
        query, key, value = modes.autocast(query, key, value)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, relative_bias, sinks)
    max_seqlens = (max_seqlen_q, max_seqlen_k)
    options = (dropout_p, is_causal, scale, enable_gqa, window_size, softcap, diagonal_alignment)
    call = signature.read(*tensors, *max_seqlens, *options, backend, return_lse, return_max) if can_be_direct else None
    is_direct = call is not None
    if not is_direct and not is_compiling and _overrides_functions(*tensors, dropout_seed):
        return handle_torch_function(
            fused_attention_varlen, (*tensors, dropout_seed),
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, is_causal, scale, enable_gqa,
            window_size=window_size, softcap=softcap, relative_bias=relative_bias, sinks=sinks,
            dropout_seed=dropout_seed, diagonal_alignment=diagonal_alignment,
            return_lse=return_lse, return_max=return_max, backend=backend,
        )  # fmt: skip
    plan = None if call is None else planning.packed.by_signature.get(call)
    if plan is None:
        checks.check_flags(return_lse=return_lse, return_max=return_max)
        plan = planning.plan_of_packed(is_compiling, tensors, max_seqlens, options, backend)
        if call is not None:
            planning.packed.store(call, plan)
    problem, _, chosen = plan
    # All tensors of a direct call are plain tensors on the CPU: nobody else has a signature.
    if is_direct or (modes.can_read(cu_seqlens_q) and modes.can_read(cu_seqlens_k)):
        checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q)
        checks.check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    relative_bias, seed = masks.with_head_dim(relative_bias), _seed(problem, dropout_seed)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    new_inputs = Inputs if is_compiling else inputs_of
    inputs = new_inputs(
        query, key, value, None, None, relative_bias, sinks, seed, None, None, None, None,
        cu_seqlens_q, cu_seqlens_k, None,
    )  # fmt: skip
    out, lse, row_max = running.run(problem, chosen, backend, is_direct, inputs, return_lse, return_max)
    of_rows = _asked_for(lse, row_max, return_lse, return_max)
    return (out, *of_rows) if of_rows else out


def fused_attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over keys and values that lie in pages, as `PagedKVCache` stores them. For inference only.

    The queries are the last rows of their sequence: query i of batch entry b stands at position
    ``key_lengths[b] - L + i``. The causal mask and the window follow this diagonal. The arguments that
    `fused_attention` has, too, have the same meaning.

    With ``cu_seqlens_q``, each sequence has as many queries as it wants, as when a server computes prompts, parts of
    prompts and single tokens in one call. The queries are packed then, and L is the length of a sequence.

    Args:
        query: (B, H, L, D), or (total_q, H, D) with ``cu_seqlens_q``.
        key_pages: (num_pages, page_size, Hkv, D). Query head h reads head ``h // (H / Hkv)``. Any page size.
        value_pages: (num_pages, page_size, Hkv, Dv).
        block_table: (B, pages of the longest sequence) int32. Key j of batch entry b is row ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Entries may share pages. A number behind the last key is not used.
        key_lengths: (B,) int32, the number of keys of each batch entry, the queries' own keys included.
        key_padding_mask: (B, S) bool, True = IGNORE; S is ``block_table.shape[1] * page_size``. Not with
            ``cu_seqlens_q``.
        num_splits: as in `fused_attention`. With it, no bit of a result depends on the other entries of the batch, for
            the same L or ``max_seqlen_q``.
        cu_seqlens_q: (B + 1,) int32; sequence b has the query rows cu_seqlens_q[b] : cu_seqlens_q[b + 1].
        max_seqlen_q: at least the longest sequence of queries; needed with ``cu_seqlens_q``. On a GPU, the kernels are
            chosen by this number, so a much larger one can be slower.

    Returns:
        out (B, H, L, Dv); with ``return_lse`` also lse (B, H, L). A row that sees no key has out 0 and lse -inf. With
        ``cu_seqlens_q``, they are (total_q, H, Dv) and (H, total_q), and a row that belongs to no sequence has out 0
        and lse -inf, too.

    Raises:
        TypeError, ValueError: an argument does not fit, or a tensor requires a gradient while gradients are recorded.
            The contents of block_table, key_lengths and cu_seqlens_q are checked on the CPU only. Elsewhere, a length
            of keys counts as the nearest in [0, S], and the number of a page as the nearest that exists. The offsets
            must be right there.
    """
    can_be_direct = modes.is_direct()
    is_compiling = not can_be_direct and torch.compiler.is_compiling()
    if is_compiling or modes.is_any_autocast_enabled():
        query, key_pages, value_pages = modes.autocast(query, key_pages, value_pages)
    tensors = (query, key_pages, value_pages, block_table, key_lengths, sinks, key_padding_mask, cu_seqlens_q)
    options = (0.0, is_causal, scale, True, window_size, softcap, checks.LOWER_RIGHT, num_splits)
    call = signature.read(*tensors, max_seqlen_q, *options, backend, return_lse) if can_be_direct else None
    is_direct = call is not None
    if not is_direct and not is_compiling and _overrides_functions(*tensors):
        return handle_torch_function(
            fused_attention_paged, tensors, query, key_pages, value_pages, block_table, key_lengths,
            is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask, window_size=window_size,
            softcap=softcap, sinks=sinks, num_splits=num_splits, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
    plan = None if call is None else planning.paged.by_signature.get(call)
    if plan is None:
        checks.check_flag("return_lse", return_lse)
        plan = planning.plan_of_paged(is_compiling, tensors, max_seqlen_q, options, backend)
        if call is not None:
            planning.paged.store(call, plan)
    problem, _, chosen = plan
    if torch.is_grad_enabled():
        for name, x in (("query", query), ("key_pages", key_pages), ("value_pages", value_pages), ("sinks", sinks)):
            if x is not None and x.requires_grad:
                raise checks.fail(
                    name, "a tensor without gradient, because fused_attention_paged is for inference "
                    "(call it under torch.no_grad())", "one that requires a gradient",
                )  # fmt: skip
    key, value, key_padding = key_pages, value_pages, key_padding_mask
    if cu_seqlens_q is not None:
        if is_direct or modes.can_read(cu_seqlens_q):
            checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, query.shape[0], problem.seqlen_q)
        cu_seqlens_q = cu_seqlens_q.contiguous()
    new_inputs = Inputs if is_compiling else inputs_of
    inputs = new_inputs(
        query, key, value, None, None, None, sinks, None, None, None, key_padding, key_lengths, cu_seqlens_q, None,
        block_table,
    )  # fmt: skip
    out, lse, _ = running.run(problem, chosen, backend, is_direct, inputs, return_lse, False)
    return (out, lse) if return_lse else out  # type: ignore[return-value]  # as in fused_attention


def _asked_for(
    lse: Tensor | None, row_max: Tensor | None, return_lse: bool, return_max: bool
) -> tuple[()] | tuple[Tensor] | tuple[Tensor, Tensor]:
    """The results for each row that the caller asks for. None of these is None."""
    if return_max:
        return (lse, row_max) if return_lse else (row_max,)  # type: ignore[return-value]
    return (lse,) if return_lse else ()  # type: ignore[return-value]


def _handler(is_compiling: bool, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Callable[..., Any] | None:
    """What computes `fused_attention` of tensors that override torch functions, of nested tensors, or of DTensors. None
    for plain tensors. Every call on a GPU asks this.

    others: the other tensors of `fused_attention`
    """
    if not is_compiling and (seen := _with_torch_function(query, key, value, *others)):
        return lambda *args, **kwargs: handle_torch_function(fused_attention, seen, *args, **kwargs)
    if jagged.is_nested(query, key, value):
        return _nested_attention
    if hasattr(query, "device_mesh") or hasattr(key, "device_mesh") or hasattr(value, "device_mesh"):
        # This import takes time, and only a program that has DTensors needs the module.
        from fused_attn import sharded

        return sharded.attention
    return None


def _nested_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, return_max: bool, **others: Any
) -> Tensor | tuple[Tensor, ...]:
    """`fused_attention` of nested tensors (B, heads, length, D): out (B, H, length, Dv), lse and max (B, H, length).

    others: all other arguments of `fused_attention`. Those that `fused_attention_varlen` does not take must be None.
    """
    for name in ("attn_mask", "key_padding_mask", "key_lengths", "key_ranges", "num_splits"):
        given = others.pop(name)
        if given is not None:
            expected = "None with nested tensors, whose sequences have no padding and are not split"
            if isinstance(given, Tensor) and causal_bias(given) is not None:
                expected = "None with nested tensors, for which is_causal and diagonal_alignment say the same"
            raise checks.fail(name, expected, "a tensor" if isinstance(given, Tensor) else given)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, Tensor) and x.dim() != 4:
            raise checks.fail(name, "a nested tensor (B, heads, length, head dim)", f"{x.dim()} dimensions")
    q, k, v = jagged.pack_all(query, key, value, length_dim=2)
    result = fused_attention_varlen(
        q.rows, k.rows, v.rows, q.offsets.int(), k.offsets.int(), q.max_seqlen, k.max_seqlen,
        return_lse=return_lse, return_max=return_max, **others,
    )  # fmt: skip
    if isinstance(result, Tensor):
        return q.like(result).transpose(1, 2)
    out, *of_rows = result
    return q.like(out).transpose(1, 2), *(q.like(x.transpose(0, 1)).transpose(1, 2) for x in of_rows)


def explain(
    *args, backend: str | None = None, device: torch.device | str | int | None = None, **kwargs
) -> dispatch.Explanation:
    """Which backend `fused_attention` would choose for these arguments, and why not the others. Computes nothing.

    The other arguments are those of `fused_attention`.

    Args:
        device: answer as if the tensors were on this device. An int or ``"cuda:0"`` names a GPU of this machine. An
            NVIDIA architecture such as ``"sm_90"`` stands for a GPU that this machine need not have.

    Raises:
        TypeError, ValueError: an argument does not fit, as for `fused_attention`; a tensor is nested, because the
            problem of nested tensors depends on their contents; or there is no such device.

    >>> import torch
    >>> from fused_attn import explain
    >>> query = torch.empty(2, 8, 1024, 128, dtype=torch.bfloat16)
    >>> print(explain(query, query, query, is_causal=True, device="sm_90"))  # doctest: +ELLIPSIS
    B=2 H=8 L=1024 S=1024 D=128 bfloat16 on cuda sm_90 with band(left=-1, right=0, offset=0)
      cpu        the tensors are on cuda, expected cpu
    ...
    """
    call = inspect.signature(fused_attention).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if jagged.is_nested(*call.args[:3]):
        raise checks.fail("query, key and value", "dense tensors for explain", "nested ones")
    checks.check_flags(return_lse=given["return_lse"], return_max=given["return_max"])
    if given["dropout_seed"] is not None:
        checks.check_dropout_seed(given["dropout_seed"])
    query, key, value = modes.autocast(*call.args[:3])
    others = tuple(given[name] for name in planning.Arguments._fields[3:])
    options = tuple(given[name] for name in planning.Options._fields)
    # With is_compiling=True, `plan` chooses no backend. So there is no error if the named backend cannot run.
    problem = planning.plan(True, (query, key, value, *others), options, None).problem
    return dispatch.explain(problem if device is None else problem.on(device), backend)


def _with_torch_function(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *others: Any
) -> tuple | None:
    """The arguments if one of them, or a mode, overrides torch functions (``__torch_function__``); otherwise None."""
    if attn_mask is not None and causal_bias(attn_mask) is not None:
        # torch's class of causal biases overrides only SDPA. In every other function, the class would make the output a
        # causal bias, too.
        attn_mask = None
    seen = (query, key, value, attn_mask, *others)
    return seen if _overrides_functions(*seen) else None


def _overrides_functions(*arguments) -> bool:
    """Whether one of the arguments, or a mode, overrides torch functions, and no tracer wants the operators instead."""
    return has_torch_function_variadic(*arguments) and not modes.is_pre_dispatch()


def _seed(problem: AttentionProblem, dropout_seed: int | Tensor | None) -> Tensor | None:
    """The seed of dropout, a 0-d int64 tensor, drawn if the caller gives none. None without dropout."""
    if dropout_seed is None:
        return dropout.draw_seed(problem.device) if problem.dropout_p else None
    checks.check_dropout_seed(dropout_seed)
    return dropout.seed_tensor(dropout_seed, problem.device) if problem.dropout_p else None
