"""What happens to a score between the two matrix products: scale, soft cap, biases, masks and dropout.

All functions take positions that broadcast against each other, so they serve tiles of (queries, keys) as well as of
(keys, queries).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def biased_scores(qk, query, key, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """(scores, dcap) of the products `qk` of queries and keys.

    scores: in units of `score_unit`. Without softcap and bias they are `qk` itself, and `exp_difference` multiplies
        the scale in for nothing.
    dcap: derivative of the soft cap
    """
    dcap = 1.0
    if settings.softcap is not None:
        capped = _tanh(qk * (settings.scale / settings.softcap))
        scores = capped * settings.softcap
        dcap = 1.0 - capped * capped
    elif settings.is_scale_folded is not None:
        scores = qk
    else:
        scores = qk * settings.scale
    if masks.bias.ptr is not None:
        scores += _load_scores(masks.bias, query, key, head_slice, IS_FULL).to(tl.float32)
    if masks.relative_bias is not None:
        table = masks.relative_bias + head_slice.head.to(tl.int64) * masks.relative_bias_stride_h
        column = key - query + head_slice.table_offset
        scores += tl.load(table + column, mask=_exists(query, key, head_slice, IS_FULL), other=0.0).to(tl.float32)
    return scores, dcap


@triton.jit
def score_unit(settings):
    """scores * unit are the logits of the softmax."""
    if settings.is_scale_folded is not None:
        return settings.scale
    else:
        return 1.0


@triton.jit
def exp_difference(scores, row, settings):
    """exp((scores - row) * unit), by the hardware's exp2; both in units of `score_unit`."""
    if settings.is_scale_folded is not None:
        # One multiply-add.
        scale = settings.scale * LOG2_E
        return tl.exp2(scores * scale - row * scale)
    else:
        # A bias of finfo.min would overflow if it were multiplied before the row's value is taken off.
        return tl.exp2((scores - row) * LOG2_E)


@triton.jit
def to_exponent(row, settings):
    """What `exp_from` takes off: the exponent of 2 where the scale is folded, else the score itself.

    One number then serves all probs of a row and their rescaling, and is rounded once.
    """
    if settings.is_scale_folded is not None:
        return row * (settings.scale * LOG2_E)
    else:
        return row


@triton.jit
def exponent_unit(settings):
    """to_exponent(score) * unit is the logit of the softmax."""
    if settings.is_scale_folded is not None:
        return LN_2
    else:
        return 1.0


@triton.jit
def exp_from(scores, exponent, settings):
    """`exp_difference` of scores and a row that has been through `to_exponent`."""
    if settings.is_scale_folded is not None:
        # One multiply-add.
        return tl.exp2(scores * (settings.scale * LOG2_E) - exponent)
    else:
        return exp_difference(scores, exponent, settings)


@triton.jit
def rescale_factor(old, new, settings):
    """exp of the difference of two maxima, exactly 1 if both are equal, so that a sum of many blocks does not drift."""
    if settings.is_scale_folded is not None:
        return tl.exp2(old - new)
    else:
        return tl.exp2((old - new) * LOG2_E)


@triton.jit
def add_sink(acc, row_max, row_sum, sink):
    """(acc, row_max, row_sum) of an online softmax, in natural units, with one more logit that has no value.

    A row that has seen no key stays as it is.
    """
    is_empty = row_max == float("-inf")
    new_max = tl.where(is_empty, 0.0, tl.maximum(row_max, sink))
    rescale = tl.exp2((row_max - new_max) * LOG2_E)
    new_sum = row_sum * rescale + tl.exp2((sink - new_max) * LOG2_E)
    return acc * rescale[:, None], tl.where(is_empty, row_max, new_max), tl.where(is_empty, row_sum, new_sum)


@triton.jit
def hide(scores, hidden, query, key, is_valid, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """`scores` with the value `hidden` where a query does not see a key.

    is_valid: which keys exist and are not padding, of the shape of `key`; not looked at in a full block
    """
    if not IS_FULL:
        visible = is_valid
        distance = key - query - head_slice.band_offset
        if settings.band_left is not None:
            visible = visible & (distance >= -settings.band_left)
        if settings.band_right is not None:
            visible = visible & (distance <= settings.band_right)
        scores = tl.where(visible, scores, hidden)
    if masks.mask.ptr is not None:
        scores = tl.where(_load_scores(masks.mask, query, key, head_slice, IS_FULL) != 0, scores, hidden)
    return scores


@triton.jit
def dropout_keep(query, first_key, head_slice, masks, settings):
    """(queries, BLOCK_N) bool: which probs of the keys first_key ... survive; see `fused_attn.attention.dropout`.

    query: (M, 1). One call of Philox gives the words of four neighbouring keys.
    """
    group = first_key // 4 + tl.arange(0, settings.BLOCK_N // 4)[None, :]
    zero = (query + group) * 0
    word0, word1, word2, word3 = tl.philox(
        tl.load(masks.seed),
        (zero + group).to(tl.uint32),
        (zero + query).to(tl.uint32),
        (zero + head_slice.head).to(tl.uint32),
        (zero + head_slice.batch).to(tl.uint32),
    )
    survives02 = tl.interleave(_survives(word0, settings), _survives(word2, settings))
    survives13 = tl.interleave(_survives(word1, settings), _survives(word3, settings))
    return tl.interleave(survives02, survives13) != 0


@triton.jit
def _survives(word, settings):
    # With the top bit flipped, unsigned order becomes signed order.
    signed = (word ^ 0x80000000).to(tl.int32, bitcast=True)
    return (signed >= settings.dropout_threshold).to(tl.int8)


@triton.jit
def _exists(query, key, head_slice, IS_FULL: tl.constexpr):
    # A full block has all of its keys; rows beyond the last query occur everywhere.
    if IS_FULL:
        return (query < head_slice.seqlen_q) & (key >= 0)
    else:
        return (query < head_slice.seqlen_q) & (key < head_slice.seqlen_k)


@triton.jit
def _load_scores(x, query, key, head_slice, IS_FULL: tl.constexpr):
    base = x.ptr + head_slice.batch.to(tl.int64) * x.stride_b + head_slice.head.to(tl.int64) * x.stride_h
    pointer = base + query.to(tl.int64) * x.stride_row + key.to(tl.int64) * x.stride_col
    return tl.load(pointer, mask=_exists(query, key, head_slice, IS_FULL), other=0)


@triton.jit
def _tanh(x):
    """Relative error below 4 units of 2^-24: exp2 away from 0, the odd Taylor polynomial near 0, where exp2 cancels."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = -1382.0 / 155925.0
    near = near * y + 62.0 / 2835.0
    near = near * y - 17.0 / 315.0
    near = near * y + 2.0 / 15.0
    near = near * y - 1.0 / 3.0
    near = tl.abs(x) * (near * y + 1.0)
    size = tl.where(y < 0.1225, near, far)
    return tl.where(x < 0, -size, size)
