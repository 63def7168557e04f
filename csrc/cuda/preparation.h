// The small kernels that run before the large ones. They pack key padding to bits, copy the relative bias, reset the
// tile counter, and compute the row statistics for backward.
#pragma once
#include "fragments.h"
#include "kernels.h"
#include "tile_scheduler.h"

namespace fused_attn::gpu {

constexpr int kPreparationThreads = 128;
constexpr int kThreadsPerRow = 8;  // threads that compute the statistics of one query
constexpr int kPreparationRows = kPreparationThreads / kThreadsPerRow;
static_assert(kRowBlock % kPreparationRows == 0);

// Packs the key padding of one batch entry to bits, and counts its blocks of keys that have a valid key (key ranks).
// All threads of one block call this.
GPU_DEVICE void prepare_padding(const Params& p, const PaddingParams& padding, int32_t batch) {
  uint32_t* const valid_keys = padding.valid_keys + int64_t{batch} * p.valid_words;
  for (int word = thread_index(); word < p.valid_words; word += kPreparationThreads) {
    uint32_t valid = 0;
    for (int i = 0; i < 32 && 32 * word + i < p.seqlen_k; ++i) {
      const int64_t key = int64_t{32} * word + i;
      const bool is_valid = load_global(padding.padding + batch * padding.stride_batch + key * padding.stride_key) == 0;
      valid |= static_cast<uint32_t>(is_valid) << i;
    }
    store_global(valid_keys + word, valid);
  }
  if (padding.key_ranks == nullptr) return;
  sync_threads();
  if (thread_index() >= 32) return;

  // The first warp computes the key ranks: entry n counts those of the first n blocks of keys that have a valid key. A
  // pass of the loop computes 32 entries as a prefix sum over the lanes.
  constexpr int kWords = kKeyBlock / 32;
  int32_t* const ranks = padding.key_ranks + int64_t{batch} * (p.num_key_blocks + 1);
  int32_t before = 0;
  for (int first = 0; first < p.num_key_blocks; first += 32) {
    const int block = first + thread_index();
    uint32_t any = 0;
    for (int w = 0; w < kWords && block < p.num_key_blocks; ++w) any |= load_global(valid_keys + kWords * block + w);
    int32_t count = any != 0;
    GPU_UNROLL for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t lower = shuffle(count, max(thread_index() - distance, 0));
      if (thread_index() >= distance) count += lower;
    }
    if (block < p.num_key_blocks) store_global(ranks + block + 1, before + count);
    before += shuffle(count, 31);
  }
  if (thread_index() == 0) store_global(ranks, 0);
}

// Sets the counter from which the programs of the next kernel take their tiles to 0. One thread of the grid writes.
GPU_DEVICE void reset_tile_counter(const Params& p) {
  if (p.tile_counter != nullptr && block_index_x() == 0 && thread_index() == 0) store_global(p.tile_counter, 0);
}

// Copies a relative bias into the workspace, with a margin of zeros on both sides of each row: see LogitParams. Each
// thread writes one number.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 1)
    prepare_relative_bias_kernel(const GPU_GRID_CONSTANT RelativeBiasParams p) {
  const int64_t i = int64_t{block_index_x()} * kPreparationThreads + thread_index();
  const int64_t stride = p.columns + 2 * kRelativeBiasMargin, head = i / stride,
                column = i % stride - kRelativeBiasMargin;
  if (head >= p.heads) return;
  const bool is_inside = column >= 0 && column < p.columns;
  store_global(p.padded + i, is_inside ? load_global(p.bias + head * p.stride_head + column) : 0.0f);
}

// Packs the key padding, with one block of threads for each batch entry, and resets the tile counter. If there is no
// padding, the kernel only resets the counter.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 1)
    prepare_padding_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT PaddingParams padding) {
  reset_tile_counter(p);
  if (padding.padding != nullptr) prepare_padding(p, padding, block_index_x());
}

