// The gradients of biases and sinks: the arguments of their kernels, and the small kernels that complete the sums.
// sm80/bias_gradient.h and sm90/bias_gradient.h have the large kernel. bias_gradient/plan.h fills the arguments in and
// launches the kernels.
#pragma once
#include <type_traits>

#include "fragments.h"
#include "kernels.h"

namespace fused_attn::gpu {

// How the gradient of a bias, a sum of the gradients of logits, is divided among programs. A program is the work of one
// block of threads, but see program_counter.
//
// An owner is a part of the gradient that one program sums in registers: a tile of the gradient of a dense bias, or a
// diagonal of tiles of one head for a relative bias. The tiles of scores that add to this part belong to the owner. If
// there are few owners, the tiles of each owner are divided into `splits` parts, for several programs. Program number
// owner + owners * split visits part `split` of the tiles of `owner`.
struct BiasGradientParams {
  bool is_relative;  // the bias is a relative one; otherwise it is a dense one
  // The bias is p.logits.bias. It broadcasts along the dimensions that are summed, so all tiles of a program have the
  // same tile of the bias.
  bool is_dense_bias;
  // Dense: the bias broadcasts along these dimensions, so its gradient is a sum over them.
  bool sums_batch, sums_heads, sums_queries, sums_keys;
  int32_t query_blocks;  // blocks of queries of the longest sequence
  int32_t key_blocks;
  int32_t owners;          // dense: tiles of the gradient; relative: heads x diagonals of tiles
  int32_t tiles_of_owner;  // dense: tiles of scores that add to one tile of the gradient
  int32_t diagonals;       // relative: diagonals of tiles of one head; a diagonal has the tiles of one key - query
  int32_t splits;
  // The array into which programs write their sums. Dense: (split, batch, head, query, key), or the gradient itself if
  // there is one split. Relative: (split, owner, diagonal within a tile), with tile queries + tile keys numbers for
  // each owner, because a tile has one diagonal fewer than this.
  void* sums;
  bool is_rounded;  // the sums have the type of the query, as the gradient itself may have; otherwise float
  bool has_pieces;  // rows can be written in pieces: of 8 keys (16 bytes) if is_rounded, else of 2 keys (8 bytes)
  int64_t stride_split;
  int64_t stride_batch, stride_head, stride_query, stride_key;

  // Each score of a tile has an entry of the gradient of its own, so a program adds up nothing within a tile.
  bool has_entry_of_each_score;
  // On sm_90a, a block of threads runs one program after another in this case. The counter, which starts at 0, counts
  // the programs taken beyond the first one of each block. Null = each block runs one program.
  int32_t* program_counter;
};

// Writes x to global memory as a number of type V: float, or a 16-bit type, to which x is rounded.
template <class V>
GPU_DEVICE void store_as(V* p, float x) {
  if constexpr (std::is_same_v<V, float>) {
    store_global(p, x);
  } else {
    store_global(reinterpret_cast<uint16_t*>(p), static_cast<uint16_t>(pack<V>(x, 0.0f)));
  }
}

// The shape of a launch of bias_gradient_kernel: a block of threads for each owner and split.
inline LaunchShape shape_of_owners(const BiasGradientParams& g, int threads, int shared_bytes) {
  const int64_t programs = int64_t{g.owners} * g.splits;
  if (programs >= int64_t{1} << 31) throw std::length_error("the bias needs more blocks than a grid may have");
  return {static_cast<int>(programs), 1, 1, threads, shared_bytes};
}

// Launches bias_gradient_kernel for all owners and splits. head_dim_*.cu instantiates the launchers.
namespace sm80 {
template <int kHeadDim, int kValueDim = kHeadDim>
void launch_bias_gradient(const Params& p, const BiasGradientParams& g, bool is_bf16, Stream stream);
}  // namespace sm80
namespace sm90 {
template <int kHeadDim, int kValueDim = kHeadDim>
void launch_bias_gradient(const Params& p, const BiasGradientParams& g, bool is_bf16, Stream stream);
}  // namespace sm90

// ---- Sums over splits, tiles and rows

constexpr int kSumThreads = 256;

// The arguments of sum_bias_splits_kernel.
struct BiasSumParams {
  int32_t splits;
  int64_t stride_split;
  const float* sums;
  void* gradient;      // of the type V of sum_bias_splits_kernel
  int64_t sizes[4];    // of the gradient, with 1 for a dimension that the bias broadcasts along
  int64_t strides[4];  // of the gradient; the sums are contiguous
};

// Dense bias: adds the sums of all splits, in the order of the splits. Each thread computes one entry of the gradient.
template <class V>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kSumThreads, 1) sum_bias_splits_kernel(const GPU_GRID_CONSTANT BiasSumParams p) {
  const int64_t entry = int64_t{block_index_x()} * kSumThreads + thread_index();
  if (entry >= p.stride_split) return;
  float sum = 0.0f;
  for (int split = 0; split < p.splits; ++split) sum += load_global(p.sums + split * p.stride_split + entry);
  int64_t rest = entry, offset = 0;
  // Split the number of the entry into its four indices, the last dimension first.
  GPU_UNROLL for (int dim = 3; dim >= 0; --dim) {
    offset += rest % p.sizes[dim] * p.strides[dim];
    rest /= p.sizes[dim];
  }
  store_as(static_cast<V*>(p.gradient) + offset, sum);
}

