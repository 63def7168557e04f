"""The backward kernels. The first computes dq, delta and the gradient of the sinks. The second computes dk and dv.

Both recompute the probs from the LSE. One program sums each entry of a gradient in a fixed order, so the results are
deterministic. For this, both kernels compute the scores and dprobs: 7 matrix products instead of 5.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.scores import (
    LOG2_E,
    biased_scores,
    dropout_keep,
    exp_difference,
    hide,
    score_unit,
)
from fused_attn.backends.triton.sums import add_product, plus_product, zero_sum
from fused_attn.backends.triton.tiles import (
    head_slice_of,
    is_valid_key,
    key_blocks,
    key_pointer,
    load_key_rows,
    load_query_rows,
    num_full_blocks,
    num_partial_blocks,
    partial_block,
    query_blocks,
    query_pointer,
    scheduled_tile,
    store_tile,
)

#: Up to this size, the rounding error of an LSE changes the probs so little that it needs no correction: by a factor of
#: 1 +- 3e-5 for 16-bit inputs, and 1 +- 1e-6 for float32 inputs. Beyond it, `_exact_factor` corrects the probs.
EXACT_LSE = tl.constexpr(512.0)
EXACT_LSE_FLOAT32 = tl.constexpr(16.0)


class QueryTensors(NamedTuple):
    """The tensors from which a kernel loads its blocks of queries.

    q, dout: `Rows`
    lse, delta: (B, H, L) float32
    factor: (B, H, L) float32, or None
    """

    q: tl.tensor
    dout: tl.tensor
    lse: tl.tensor
    delta: tl.tensor
    factor: tl.tensor


class QueryBlock(NamedTuple):
    """What backward needs of a block of queries.

    index: (M,) positions in the sequence
    q: (M, BLOCK_D)
    dout: (M, BLOCK_DV)
    lse: (M,) after `finite_lse`
    delta: (M,)
    factor: (M,), the correction of the probs by `_exact_factor`; 1 if the LSE is exact enough
    """

    index: tl.tensor
    q: tl.tensor
    dout: tl.tensor
    lse: tl.tensor
    delta: tl.tensor
    factor: tl.tensor


class KeyBlock(NamedTuple):
    """What backward needs of a block of keys.

    first: the position of the first key in the sequence
    index: (N,) positions in the sequence
    is_valid: (N,) bool: which keys exist and are no padding
    k: (N, BLOCK_D)
    v: (N, BLOCK_DV)
    """

    first: tl.tensor
    index: tl.tensor
    is_valid: tl.tensor
    k: tl.tensor
    v: tl.tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dq_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    out,  # Rows (B, H, L, Dv)
    dout,  # Rows (B, H, L, Dv)
    dq,  # Rows (B, H, L, D), written; its ptr is None if dq is not wanted
    lse,  # (B, H, L) float32
    dlse,  # (B, H, L) float32 or None
    delta,  # (B, H, L) float32, written: rowsum(dout * out) - dlse
    factor,  # (B, H, L) float32 or None, written: exp(logit - LSE) times this factor is the probability
    dsinks,  # (B, H, blocks of queries) float32 or None, written: the sum over the queries of each block
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    heads_per_l2_group,
):
    """A program owns a block of queries of one head and visits all keys that they may see."""
    # Which rows this program computes.
    num_blocks = tl.cdiv(seqlen_q, settings.BLOCK_M)
    block, head, batch = scheduled_tile(num_blocks, settings.num_heads, heads_per_l2_group, LAST_FIRST=True)
    first_row = block * settings.BLOCK_M
    query = first_row + tl.arange(0, settings.BLOCK_M)
    kv_head = head // settings.group_size
    head_slice = head_slice_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset)
    dsinks_entry = (batch * settings.num_heads + head) * num_blocks + block
    if first_row >= head_slice.seqlen_q:
        if dsinks is not None:
            tl.store(dsinks + dsinks_entry, 0.0)
        return
    is_row = query < head_slice.seqlen_q

    # Compute delta.
    dout_tile = load_query_rows(dout, head_slice, query, is_row, settings.VALUE_DIM, settings.BLOCK_DV)
    out_tile = load_query_rows(out, head_slice, query, is_row, settings.VALUE_DIM, settings.BLOCK_DV)
    row_offset = head_slice.lse_offset + query
    row_lse = tl.load(lse + row_offset, mask=is_row, other=0.0)
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + row_offset, mask=is_row, other=0.0)
    tl.store(delta + row_offset, row_delta, mask=is_row)
    if dsinks is not None:
        sink = tl.load(masks.sinks + head).to(tl.float32)
        # An empty row (LSE -inf) does not depend on its sink: `add_sink` leaves such a row as it is.
        sink_prob = tl.where(is_row & (row_lse != float("-inf")), tl.exp2((sink - row_lse) * LOG2_E), 0.0)
    q_tile = load_query_rows(q, head_slice, query, is_row, settings.HEAD_DIM, settings.BLOCK_D)

    last_row = tl.minimum(first_row + settings.BLOCK_M, head_slice.seqlen_q) - 1
    blocks = key_blocks(first_row, last_row, head_slice, masks, settings)
    row_lse = finite_lse(row_lse, settings)
    row_factor = tl.full([settings.BLOCK_M], 1.0, tl.float32)
    if factor is not None:
        if tl.max(tl.abs(row_lse), 0) > (EXACT_LSE_FLOAT32 if settings.IS_FLOAT32 else EXACT_LSE):
            row_factor = _exact_factor(q_tile, row_lse, query, blocks, k, head_slice, masks, settings)
        tl.store(factor + row_offset, row_factor, mask=is_row)
    if dsinks is not None:
        sink_prob *= row_factor
        tl.store(dsinks + dsinks_entry, -tl.sum(sink_prob * row_delta, 0))
    # Visit the full blocks, which need no tests, then the partial ones.
    if dq.ptr is not None:
        queries = QueryBlock(query, q_tile, dout_tile, row_lse, row_delta, row_factor)
        acc = tl.zeros([settings.BLOCK_M, settings.BLOCK_D], tl.float32)
        for index in tl.range(0, num_full_blocks(blocks, settings.BLOCK_N)):
            first_key = blocks.full_start + index * settings.BLOCK_N
            acc = _add_dq(acc, queries, first_key, k, v, head_slice, masks, settings, IS_FULL=True)
        for index in tl.range(0, num_partial_blocks(blocks, settings.BLOCK_N)):
            first_key = partial_block(blocks, index, settings.BLOCK_N)
            acc = _add_dq(acc, queries, first_key, k, v, head_slice, masks, settings, IS_FULL=False)
        dq_pointer = query_pointer(dq, head_slice, query, settings.BLOCK_D)
        store_tile(dq_pointer, acc * settings.scale, is_row, settings.HEAD_DIM, settings.BLOCK_D)


@triton.jit
def _exact_factor(q_tile, row_lse, query, blocks, k, head_slice, masks, settings):
    """(M,): 1 / sum over the keys (and the sink) of exp(logit - LSE). The sum would be 1 if the LSE were exact.

    A large LSE has a large rounding error. For example, if all keys of a row have a bias of -1e9, the LSE rounds to
    -1e9 for one key as well as for a hundred, whose probs would each become 1 instead of 0.01.
    """
    total = tl.zeros([settings.BLOCK_M], tl.float32)
    for index in range((blocks.end - blocks.start) // settings.BLOCK_N):
        first_key = blocks.start + index * settings.BLOCK_N
        key = first_key + tl.arange(0, settings.BLOCK_N)
        is_valid = is_valid_key(key, head_slice, masks)
        k_tile = load_key_rows(k, head_slice, key, is_valid, settings.HEAD_DIM, settings.BLOCK_D)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=settings.PRECISION)
        scores, _ = biased_scores(qk, query[:, None], key[None, :], head_slice, masks, settings, IS_FULL=False)
        probs = exp_difference(scores, row_lse[:, None], settings)
        probs = hide(
            probs, 0.0, query[:, None], key[None, :], is_valid[None, :], head_slice, masks, settings, IS_FULL=False
        )
        total += tl.sum(probs, 1)
    if masks.sinks is not None:
        total += tl.exp2((tl.load(masks.sinks + head_slice.head).to(tl.float32) - row_lse) * LOG2_E)
    return tl.where(total > 0.0, 1.0 / total, 1.0)


@triton.jit
def _add_dq(acc, queries, first_key, k, v, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """acc, (M, BLOCK_D), plus the part of dq / scale that comes from the block of keys that begins at first_key.

    queries: the `QueryBlock` of acc
    """
    keys = load_keys(k, v, first_key, head_slice, masks, settings, IS_FULL)
    _, _, dscores = probs_and_gradients(queries, keys, head_slice, masks, settings, IS_FULL, IS_TRANSPOSED=False)
    return plus_product(acc, dscores.to(keys.k.dtype), keys.k, settings)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dkdv_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    dout,  # Rows (B, H, L, Dv)
    dk,  # Rows (B, Hkv, S, D), written; its ptr is None if dk is not wanted
    dv,  # Rows (B, Hkv, S, Dv), written; its ptr is None if dv is not wanted
    lse,  # (B, H, L) float32
    delta,  # (B, H, L) float32, from attention_bwd_dq_kernel
    factor,  # (B, H, L) float32 or None, from attention_bwd_dq_kernel
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    heads_per_l2_group,
):
    """A program owns a block of keys of one key head and visits all queries that may see them, of the whole head group.

    The head group are the query heads that share the key head.
    """
    # Which rows this program computes.
    num_blocks = tl.cdiv(seqlen_k, settings.BLOCK_N)
    num_kv_heads = settings.num_heads // settings.group_size
    block, kv_head, batch = scheduled_tile(num_blocks, num_kv_heads, heads_per_l2_group, LAST_FIRST=False)
    first_key = block * settings.BLOCK_N
    first_head = kv_head * settings.group_size
    head_slice = head_slice_of(batch, first_head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset)
    if first_key >= head_slice.seqlen_k:
        return

    # Load.
    keys = load_keys(k, v, first_key, head_slice, masks, settings, IS_FULL=False)
    num_valid = tl.sum(keys.is_valid.to(tl.int32), 0)
    query_tensors = QueryTensors(q, dout, lse, delta, factor)

    # Visit the blocks of queries of all heads. One loop runs over heads and blocks together, because nested loops would
    # need registers for the addresses of both.
    last_key = tl.minimum(first_key + settings.BLOCK_N, head_slice.seqlen_k) - 1
    blocks = query_blocks(first_key, last_key, num_valid == settings.BLOCK_N, head_slice, settings)
    dk_acc = zero_sum([settings.BLOCK_N, settings.BLOCK_D], settings)
    dv_acc = zero_sum([settings.BLOCK_N, settings.BLOCK_DV], settings)
    num_full = num_full_blocks(blocks, settings.BLOCK_M)
    num_partial = num_partial_blocks(blocks, settings.BLOCK_M)
    num_heads = tl.where(num_valid == 0, 0, settings.group_size)
    # The software pipeline computes the addresses of its first loads even if the loop has no step. A divisor of 0 would
    # be an error then.
    full_divisor = tl.maximum(num_full, 1)
    partial_divisor = tl.maximum(num_partial, 1)
    for step in tl.range(0, num_full * num_heads):
        head = first_head + step // full_divisor
        first_row = blocks.full_start + step % full_divisor * settings.BLOCK_M
        head_slice = head_slice_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset)
        dk_acc, dv_acc = _add_dkdv(
            dk_acc, dv_acc, keys, query_tensors, first_row, head_slice, masks, settings, IS_FULL=True
        )
    for step in tl.range(0, num_partial * num_heads):
        head = first_head + step // partial_divisor
        first_row = partial_block(blocks, step % partial_divisor, settings.BLOCK_M)
        head_slice = head_slice_of(batch, head, kv_head, masks, settings, seqlen_q, seqlen_k, lse_stride, band_offset)
        dk_acc, dv_acc = _add_dkdv(
            dk_acc, dv_acc, keys, query_tensors, first_row, head_slice, masks, settings, IS_FULL=False
        )

    # Store. `is_row` includes padding, whose gradients are 0.
    is_row = keys.index < head_slice.seqlen_k
    if dk.ptr is not None:
        dk_pointer = key_pointer(dk, head_slice, keys.index, settings.BLOCK_D)
        store_tile(dk_pointer, dk_acc.total * settings.scale, is_row, settings.HEAD_DIM, settings.BLOCK_D)
    if dv.ptr is not None:
        dv_pointer = key_pointer(dv, head_slice, keys.index, settings.BLOCK_DV)
        store_tile(dv_pointer, dv_acc.total, is_row, settings.VALUE_DIM, settings.BLOCK_DV)


@triton.jit
def _add_dkdv(dk_acc, dv_acc, keys, query_tensors, first_row, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """(dk_acc, dv_acc) plus the parts of dk / scale and dv that come from the block of queries at first_row.

    Scores are computed as (keys, queries) here. So probs and dscores are left factors of the products for dv and dk
    without a transposition.
    dk_acc, dv_acc: `Sum` of (N, BLOCK_D) and (N, BLOCK_DV)
    keys: the `KeyBlock` of both
    query_tensors: `QueryTensors`
    """
    query = first_row + tl.arange(0, settings.BLOCK_M)
    is_row = None if IS_FULL else query < head_slice.seqlen_q
    queries = load_queries(query_tensors, query, is_row, head_slice, masks, settings)
    probs, _, dscores = probs_and_gradients(queries, keys, head_slice, masks, settings, IS_FULL, IS_TRANSPOSED=True)
    dv_acc = add_product(dv_acc, probs.to(queries.dout.dtype), queries.dout, settings)
    dk_acc = add_product(dk_acc, dscores.to(queries.q.dtype), queries.q, settings)
    return dk_acc, dv_acc


@triton.jit
def load_queries(query_tensors, query, is_row, head_slice, masks, settings):
    """The `QueryBlock` of the positions `query`, (M,), loaded from `QueryTensors`.

    is_row: which of these queries exist, or None if all do. The others have finite probs, which count as gradients of 0

    No result is None: Triton 3.6 cannot return None in a tuple.
    """
    q_tile = load_query_rows(query_tensors.q, head_slice, query, is_row, settings.HEAD_DIM, settings.BLOCK_D)
    dout_tile = load_query_rows(query_tensors.dout, head_slice, query, is_row, settings.VALUE_DIM, settings.BLOCK_DV)
    offset = head_slice.lse_offset + query
    row_lse = finite_lse(_load_vector(query_tensors.lse + offset, is_row), settings)
    if masks.key_bias is not None and is_row is not None:
        # A bias of a key is added to the scores of queries that do not exist, too. Its exponential may be infinite.
        row_lse = tl.where(is_row, row_lse, float("inf"))
    row_delta = _load_vector(query_tensors.delta + offset, is_row)
    if query_tensors.factor is not None:
        row_factor = _load_vector(query_tensors.factor + offset, is_row)
    else:
        row_factor = tl.full([settings.BLOCK_M], 1.0, tl.float32)
    return QueryBlock(query, q_tile, dout_tile, row_lse, row_delta, row_factor)


@triton.jit
def load_keys(k, v, first_key, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """The `KeyBlock` that begins at first_key. IS_FULL: all its keys exist and none is padding."""
    key = first_key + tl.arange(0, settings.BLOCK_N)
    is_valid = key >= 0 if IS_FULL else is_valid_key(key, head_slice, masks)
    is_loaded = None if IS_FULL else is_valid
    k_tile = load_key_rows(k, head_slice, key, is_loaded, settings.HEAD_DIM, settings.BLOCK_D)
    v_tile = load_key_rows(v, head_slice, key, is_loaded, settings.VALUE_DIM, settings.BLOCK_DV)
    return KeyBlock(first_key, key, is_valid, k_tile, v_tile)


@triton.jit
def _load_vector(pointer, is_row):
    """The numbers at `pointer`, 0 where is_row is false; is_row may be None, which means that all rows exist."""
    if is_row is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=is_row, other=0.0)


@triton.jit
def finite_lse(row_lse, settings):
    """The LSE divided by `score_unit`, as the scores are. An empty row gets 0 instead of -inf.

    0 avoids NaN from -inf - -inf. It does not change the gradients, because `hide` sets all probs of an empty row to 0.
    """
    return tl.where(row_lse == float("-inf"), 0.0, row_lse) / score_unit(settings)


@triton.jit
def probs_and_gradients(queries, keys, head_slice, masks, settings, IS_FULL: tl.constexpr, IS_TRANSPOSED: tl.constexpr):
    """(probs after dropout, gradient of the logits, gradient of scale * query @ key^T) of a tile.

    The last two differ by the derivative of the softcap alone.
    queries: a `QueryBlock`
    keys: a `KeyBlock`
    IS_TRANSPOSED: tiles are (keys, queries), else (queries, keys)
    """
    if IS_TRANSPOSED:
        qk = tl.dot(keys.k, tl.trans(queries.q), input_precision=settings.PRECISION)
        dprobs = tl.dot(keys.v, tl.trans(queries.dout), input_precision=settings.PRECISION)
    else:
        qk = tl.dot(queries.q, tl.trans(keys.k), input_precision=settings.PRECISION)
        dprobs = tl.dot(queries.dout, tl.trans(keys.v), input_precision=settings.PRECISION)
    # What a tile has once for each query is broadcast along the keys, and the other way round.
    QUERY_AXIS: tl.constexpr = 1 if IS_TRANSPOSED else 0
    KEY_AXIS: tl.constexpr = 1 - QUERY_AXIS
    query = tl.expand_dims(queries.index, KEY_AXIS)
    key = tl.expand_dims(keys.index, QUERY_AXIS)
    is_valid = tl.expand_dims(keys.is_valid, QUERY_AXIS)
    row_lse = tl.expand_dims(queries.lse, KEY_AXIS)
    row_factor = tl.expand_dims(queries.factor, KEY_AXIS)
    row_delta = tl.expand_dims(queries.delta, KEY_AXIS)

    scores, dcap = biased_scores(qk, query, key, head_slice, masks, settings, IS_FULL)
    probs = exp_difference(scores, row_lse, settings) * row_factor
    probs = hide(probs, 0.0, query, key, is_valid, head_slice, masks, settings, IS_FULL)
    dropped = probs
    if masks.seed is not None:
        survives = dropout_keep(queries.index[:, None], keys.first, head_slice, masks, settings)
        if IS_TRANSPOSED:
            survives = tl.trans(survives)
        dropped = tl.where(survives, probs * settings.dropout_scale, 0.0)
        dprobs = tl.where(survives, dprobs * settings.dropout_scale, 0.0)
    dlogits = probs * (dprobs - row_delta)
    dscores = dlogits
    if settings.softcap is not None:
        dscores = dlogits * dcap
    return dropped, dlogits, dscores
