// Splits of the keys: if few rows have many keys, the keys of a row are divided among several programs (blocks of
// threads). Each program stores the sums of its split, and a second kernel merges them. Both the decode kernels and the
// large forward kernels do this.
#pragma once
#include "head_slice.h"
#include "kernels.h"
#include "softmax.h"
#include "visibility.h"

namespace fused_attn::gpu {

// The blocks of keys of one split: an equal share of the blocks that a tile of queries sees. The shares depend on this
// tile alone, so the bits of a row do not depend on the other sequences of the batch.
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
    const int32_t queries = load_global(p.cu_seqlens_q + batch + 1) - head_slice.q_offset;
    if (queries < p.splits.fewest_queries || queries > p.splits.most_queries) head_slice.seqlen_q = 0;
  }
  return head_slice;
}

// The index of a row in the arrays of SplitParams.
GPU_DEVICE int64_t split_row(const Params& p, int32_t split, const HeadSlice& head_slice, int32_t query) {
  return ((int64_t{split} * p.batch + head_slice.batch) * p.num_heads + head_slice.head) * p.seqlen_q + query;
}

// Stores what a large kernel has found in a split for this thread's row r of the fragment: query `query` of its head.
// total: the sum of the probs of this thread's columns. All lanes of the warp call this.
template <int kTiles>
GPU_DEVICE void store_split_row(const Params& p, int32_t split, const HeadSlice& head_slice, int32_t query,
                                const float (&acc)[kTiles][4], int r, const LazySoftmax& softmax, Lane lane) {
  const float reference = softmax.reference[r], total = row_total(softmax.row_sum[r]);
  if (query >= head_slice.seqlen_q) return;
  const int64_t row = split_row(p, split, head_slice, query);
  if (lane.q == 0) store_global(p.splits.sums + row, SplitSum{reference, total});
  if (reference == -kInfinity) return;  // merge_splits_kernel does not read acc then
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

// ---- Merging the splits

constexpr int kMergeThreads = 128;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kMergeColumns = 256;                                  // no value has more
constexpr uint32_t kMergeTotals = kMergeWarps * kMergeColumns * 4;  // where the sums of probs lie in shared memory
constexpr uint32_t kMergeBytes = kMergeTotals + kMergeWarps * 4;

// Merges the splits of one query of one head, in a fixed order: first each warp adds every kMergeWarps-th split, then
// the sums of the warps are added. One block of threads computes one row.
template <class T>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kMergeThreads, 1) merge_splits_kernel(const GPU_GRID_CONSTANT Params p) {
  const int32_t query = block_index_x() % p.seqlen_q, head_and_batch = block_index_x() / p.seqlen_q;
  const HeadSlice head_slice = split_slice_of(p, head_and_batch / p.num_heads, head_and_batch % p.num_heads);
  if (query >= head_slice.seqlen_q) return;
  const Lane lane = this_lane();
  const int warp = thread_index() / 32;
  const uint32_t shared = shared_address(shared_memory());
  const auto sum_of = [&](int32_t split) {
    return load_global(p.splits.sums + split_row(p, split, head_slice, query));
  };

  float reference = -kInfinity;
  for (int32_t split = lane.index; split < p.splits.count; split += 32)
    reference = fmaxf(reference, sum_of(split).reference);
  GPU_UNROLL for (int mask = 1; mask < 32; mask *= 2) reference = fmaxf(reference, shuffle_xor(reference, mask));

  constexpr int kColumns = 4;  // that a thread adds at once
  for (int column = kColumns * lane.index; column < kMergeColumns; column += 32 * kColumns) {
    const bool is_column = column < p.v.columns;
    Float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    for (int32_t split = warp; split < p.splits.count; split += kMergeWarps) {
      const SplitSum sum = sum_of(split);
      if (sum.reference == -kInfinity) continue;  // its program has stored no acc
      const float factor = LazySoftmax::factor_between(sum.reference, reference, p.softmax_scale_log2);
      total += sum.total * factor;
      if (!is_column) continue;
      const Float4 x = load_global(reinterpret_cast<const Float4*>(
          p.splits.acc + split_row(p, split, head_slice, query) * p.v.columns + column));
      acc.x = multiply_add(x.x, factor, acc.x);
      acc.y = multiply_add(x.y, factor, acc.y);
      acc.z = multiply_add(x.z, factor, acc.z);
      acc.w = multiply_add(x.w, factor, acc.w);
    }
    store_shared(shared + (warp * kMergeColumns + column) * 4, acc);
    if (column == 0) store_shared(shared + kMergeTotals + warp * 4, total);
  }
  sync_threads();  // the sums of all warps are stored
  const int column = 8 * thread_index();
  if (column >= kMergeColumns) return;
  float total = 0.0f, sum[8] = {};
  GPU_UNROLL for (int w = 0; w < kMergeWarps; ++w) {
    total += load_shared<float>(shared + kMergeTotals + w * 4);
    GPU_UNROLL for (int i = 0; i < 8; ++i) sum[i] += load_shared<float>(shared + (w * kMergeColumns + column + i) * 4);
  }
  finish_columns<T>(p, head_slice, query, column, reference, total, sum);
}

// Launches the kernel that merges the splits. With one split, there is nothing to merge.
inline void merge_splits(const Params& p, bool is_bf16, Stream stream) {
  if (p.splits.count == 1) return;
  const LaunchShape shape = shape_of(p.seqlen_q, 1, p.num_heads, p.batch, kMergeThreads, kMergeBytes);
  is_bf16 ? run_kernel(merge_splits_kernel<bf16_t>, shape, stream, p)
          : run_kernel(merge_splits_kernel<f16_t>, shape, stream, p);
}

}  // namespace fused_attn::gpu