// Rows with a larger lse_log2 count as empty in backward. A float of this size is rounded by 1/2 or more, and so are the
// exponents of all probs of the row. If all keys of a row have a bias of -1e9, the exponents, which are about 0, would
// be rounded by up to 64: the probs would be 2^64, or infinite.
constexpr float kLargestLseLog2 = 16777216.0f;

// Computes the row statistics of kPreparationRows queries of one head, and writes them to the workspace. kThreadsPerRow
// threads share a query. For the fused backward, the function also sets the counters dq_turns to 0. There is one
// counter for each kTileRows queries.
template <class T, int kHeadDim, int kTileRows>
GPU_DEVICE void prepare_rows(const Params& p) {
  const int blocks_of_head = (p.seqlen_q + kRowBlock - 1) / kRowBlock * (kRowBlock / kPreparationRows);
  const WorkTile work =
      scheduled_tile(block_index_x(), blocks_of_head, p.num_heads, p.batch, p.heads_per_l2_group, /*last_first=*/true);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int row = work.block * kPreparationRows + thread_index() / kThreadsPerRow;
  const bool is_row = row < head_slice.seqlen_q;
  float sum = 0.0f;
  for (int chunk = thread_index() % kThreadsPerRow; 8 * chunk < (is_row ? p.out.columns : 0); chunk += kThreadsPerRow) {
    const Vec4 out = load_global(reinterpret_cast<const Vec4*>(head_slice.query_row<T>(p.out, row) + 8 * chunk));
    const Vec4 dout = load_global(reinterpret_cast<const Vec4*>(head_slice.query_row<T>(p.dout, row) + 8 * chunk));
    const uint32_t out_words[] = {out.x, out.y, out.z, out.w}, dout_words[] = {dout.x, dout.y, dout.z, dout.w};
    GPU_UNROLL for (int i = 0; i < 4; ++i) {
      const Float2 a = unpack<T>(out_words[i]), b = unpack<T>(dout_words[i]);
      sum += a.x * b.x + a.y * b.y;
    }
  }
  GPU_UNROLL for (int mask = 1; mask < kThreadsPerRow; mask *= 2) sum += shuffle_xor(sum, mask);
  const bool is_in_block = row / kRowBlock * kRowBlock < head_slice.seqlen_q;  // the arrays have no room for other rows
  if (!is_in_block || thread_index() % kThreadsPerRow != 0) return;
  float lse = -kInfinity;  // rows past the last one count as empty rows
  if (is_row) {
    if (p.dlse.data != nullptr) sum -= load_global(head_slice.query_value(p.dlse, row));
    lse = load_global(head_slice.query_value(p.lse, row));
  }
  // With lse_log2 = +inf, every prob exp2(score - inf) of an empty row is 0, and the large kernels need no test. delta
  // must be finite, so that 0 * delta is 0. A row with a logit of +inf or NaN is not empty: its gradients are NaN.
  const float lse_log2 = lse * kLog2E;
  const bool is_empty = lse_log2 < -kLargestLseLog2 || (lse_log2 > kLargestLseLog2 && lse != kInfinity);
  store_global(head_slice.row_statistic(p.delta, row), is_empty ? 0.0f : sum);
  store_global(head_slice.row_statistic(p.lse_log2, row), is_empty ? kInfinity : lse_log2);
  if (p.dq_turns != nullptr && row % kTileRows == 0)
    store_global(p.dq_turns + head_slice.first_row_block(p) * (kRowBlock / kTileRows) + row / kTileRows, 0);
}

// Prepares the row statistics for backward in two kernels.
template <class T, int kHeadDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 1) prepare_rows_kernel(const GPU_GRID_CONSTANT Params p) {
  prepare_rows<T, kHeadDim, kRowBlock>(p);
}

// The shape of a launch with one block of threads for each kPreparationRows queries, up to the end of the last row
// block.
inline LaunchShape shape_of_row_preparation(const Params& p) {
  return shape_of((p.seqlen_q + kRowBlock - 1) / kRowBlock * kRowBlock, kPreparationRows, p.num_heads, p.batch,
                  kPreparationThreads, 0);
}

}  // namespace fused_attn::gpu
