"""The backward kernels: dq (with delta and the sinks' gradient), then dk and dv.

Each recomputes the weights from the LSE. Every gradient is summed by one program in a fixed order, so the results are
deterministic; the price is that both kernels form the scores (7 matrix products instead of 5).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.arguments import UNSPECIALIZED
from fused_attn.backends.triton.forward import lse_row
from fused_attn.backends.triton.scores import LOG2_E, dropout_keep, hide, log2_scores
from fused_attn.backends.triton.tiles import (
    block_and_unit,
    first_row_of,
    is_kept,
    key_blocks,
    load_rows,
    num_partial_blocks,
    partial_block,
    place_of,
    query_blocks,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dq_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    out,  # Rows (B, H, L, Dv)
    dout,  # Rows (B, H, L, Dv)
    dq,  # Rows (B, H, L, D); its ptr is None if only delta is wanted
    lse,  # (B, H, L) float32
    dlse,  # (B, H, L) float32 or None
    delta,  # (B, H, L) float32, written: rowsum(dout * out) - dlse
    dsinks,  # (B, H, blocks of queries) float32 or None, written: each program's share
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    units_per_section,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Which rows.
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block, head, batch = block_and_unit(num_blocks, settings.num_heads, units_per_section, LAST_FIRST=True)
    first_row = block * BLOCK_M
    query = first_row + tl.arange(0, BLOCK_M)
    place = place_of(batch, head, masks, seqlen_q, seqlen_k, band_offset)
    dsinks_entry = (batch * settings.num_heads + head) * num_blocks + block
    if first_row >= place.len_q:
        if dsinks is not None:
            tl.store(dsinks + dsinks_entry, 0.0)
        return
    is_row = query < place.len_q

    # Load, and delta.
    dout_tile = load_rows(
        first_row_of(dout, batch, head, place.first_q), dout.stride_row, query, is_row, VALUE_DIM, BLOCK_DV
    )
    out_tile = load_rows(
        first_row_of(out, batch, head, place.first_q), out.stride_row, query, is_row, VALUE_DIM, BLOCK_DV
    )
    row_lse, row_offset = load_lse(lse, batch, head, query, is_row, place, masks, settings, lse_stride)
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + row_offset + query, mask=is_row, other=0.0)
    tl.store(delta + row_offset + query, row_delta, mask=is_row)
    if dsinks is not None:
        sink = tl.load(masks.sinks + head).to(tl.float32) * LOG2_E
        # Rows that saw nothing have an LSE of -inf, and their sink no weight.
        weight = tl.where(row_lse == float("-inf"), 0.0, tl.exp2(sink - row_lse))
        tl.store(dsinks + dsinks_entry, -tl.sum(tl.where(is_row, weight * row_delta, 0.0), 0))

    # Loop.
    if dq.ptr is not None:
        q_tile = load_rows(first_row_of(q, batch, head, place.first_q), q.stride_row, query, is_row, HEAD_DIM, BLOCK_D)
        kv_head = head // settings.group_size
        k_base = first_row_of(k, batch, kv_head, place.first_k)
        v_base = first_row_of(v, batch, kv_head, place.first_k)
        row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
        last_row = tl.minimum(first_row + BLOCK_M, place.len_q) - 1
        blocks = key_blocks(first_row, last_row, place, masks, settings, seqlen_k, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_key in tl.range(blocks.full_start, blocks.full_end, BLOCK_N):
            acc = _add_dq(
                acc, q_tile, dout_tile, row_lse, row_delta, query, first_key, k, k_base, v, v_base,
                place, masks, settings, seqlen_k, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
                IS_FULL=True,
            )  # fmt: skip
        for index in tl.range(0, num_partial_blocks(blocks, BLOCK_N)):
            acc = _add_dq(
                acc, q_tile, dout_tile, row_lse, row_delta, query, partial_block(blocks, index, BLOCK_N),
                k, k_base, v, v_base,
                place, masks, settings, seqlen_k, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
                IS_FULL=False,
            )  # fmt: skip
        dq_base = first_row_of(dq, batch, head, place.first_q)
        store_rows(dq_base, dq.stride_row, query, is_row, acc * settings.scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _add_dq(
    acc,  # (M, BLOCK_D)
    q_tile,
    dout_tile,
    row_lse,
    row_delta,
    query,
    first_key,
    k,
    k_base,
    v,
    v_base,
    place,
    masks,
    settings,
    seqlen_k,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    key = first_key + tl.arange(0, BLOCK_N)
    if IS_FULL:
        keep = None
    else:
        keep = is_kept(key, place, masks, seqlen_k)
    k_tile = load_rows(k_base, k.stride_row, key, keep, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(v_base, v.stride_row, key, keep, VALUE_DIM, BLOCK_DV)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
    _, _, dscores = weights_and_gradients(
        qk, dweights, query[:, None], key[None, :], first_key, None if IS_FULL else keep[None, :],
        row_lse[:, None], row_delta[:, None], place, masks, settings, BLOCK_N, IS_FULL, IS_TRANSPOSED=False,
    )  # fmt: skip
    return tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dkdv_kernel(
    q,  # Rows (B, H, L, D)
    k,  # Rows (B, Hkv, S, D)
    v,  # Rows (B, Hkv, S, Dv)
    dout,  # Rows (B, H, L, Dv)
    dk,  # Rows (B, Hkv, S, D)
    dv,  # Rows (B, Hkv, S, Dv)
    lse,  # (B, H, L) float32
    delta,  # (B, H, L) float32
    masks,
    settings,
    seqlen_q,
    seqlen_k,
    lse_stride,
    band_offset,
    units_per_section,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a block of keys of one key head and visits all queries of all heads that share it."""
    # Which rows.
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    num_kv_heads = settings.num_heads // settings.group_size
    block, kv_head, batch = block_and_unit(num_blocks, num_kv_heads, units_per_section, LAST_FIRST=False)
    first_key = block * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    place = place_of(batch, kv_head, masks, seqlen_q, seqlen_k, band_offset)
    if first_key >= place.len_k:
        return

    # Load.
    keep = is_kept(key, place, masks, seqlen_k)
    num_kept = tl.sum(keep.to(tl.int32), 0)
    k_tile = load_rows(first_row_of(k, batch, kv_head, place.first_k), k.stride_row, key, keep, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(first_row_of(v, batch, kv_head, place.first_k), v.stride_row, key, keep, VALUE_DIM, BLOCK_DV)

    # Loop.
    last_key = tl.minimum(first_key + BLOCK_N, place.len_k) - 1
    blocks = query_blocks(first_key, last_key, num_kept == BLOCK_N, place, settings, BLOCK_M)
    num_heads_to_visit = tl.where(num_kept == 0, 0, settings.group_size)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, num_heads_to_visit):
        head = kv_head * settings.group_size + member
        place = place_of(batch, head, masks, seqlen_q, seqlen_k, band_offset)
        q_base = first_row_of(q, batch, head, place.first_q)
        dout_base = first_row_of(dout, batch, head, place.first_q)
        for first_row in tl.range(blocks.full_start, blocks.full_end, BLOCK_M):
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, key, keep, first_key, first_row, q, q_base, dout, dout_base, lse, delta,
                place, masks, settings, lse_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                IS_FULL=True,
            )  # fmt: skip
        for index in tl.range(0, num_partial_blocks(blocks, BLOCK_M)):
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, key, keep, first_key, partial_block(blocks, index, BLOCK_M),
                q, q_base, dout, dout_base, lse, delta,
                place, masks, settings, lse_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                IS_FULL=False,
            )  # fmt: skip

    # Epilogue.
    is_row = key < place.len_k
    if dk.ptr is not None:
        dk_base = first_row_of(dk, batch, kv_head, place.first_k)
        store_rows(dk_base, dk.stride_row, key, is_row, dk_acc * settings.scale, HEAD_DIM, BLOCK_D)
    if dv.ptr is not None:
        dv_base = first_row_of(dv, batch, kv_head, place.first_k)
        store_rows(dv_base, dv.stride_row, key, is_row, dv_acc, VALUE_DIM, BLOCK_DV)


