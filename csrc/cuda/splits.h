// Splits of the keys: if few rows have many keys, the keys of a row are divided among several programs (blocks of
// threads). Each program stores the sums of its split, and a second kernel merges them (merge_splits.h). Both the
// decode kernels and the large forward kernels do this.
#pragma once
#include "head_slice.h"
#include "softmax.h"
#include "visibility.h"

namespace fused_attn::gpu {

// The blocks of one split: an equal share of the blocks of keys that a tile of queries sees or, in backward, also of
// the tiles of queries that see a block of keys. The shares depend on this tile or block alone. So in forward, with a
// fixed number of splits, the bits of a row do not depend on the other sequences of the batch.
GPU_DEVICE BlockRange blocks_of_split(BlockRange range, int32_t split, int32_t num_splits) {
  const int32_t share = (max(range.end - range.begin, 0) + num_splits - 1) / num_splits;
  range.begin += split * share;
  range.end = min(range.begin + share, range.end);
  return range;
}

// head_slice_of for kernels that divide keys: a sequence that is left to other kernels has no queries.
GPU_DEVICE HeadSlice split_slice_of(const Params& p, int32_t batch, int32_t head) {
  HeadSlice head_slice = head_slice_of(p, batch, head, head / p.group_size);
  if (p.cu_seqlens_q != nullptr) {
    const int32_t queries = offset_in(p.cu_seqlens_q, batch + 1, p.rows_q) - head_slice.q_offset;
    if (queries < p.splits.fewest_queries || queries > p.splits.most_queries) head_slice.seqlen_q = 0;
  }
  return head_slice;
}

// The index of a row in the arrays of SplitParams.
GPU_DEVICE int64_t split_row(const Params& p, int32_t split, const HeadSlice& head_slice, int32_t query) {
  return ((int64_t{split} * p.batch + head_slice.batch) * p.num_heads + head_slice.head) * p.seqlen_q + query;
}

// Whether a row has found a key in a split. Otherwise, its acc is neither stored nor read. The reference alone does not
// tell: if all scores are NaN, it is -inf, and the total is NaN.
GPU_DEVICE bool has_keys(const SplitSum& sum) { return sum.reference != -kInfinity || sum.total != 0.0f; }

// Stores what a large kernel has found in a split for this thread's row r of the fragment: query `query` of its head.
// row_max: its largest logit, if the caller wants it. All lanes of the warp call this.
template <int kTiles>
GPU_DEVICE void store_split_row(const Params& p, int32_t split, const HeadSlice& head_slice, int32_t query,
                                const float (&acc)[kTiles][4], int r, const LazySoftmax& softmax, float row_max,
                                Lane lane) {
  const SplitSum sum{softmax.reference[r], row_total(softmax.row_sum[r]), row_max};
  if (query >= head_slice.seqlen_q) return;
  const int64_t row = split_row(p, split, head_slice, query);
  if (lane.q == 0) store_global(p.splits.sums + row, sum);
  if (!has_keys(sum)) return;
  float* const target = p.splits.acc + row * p.v.columns + 2 * lane.q;
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    if (8 * t < p.v.columns)
      store_global(reinterpret_cast<Float2*>(target + 8 * t), Float2{acc[t][2 * r], acc[t][2 * r + 1]});
  }
}

// Divides eight columns of a row of out by the denominator of the softmax, and stores them; the thread of column 0 also
// stores the lse of the row. `sum` is the sum of prob * value for each column, and `total` is the sum of the probs.
// Both are relative to the reference.
template <class T>
GPU_DEVICE void finish_columns(const Params& p, const HeadSlice& head_slice, int32_t query, int column, float reference,
                               float total, const float (&sum)[8]) {
  float factor, lse;
  LazySoftmax::finish_row(reference, total, p.softmax_scale, p.softmax_scale_log2, factor, lse);
  if (p.sinks != nullptr) join_sink(load_global(p.sinks + head_slice.head), factor, lse);
  factor *= p.dropout_scale;
  if (p.lse.data != nullptr && column == 0) store_global(head_slice.query_value(p.lse, query), lse);
  if (column >= p.out.columns) return;
  uint32_t words[4];
  GPU_UNROLL for (int i = 0; i < 4; ++i) words[i] = pack<T>(sum[2 * i] * factor, sum[2 * i + 1] * factor);
  store_global(reinterpret_cast<Vec4*>(head_slice.query_row<T>(p.out, query) + column),
               Vec4{words[0], words[1], words[2], words[3]});
}

}  // namespace fused_attn::gpu
