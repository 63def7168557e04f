"""The steps between the two matrix products of attention: scale, softcap, biases, masks, exponential and dropout.

Positions `query` and `key` are integer tensors that broadcast against each other: (M, 1) and (1, N) for a tile of
(queries, keys), or (1, M) and (N, 1) for a tile of (keys, queries). Except for `dropout_keep`, the functions take both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.tiles import row_pointer

#: With more ranges than this for a query, they are tested in a loop, because the code would grow too long.
MAX_UNROLLED_RANGES = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def biased_scores(qk, query, key, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """(scores, dcap) of the products `qk` of queries and keys.

    scores: the logits divided by `score_unit`. If the scale is folded, they are `qk` itself, and `exp_difference`
        multiplies by the scale. Entries are not hidden yet; `hide` does that.
    dcap: the derivative of the softcap, 1.0 without one
    """
    dcap = 1.0
    if settings.softcap is not None:
        capped = _tanh(qk * (settings.scale / settings.softcap))
        scores = capped * settings.softcap
        dcap = 1.0 - capped * capped
    elif settings.is_scale_folded is not None:
        scores = qk
    elif masks.bias.ptr is None and masks.key_bias is None and masks.relative_bias is None:
        # A product in one place and the difference from the maximum in another would become one multiply-add, which
        # does not round the product. The maximum is a rounded product, so a logit of 1e10 would exceed it by hundreds.
        # A multiply-add of its own is rounded.
        scores = tl.fma(qk, settings.scale, 0.0)
    else:
        scores = qk * settings.scale
    if masks.bias.ptr is not None:
        scores += _load_scores(masks.bias, query, key, head_slice, IS_FULL).to(tl.float32)
    if masks.key_bias is not None:
        of_batch = masks.key_bias + head_slice.batch.to(tl.int64) * head_slice.key_padding_stride
        scores += tl.load(of_batch + key, mask=key < head_slice.seqlen_k, other=0.0).to(tl.float32)
    if masks.relative_bias is not None:
        of_head = masks.relative_bias + head_slice.head.to(tl.int64) * masks.relative_bias_stride_h
        column = key - query + head_slice.relative_bias_offset
        scores += tl.load(of_head + column, mask=_exists(query, key, head_slice, IS_FULL), other=0.0).to(tl.float32)
    return scores, dcap


@triton.jit
def score_unit(settings):
    """The factor that turns the scores of `biased_scores` into logits: the scale if it is folded, else 1."""
    if settings.is_scale_folded is not None:
        return settings.scale
    else:
        return 1.0


@triton.jit
def exp_difference(scores, row, settings):
    """exp((scores - row) * score_unit), computed by exp2, for which GPUs have an instruction.

    row: a number for each row, such as its maximum or its LSE, divided by `score_unit` as the scores are
    """
    if settings.is_scale_folded is not None:
        # One multiply-add for each score; row * scale is computed once for each row.
        scale = settings.scale * LOG2_E
        return tl.exp2(scores * scale - row * scale)
    else:
        # Subtract first. A score with a bias of finfo.min would overflow if it were multiplied by LOG2_E before.
        return tl.exp2((scores - row) * LOG2_E)


@triton.jit
def to_exponent(row, settings):
    """A row's maximum in the units that `exp_from` and `rescale_factor` subtract.

    If the scale is folded, this is the exponent of 2: the logit times log2(e). Otherwise, it is the score itself.
    The multiplication happens here alone, so that probs and rescaling of a row use one rounded number.
    """
    if settings.is_scale_folded is not None:
        return row * (settings.scale * LOG2_E)
    else:
        return row


@triton.jit
def exponent_unit(settings):
    """The factor that turns a result of `to_exponent` into a logit."""
    if settings.is_scale_folded is not None:
        return LN_2
    else:
        return 1.0


@triton.jit
def exp_from(scores, exponent, settings):
    """exp(logit - reference) for each score, where `exponent` is the reference of its row after `to_exponent`."""
    if settings.is_scale_folded is not None:
        # One multiply-add for each score.
        return tl.exp2(scores * (settings.scale * LOG2_E) - exponent)
    else:
        return exp_difference(scores, exponent, settings)


@triton.jit
def rescale_factor(old, new, settings):
    """exp(old - new) of two maxima of a row, both after `to_exponent`: the factor for sums that refer to `old`.

    The factor is exactly 1 if the maxima are equal. Otherwise, rounding would change acc and row_sum a little with
    every block.
    """
    if settings.is_scale_folded is not None:
        return tl.exp2(old - new)
    else:
        return tl.exp2((old - new) * LOG2_E)


@triton.jit
def largest_logit(row_max, row_sum):
    """What `return_max` returns: NaN if a logit of the row is NaN, which the maximum ignores and the sum does not."""
    return tl.where(row_sum == row_sum, row_max, row_sum)


@triton.jit
def divisor(row_max, row_sum):
    """The denominator of a row: row_sum, but 1 for an empty row, whose output is 0 then, and whose LSE is -inf.

    A row whose logits are all NaN has the maximum -inf as well, but a sum of NaN, which stays NaN.
    """
    return row_sum + tl.where(row_max == float("-inf"), 1.0, 0.0)


@triton.jit
def add_sink(acc, row_max, row_sum, sink):
    """(acc, row_max, row_sum) of a softmax after the logit `sink` has joined the denominator.

    row_max is a logit here, not an exponent of 2. A row that has seen no key stays as it is.
    """
    is_empty = row_max == float("-inf")
    new_max = tl.where(is_empty, 0.0, tl.maximum(row_max, sink))
    rescale = tl.exp2((row_max - new_max) * LOG2_E)
    new_sum = row_sum * rescale + tl.exp2((sink - new_max) * LOG2_E)
    return acc * rescale[:, None], tl.where(is_empty, row_max, new_max), tl.where(is_empty, row_sum, new_sum)


@triton.jit
def hide(scores, hidden, query, key, is_valid, head_slice, masks, settings, IS_FULL: tl.constexpr):
    """`scores` with the number `hidden` in the entries where mask, ranges, band or padding hide the key from the query.

    is_valid: which keys exist and are no padding, of the shape of `key`. Not read if IS_FULL
    IS_FULL: neither the band nor padding nor the sequence's end hides an entry of this block. Only mask and ranges may
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
    if masks.ranges.ptr is not None:
        scores = tl.where(_in_ranges(masks.ranges, query, key, head_slice, settings), scores, hidden)
    return scores


