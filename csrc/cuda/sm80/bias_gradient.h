// The gradient of a bias, with instructions of Ampere. ../bias_gradient/score_tiles.h says what a program sums.
#pragma once
#include "../bias_gradient/score_tiles.h"
#include "../dropout.h"
#include "../logits.h"
#include "../row_statistics.h"
#include "../tiles.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm80 {

// Sizes of the kernel, and where its tiles lie in shared memory (byte offsets).
template <int kHeadDim, int kValueDim>
struct BiasGradientPlan : BiasGradientTileSm80<kHeadDim> {
  using Tile = BiasGradientTileSm80<kHeadDim>;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kTiles = Tile::kBlockN / 8;
  static_assert(Tile::kBlockM == 16 * Tile::kWarps);
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + Tile::kBlockM * kHeadDim * 2;
  static constexpr uint32_t kK = kDout + Tile::kBlockM * kValueDim * 2;
  static constexpr uint32_t kV = kK + Tile::kBlockN * kHeadDim * 2;
  static constexpr uint32_t kBytes = kV + Tile::kBlockN * kValueDim * 2;
  static_assert(kBytes <= kMostSharedBytesSm80);
  static_assert(SumsTile<Tile::kBlockM, Tile::kBlockN>::kBytes <= kBytes);
};

// Sums the gradients of logits over the tiles of one owner and split. One program is one block of threads, and each
// warp has 16 queries of every tile.
template <class T, int kHeadDim, int kValueDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((BiasGradientPlan<kHeadDim, kValueDim>::kThreads), 1)
    bias_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BiasGradientParams g) {
  using Plan = BiasGradientPlan<kHeadDim, kValueDim>;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kThreads = Plan::kThreads, kTiles = Plan::kTiles;
  const ScoreTiles<kBlockM, kBlockN> tiles(p, g, block_index_x());
  const Lane lane = this_lane();
  const int warp_row = thread_index() / 32 * 16;
  const uint32_t shared = shared_address(shared_memory());
  const Corners<kHeadDim> corners(shared, warp_row, lane);
  const Corners<kValueDim> value_corners(shared, warp_row, lane);

  // Starts to copy queries, dout, keys and values of a tile to shared memory. All threads of the block take part. This
  // kernel also runs for tensors with fewer columns than its own, so copy_rows checks the columns.
  constexpr bool kChecksColumns = true;
  const auto load = [&](const auto& next) {
    const HeadSlice& head_slice = next.head_slice;
    const auto load_queries = [&](auto columns, uint32_t tile, const Rows& x) {
      copy_rows<decltype(columns)::value, kBlockM, kThreads, kChecksColumns>(
          tile, x, head_slice.query_row<const T>(x, next.first_query),
          [&](int first, int offset) { return next.first_query + first + offset < head_slice.seqlen_q; });
    };
    const auto load_keys = [&](auto columns, uint32_t tile, const Rows& x) {
      copy_rows<decltype(columns)::value, kBlockN, kThreads, kChecksColumns>(
          tile, x, head_slice.key_row<const T>(x, int64_t{next.key_block} * kBlockN),
          [&](int first, int offset) { return next.valid.has(first, offset); });
    };
    load_queries(Columns<kHeadDim>{}, shared + Plan::kQ, p.q);
    load_queries(Columns<kValueDim>{}, shared + Plan::kDout, p.dout);
    load_keys(Columns<kHeadDim>{}, shared + Plan::kK, p.k);
    load_keys(Columns<kValueDim>{}, shared + Plan::kV, p.v);
    copy_async_commit();
  };

  // Loop. The inputs of the next tile are loaded while the exponentials of this one are computed.
  float sums[kTiles][4];
  fill(sums, 0.0f);
  auto next = tiles.find(tiles.begin);
  if (next.number < tiles.end) load(next);
  while (next.number < tiles.end) {
    const auto now = next;
    const int query = now.first_query + warp_row + lane.g, first_key = now.key_block * kBlockN;
    const RowStatistics statistics[2] = {row_statistics(p, now.head_slice, query),
                                         row_statistics(p, now.head_slice, query + 8)};
    copy_async_wait<0>();
    sync_threads();  // the tiles have come
    float scores[1][kTiles][4], dprobs[1][kTiles][4];
    fill(scores[0], 0.0f);
    fill(dprobs[0], 0.0f);
    multiply_transposed<T, kHeadDim>(scores, corners, Plan::kQ, Plan::kK);
    multiply_transposed<T, kValueDim>(dprobs, value_corners, Plan::kDout, Plan::kV);
    sync_threads();  // every warp is done with the tiles
    next = tiles.find(now.number + 1);
    if (next.number < tiles.end) load(next);

    if (p.dropout_seed != nullptr)
      drop(dprobs[0], dropout_keep_of_query_rows<kTiles>(Dropout(p, now.head_slice), query, first_key, lane),
           p.dropout_scale);
    to_logits<T>(p, now.head_slice, scores[0], QueryRows{query, first_key + 2 * lane.q}, NoGradients{});
    if (!now.is_full)
      hide(scores[0], visible_keys_of_tile(p, now.head_slice, now.valid, now.key_block, now.has_masked, query), lane);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) {
        const float prob = prob_of(scores[0][t][j], p.softmax_scale_log2, statistics[j / 2].lse_log2);
        sums[t][j] += prob * (dprobs[0][t][j] - statistics[j / 2].delta);
      }
    }
  }

  // Epilogue. The tiles of inputs are not needed any more, so the sums are written over them.
  if (g.has_entry_of_each_score) return store_tile_of_sums<T>(tiles, sums, warp_row, lane);
  const SumsTile<kBlockM, kBlockN> sums_tile{shared};
  sums_tile.store(sums, warp_row, lane);
  sync_threads();
  store_sums<T, kThreads>(tiles, sums_tile, thread_index());
}

}  // namespace fused_attn::gpu::sm80
