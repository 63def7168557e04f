// The kernel that merges the splits of the keys (splits.h).
#pragma once
#include "kernels.h"
#include "splits.h"

namespace fused_attn::gpu {

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
  const int64_t row = split_row(p, 0, head_slice, query), rows_of_split = split_row(p, 1, head_slice, query) - row;
  const auto sum_of = [&](int32_t split) { return load_global(p.splits.sums + row + split * rows_of_split); };

  float reference = -kInfinity, row_max = -kInfinity;
  for (int32_t split = lane.index; split < p.splits.count; split += 32) {
    const SplitSum sum = sum_of(split);
    reference = fmaxf(reference, sum.reference);
    row_max = max_or_nan(row_max, sum.row_max);
  }
  GPU_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
    reference = fmaxf(reference, shuffle_xor(reference, mask));
    row_max = max_or_nan(row_max, shuffle_xor(row_max, mask));
  }
  if (p.row_max.data != nullptr && thread_index() == 0) store_global(head_slice.query_value(p.row_max, query), row_max);

  constexpr int kColumns = 4, kAhead = 8;  // columns of a thread, and splits whose loads are in flight at once
  for (int column = kColumns * lane.index; column < p.v.columns; column += 32 * kColumns) {
    Float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    for (int32_t first = warp; first < p.splits.count; first += kAhead * kMergeWarps) {
      SplitSum sums[kAhead];
      Float4 parts[kAhead];
      GPU_UNROLL for (int i = 0; i < kAhead; ++i) {
        const int32_t split = first + i * kMergeWarps;
        sums[i] = SplitSum{-kInfinity, 0.0f, -kInfinity};
        if (split < p.splits.count) sums[i] = sum_of(split);
      }
      GPU_UNROLL for (int i = 0; i < kAhead; ++i) {
        parts[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* const acc_row = p.splits.acc + (row + (first + i * kMergeWarps) * rows_of_split) * p.v.columns;
        if (has_keys(sums[i])) parts[i] = load_global(reinterpret_cast<const Float4*>(acc_row + column));
      }
      GPU_UNROLL for (int i = 0; i < kAhead; ++i) {
        const float of_split = LazySoftmax::factor_between(sums[i].reference, reference, p.softmax_scale_log2);
        const float factor = has_keys(sums[i]) ? of_split : 0.0f;
        total += sums[i].total * factor;
        acc.x = multiply_add(parts[i].x, factor, acc.x);
        acc.y = multiply_add(parts[i].y, factor, acc.y);
        acc.z = multiply_add(parts[i].z, factor, acc.z);
        acc.w = multiply_add(parts[i].w, factor, acc.w);
      }
    }
    store_shared(shared + (warp * kMergeColumns + column) * 4, acc);
    if (column == 0) store_shared(shared + kMergeTotals + warp * 4, total);
  }
  sync_threads();  // the sums of all warps are stored
  const int column = 8 * thread_index();
  if (column >= p.v.columns) return;
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
