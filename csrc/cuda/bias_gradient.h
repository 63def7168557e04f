// The gradients of biases and sinks: what their kernels are told, and the small kernels that complete their sums.
#pragma once
#include "fragments.h"
#include "kernels.h"

namespace fused_attn::gpu {

// One sum of the gradients of logits. A program has a number: owner + owners * split. It visits the split's part of the
// tiles that belong to its owner.
struct BiasGradientParams {
  bool is_relative;
  // Dense: over which dimensions the gradient is a sum, because the bias broadcasts along them.
  bool sums_batch, sums_heads, sums_queries, sums_keys;
  int32_t query_blocks;  // blocks of queries of the longest sequence
  int32_t key_blocks;
  int32_t owners;          // dense: tiles of the gradient; relative: heads x diagonals
  int32_t tiles_of_owner;  // dense
  int32_t diagonals;       // relative: diagonals of tiles, of one head
  int32_t splits;
  // Dense: entry (batch, head, query, key) of a split. Relative: (split, owner, diagonal of a tile).
  float* sums;
  int64_t stride_split;
  int64_t stride_batch, stride_head, stride_query, stride_key;
};

template <int kHeadDim>
void launch_bias_gradient(const Params& p, const BiasGradientParams& g, bool is_bf16, Stream stream);

// The queries and keys of a tile, for all kernels that launch_bias_gradient<kHeadDim> may choose.
struct BiasGradientTile {
  int32_t queries;
  int32_t keys;
};
constexpr BiasGradientTile bias_gradient_tile(int64_t head_dim) {
  if (head_dim == 96) return {64, 64};
  return head_dim <= 128 ? BiasGradientTile{128, 64} : BiasGradientTile{64, 32};
}

// ---- Sums over splits, tiles and rows

constexpr int kSumThreads = 256;

struct BiasSumParams {
  int32_t splits;
  int64_t stride_split;
  const float* sums;
  float* gradient;
  int64_t sizes[4];    // of the gradient, with 1 for a dimension that the bias broadcasts along
  int64_t strides[4];  // of the gradient; the sums are contiguous
};

// Dense bias: adds up the splits.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kSumThreads, 1) sum_bias_splits_kernel(const GPU_GRID_CONSTANT BiasSumParams p) {
  const int64_t entry = int64_t{block_index_x()} * kSumThreads + thread_index();
  if (entry >= p.stride_split) return;
  float sum = 0.0f;
  for (int split = 0; split < p.splits; ++split) sum += load_global(p.sums + split * p.stride_split + entry);
  int64_t rest = entry, offset = 0;
  GPU_UNROLL for (int dim = 3; dim >= 0; --dim) {
    offset += rest % p.sizes[dim] * p.strides[dim];
    rest /= p.sizes[dim];
  }
  store_global(p.gradient + offset, sum);
}

struct DiagonalSumParams {
  BiasGradientParams g;
  int32_t tile_queries;
  int32_t tile_keys;
  int32_t heads;         // of the gradient: H, or 1
  int32_t heads_of_row;  // how many heads share a row of the gradient
  int64_t columns;       // L + S - 1
  int32_t seqlen_q;
  float* gradient;  // (heads, columns)
  int64_t stride_head;
};

// Relative bias: entry (head, diagonal) is the sum over all diagonals of tiles that contain the diagonal.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kSumThreads, 1) sum_diagonals_kernel(const GPU_GRID_CONSTANT DiagonalSumParams p) {
  const int64_t entry = int64_t{block_index_x()} * kSumThreads + thread_index();
  const int64_t row = entry / p.columns, column = entry % p.columns;
  if (row >= p.heads) return;
  // Of a tile whose first key minus first query is `shift`, the entry is diagonal distance - shift + tile_queries - 1.
  const int32_t distance = static_cast<int32_t>(column) - (p.seqlen_q - 1);
  const int32_t first_shift = -(p.g.query_blocks - 1) * p.tile_queries;
  const int32_t window = p.tile_queries + p.tile_keys - 1;
  float sum = 0.0f;
  for (int32_t head = 0; head < p.heads_of_row; ++head) {
    for (int32_t i = max((distance - p.tile_keys + 1 - first_shift + p.tile_keys - 1) / p.tile_keys, 0);
         i < p.g.diagonals; ++i) {
      const int32_t d = distance - (first_shift + i * p.tile_keys) + p.tile_queries - 1;
      if (d < 0) break;
      if (d >= window) continue;
      const int64_t owner = (row + head) * p.g.diagonals + i;
      for (int split = 0; split < p.g.splits; ++split)
        sum += load_global(p.g.sums + split * p.g.stride_split + owner * (p.tile_queries + p.tile_keys) + d);
    }
  }
  store_global(p.gradient + row * p.stride_head + column, sum);
}

// The gradient of a head's sink: the sink has no value, so only its share of the denominator counts.
//
//   dsink = -sum over all rows of exp(sink - lse) * delta
//
// One block for each head. The order of additions is fixed: first those of a thread, then a tree.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kSumThreads, 1) sum_sink_gradients_kernel(const GPU_GRID_CONSTANT Params p) {
  const int32_t head = block_index_x();
  const float sink_log2 = load_global(p.sinks + head) * kLog2E;
  float sum = 0.0f;
  for (int32_t batch = 0; batch < p.batch; ++batch) {
    const HeadSlice head_slice = head_slice_of(p, batch, head, head / p.group_size);
    for (int32_t row = thread_index(); row < head_slice.seqlen_q; row += kSumThreads) {
      const float lse_log2 = load_global(head_slice.row_statistic(p.lse_log2, row));
      sum -= exp2_approx(sink_log2 - lse_log2) * load_global(head_slice.row_statistic(p.delta, row));
    }
  }
  const uint32_t shared = shared_address(shared_memory());
  store_shared(shared + thread_index() * 4, sum);
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (thread_index() < half) {
      sum += load_shared<float>(shared + (thread_index() + half) * 4);
      store_shared(shared + thread_index() * 4, sum);
    }
  }
  if (thread_index() == 0) store_global(p.dsinks + head, sum);
}

}  // namespace fused_attn::gpu