@triton.jit
def _add_dkdv(
    dk_acc,  # (N, BLOCK_D)
    dv_acc,  # (N, BLOCK_DV)
    k_tile,
    v_tile,
    key,
    keep,
    first_key,
    first_row,
    q,
    q_base,
    dout,
    dout_base,
    lse,
    delta,
    place,
    masks,
    settings,
    lse_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    """Tiles here are (keys, queries), so that they are left factors of the products that follow."""
    query = first_row + tl.arange(0, BLOCK_M)
    is_row = query < place.len_q
    q_tile = load_rows(q_base, q.stride_row, query, is_row, HEAD_DIM, BLOCK_D)
    dout_tile = load_rows(dout_base, dout.stride_row, query, is_row, VALUE_DIM, BLOCK_DV)
    row_lse, row_offset = load_lse(lse, place.batch, place.head, query, is_row, place, masks, settings, lse_stride)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    row_delta = tl.load(delta + row_offset + query, mask=is_row, other=0.0)
    qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
    weights, _, dscores = weights_and_gradients(
        qk, dweights, query[None, :], key[:, None], first_key, keep[:, None],
        row_lse[None, :], row_delta[None, :], place, masks, settings, BLOCK_N, IS_FULL, IS_TRANSPOSED=True,
    )  # fmt: skip
    dv_acc = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_acc, input_precision=PRECISION)
    dk_acc = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    return dk_acc, dv_acc


@triton.jit
def load_lse(lse, batch, head, query, is_row, place, masks, settings, lse_stride):
    """(LSE of the rows in base 2, offset of the head's first row in tensors shaped like the LSE)."""
    offset = lse_row(batch, head, place.first_q, masks, settings, lse_stride)
    return tl.load(lse + offset + query, mask=is_row, other=0.0) * LOG2_E, offset


@triton.jit
def weights_and_gradients(
    qk,
    dweights,  # dout @ value^T
    query,
    key,
    first_key,
    keep,
    row_lse,  # base 2, finite
    row_delta,
    place,
    masks,
    settings,
    BLOCK_N: tl.constexpr,
    IS_FULL: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
):
    """(weights after dropout, gradient of the scores after softcap and bias, gradient of scale * qk).

    Tiles are (queries, keys), or (keys, queries) if IS_TRANSPOSED; the row vectors lie along the queries.
    """
    scores, unit, dcap = log2_scores(qk, query, key, place, masks, settings, IS_FULL)
    weights = tl.exp2(scores * unit - row_lse)
    weights = hide(weights, 0.0, query, key, keep, place, masks, settings, IS_FULL)
    dropped = weights
    if masks.seed is not None:
        if IS_TRANSPOSED:
            survives = tl.trans(dropout_keep(tl.trans(query), first_key, place, masks, settings, BLOCK_N))
        else:
            survives = dropout_keep(query, first_key, place, masks, settings, BLOCK_N)
        dropped = tl.where(survives, weights * settings.inverse_keep, 0.0)
        dweights = tl.where(survives, dweights * settings.inverse_keep, 0.0)
    dbiased = weights * (dweights - row_delta)
    dscores = dbiased
    if settings.softcap is not None:
        dscores = dbiased * dcap
    return dropped, dbiased, dscores