// The arguments of sum_diagonals_kernel.
struct DiagonalSumParams {
  BiasGradientParams g;
  int32_t tile_queries;
  int32_t tile_keys;
  int32_t heads;         // rows of the gradient: H, or 1 if all heads share the bias
  int32_t heads_of_row;  // heads that share a row of the gradient: 1, or H
  int64_t columns;       // L + S - 1
  int32_t seqlen_q;
  float* gradient;  // (heads, columns)
  int64_t stride_head;
};

// Relative bias: each thread computes one entry (head, diagonal) of the gradient. The diagonal passes through tiles of
// several diagonals of tiles, so the entry is a sum over these, over splits and over heads that share the bias.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kSumThreads, 1) sum_diagonals_kernel(const GPU_GRID_CONSTANT DiagonalSumParams p) {
  const int64_t entry = int64_t{block_index_x()} * kSumThreads + thread_index();
  const int64_t row = entry / p.columns, column = entry % p.columns;
  if (row >= p.heads) return;
  // distance = key - query of this entry. In a tile whose first key minus first query is `shift`, the entry is number
  // distance - shift + tile_queries - 1 of the tile's diagonals.
  const int32_t distance = static_cast<int32_t>(column) - (p.seqlen_q - 1);
  const int32_t first_shift = -(p.g.query_blocks - 1) * p.tile_queries;
  float sum = 0.0f;
  for (int32_t head = 0; head < p.heads_of_row; ++head) {
    // Begins at the first diagonal of tiles that the entry passes through, and ends after the last one.
    for (int32_t i = max((distance - first_shift) / p.tile_keys, 0); i < p.g.diagonals; ++i) {
      const int32_t d = distance - (first_shift + i * p.tile_keys) + p.tile_queries - 1;
      if (d < 0) break;
      const int64_t owner = (row + head) * p.g.diagonals + i;
      for (int split = 0; split < p.g.splits; ++split)
        sum += load_global(static_cast<const float*>(p.g.sums) + split * p.g.stride_split +
                           owner * (p.tile_queries + p.tile_keys) + d);
    }
  }
  store_global(p.gradient + row * p.stride_head + column, sum);
}

// The gradient of a head's sink. A sink has a logit but no value, so it only takes a share of the denominator of each
// row.
//
//   dsink = -sum over all rows of exp(sink - lse) * delta
//
// One block of threads computes the gradient of one head. If there are many sequences, each warp takes some of them,
// because each sequence waits for loads of its offsets. The order of additions is fixed: first the rows of a thread,
// then a tree over the threads.
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kSumThreads, 1) sum_sink_gradients_kernel(const GPU_GRID_CONSTANT Params p) {
  const int32_t head = block_index_x();
  const float sink_log2 = load_global(p.sinks + head) * kLog2E;
  float sum = 0.0f;
  const int32_t threads = p.batch < kSumThreads / 32 ? kSumThreads : 32;  // that share a sequence
  for (int32_t batch = thread_index() / threads; batch < p.batch; batch += kSumThreads / threads) {
    const HeadSlice head_slice = head_slice_of(p, batch, head, head / p.group_size);
    for (int32_t row = thread_index() % threads; row < head_slice.seqlen_q; row += threads) {
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