@triton.jit
def _in_ranges(x, query, key, head_slice, settings):
    """Whether each key lies in one of the ranges x (a `Scores`) of the query; false for a query that does not exist."""
    ends = row_pointer(x, head_slice.batch, head_slice.head, query)
    is_row = query < head_slice.seqlen_q
    found = (query < 0) & (key < 0)  # false, in the shape of the scores
    # Triton pipelines the loads of innermost loops only. So a loop in here would slow the loop over keys down.
    if settings.NUM_RANGES <= MAX_UNROLLED_RANGES:
        for n in tl.static_range(settings.NUM_RANGES):
            found = found | _in_range(ends + 2 * n, key, is_row)
    else:
        for n in range(settings.NUM_RANGES):
            found = found | _in_range(ends + 2 * n, key, is_row)
    return found


@triton.jit
def _in_range(ends, key, is_row):
    """Whether each key lies in the range that begins at the number at `ends` and ends before the next number."""
    begin = tl.load(ends, mask=is_row, other=0)
    end = tl.load(ends + 1, mask=is_row, other=0)
    return (key >= begin) & (key < end)


@triton.jit
def dropout_keep(query, first_key, head_slice, masks, settings):
    """(M, BLOCK_N) bool: which probs of the keys from first_key on survive dropout.

    The words come from Philox as `fused_attn.attention.dropout` specifies: the counter (key // 8, query, head, batch)
    yields four words, whose halves are the numbers of eight neighbouring keys.
    query: (M, 1)
    """
    group = first_key // 8 + tl.arange(0, settings.BLOCK_N // 8)[None, :]
    batch, head = head_slice.batch, head_slice.head
    if settings.dropout_origin is not None:
        batch += settings.dropout_origin.batch
        head += settings.dropout_origin.head
        query += settings.dropout_origin.query
        group += settings.dropout_origin.key // 8
    zero = (query + group) * 0
    word0, word1, word2, word3 = tl.philox(
        tl.load(masks.seed),
        (zero + group).to(tl.uint32),
        (zero + query).to(tl.uint32),
        (zero + head).to(tl.uint32),
        (zero + batch).to(tl.uint32),
        n_rounds=7,
    )
    # A number has a bit for each of 4, and then of 2 neighbouring keys. Of the ways to spread the bits over the
    # tile, this one takes the fewest registers, on sm_80 as on sm_90 and sm_100.
    first_four = _survivors(word0, settings) | (_survivors(word1, settings) << 2)
    last_four = _survivors(word2, settings) | (_survivors(word3, settings) << 2)
    of_four = tl.interleave(first_four, last_four)
    of_two = tl.interleave(of_four, of_four >> 2)
    of_keys = (of_two[:, :, None] >> tl.arange(0, 2).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(of_keys, (of_two.shape[0], settings.BLOCK_N)) != 0


@triton.jit
def _survivors(word, settings):
    """Which halves of the random uint32 `word` are at least the threshold of dropout (uint8): bit 0 for the low half,
    bit 1 for the high half.
    """
    low = (word & 0xFFFF).to(tl.int32) >= settings.dropout_threshold
    high = (word >> 16).to(tl.int32) >= settings.dropout_threshold
    return low.to(tl.uint8) | (high.to(tl.uint8) << 1)


@triton.jit
def _exists(query, key, head_slice, IS_FULL: tl.constexpr):
    """Which entries of a tile lie within the sequence, so that a bias or mask may be loaded for them."""
    # In a full block all keys exist. Queries beyond the last one can occur in every block.
    if IS_FULL:
        return (query < head_slice.seqlen_q) & (key >= 0)
    else:
        return (query < head_slice.seqlen_q) & (key < head_slice.seqlen_k)


@triton.jit
def _load_scores(x, query, key, head_slice, IS_FULL: tl.constexpr):
    """The tile of the mask or bias x (a `Scores`) at these positions, 0 beyond the sequence's end."""
    pointer = row_pointer(x, head_slice.batch, head_slice.head, query) + key.to(tl.int64) * x.stride_col
    return tl.load(pointer, mask=_exists(query, key, head_slice, IS_FULL), other=0)


@triton.jit
def _tanh(x):
    """tanh with a relative error below 4 * 2^-24.

    Where |x| >= 0.35: (1 - e) / (1 + e) with e = exp(-2 |x|). Near 0, the difference 1 - e would lose digits, so the
    Taylor polynomial of degree 11 is used.
    """
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
