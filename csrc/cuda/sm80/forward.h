// Forward for Ampere and later: out = softmax(logits) @ value, with cp.async, ldmatrix and mma.sync.
//
// A block of threads has kBlockM queries of one head, and visits the blocks of keys that they see, from the last one to
// the first. Shared memory holds one tile of keys and one tile of values. The values of a step are loaded while its
// scores are computed, and the keys of the next step are loaded while the values of this step are summed.
#pragma once
#include <type_traits>

#include "../dropout.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../softmax.h"
#include "../splits.h"
#include "../tile_scheduler.h"
#include "../tiles.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm80 {

// Sizes of the forward kernel, and where its tiles lie in shared memory (byte offsets).
template <int kHeadDim, int kValueDim>
struct ForwardPlan : ForwardTileSm80<kHeadDim> {
  using Tile = ForwardTileSm80<kHeadDim>;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kRowTiles = Tile::kBlockM / (16 * Tile::kWarps);  // fragments of 16 rows, for each warp
  static constexpr int kTiles = Tile::kBlockN / 8;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + Tile::kBlockM * kHeadDim * 2;
  static constexpr uint32_t kV = kK + Tile::kBlockN * kHeadDim * 2;
  static constexpr uint32_t kBytes = kV + Tile::kBlockN * kValueDim * 2;
  static_assert(kBytes <= kMostSharedBytesSm80);
};

// Computes out and lse of one block of queries. Each warp has 16 * kRowTiles of the queries, and all threads load
// tiles. With kIsPaged, keys and values lie in pages.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral, bool kIsPaged>
GPU_DEVICE void compute_rows(const Params& p) {
  using Plan = ForwardPlan<kHeadDim, kValueDim>;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kThreads = Plan::kThreads;
  constexpr int kRowTiles = Plan::kRowTiles, kTiles = Plan::kTiles;

  // Find the rows.
  if (block_index_x() >= num_query_programs(p, grid_size_x())) return;
  const WorkTile work = query_tile<kBlockM>(p, block_index_x());
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * kBlockM;
  if (first_row >= head_slice.seqlen_q) return;
  const int split = block_index_x() % p.splits.count;
  const BlockRange range =
      blocks_of_split(key_range<kBlockN>(p, head_slice, first_row, min(first_row + kBlockM, head_slice.seqlen_q) - 1),
                      split, p.splits.count);
  const Lane lane = this_lane();
  const int warp_row = thread_index() / 32 * 16 * kRowTiles;

  // Load.
  const uint32_t shared = shared_address(shared_memory());
  const Corners<kHeadDim> corners(shared, warp_row, lane);
  const Corners<kValueDim> value_corners(shared, warp_row, lane);
  // Starts to copy a block of keys, or of values, to shared memory. Rows that are not valid become zeros.
  const auto load_keys = [&](auto columns, uint32_t tile, const Rows& x, int block, const ValidRows<kBlockN>& valid) {
    constexpr int kColumns = decltype(columns)::value;
    const auto is_valid = [&](int first, int offset) { return valid.has(first, offset); };
    if constexpr (kIsPaged) {
      copy_paged_rows<kColumns, kBlockN, kThreads, T>(tile, x, p.pages, head_slice, block * kBlockN, is_valid);
    } else {
      copy_rows<kColumns, kBlockN, kThreads, kIsGeneral>(
          tile, x, head_slice.key_row<const T>(x, int64_t{block} * kBlockN), is_valid);
    }
    copy_async_commit();
  };
  // The last block of keys up to `block` that these queries visit, or a number below range.begin.
  const auto last_to_visit = [&](int block) {
    return last_block_to_visit<kIsGeneral, kBlockM, kBlockN>(p, head_slice, first_row, range.begin, block);
  };
  int block = last_to_visit(range.end - 1);
  ValidRows<kBlockN> next_valid{};
  if (block >= range.begin) {
    next_valid = valid_keys<kBlockN>(p, head_slice, block);
    copy_rows<kHeadDim, kBlockM, kThreads, kIsGeneral>(
        shared + Plan::kQ, p.q, head_slice.query_row<const T>(p.q, first_row),
        [&](int first, int offset) { return first_row + first + offset < head_slice.seqlen_q; });
    load_keys(Columns<kHeadDim>{}, shared + Plan::kK, p.k, block, next_valid);
  }

  // Loop.
  LazySoftmax softmax[kRowTiles];
  RowMaxima maxima[kRowTiles];  // of a general kernel, if the caller wants row_max
  float acc[kRowTiles][kValueDim / 8][4];
  GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
    softmax[m].init();
    maxima[m].init();
    fill(acc[m], 0.0f);
  }
  while (block >= range.begin) {
    const ValidRows<kBlockN> valid = next_valid;
    copy_async_wait<0>();
    sync_threads();  // the keys have come, and every warp is done with the values before
    load_keys(Columns<kValueDim>{}, shared + Plan::kV, p.v, block, valid);

    float scores[kRowTiles][kTiles][4];
    GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) fill(scores[m], 0.0f);
    multiply_transposed<T, kHeadDim>(scores, corners, Plan::kQ, Plan::kK);
    const bool has_masked = has_masked_keys<kIsGeneral, kBlockM, kBlockN>(p, head_slice, first_row, block);
    const bool is_full = range.is_within_band(block) && valid.all() && !has_masked;
    uint32_t probs[kRowTiles][kTiles / 2][4];
    GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
      const int query = first_row + warp_row + 16 * m + lane.g, first_key = block * kBlockN;
      if constexpr (kIsGeneral)
        to_logits<T>(p, head_slice, scores[m], QueryRows{query, first_key + 2 * lane.q}, NoGradients{});
      if (!is_full) {
        VisibleColumns<kBlockN> visible = visible_keys({p, head_slice}, valid, block, query);
        if (has_masked) hide_masked_keys(p, head_slice, visible, query, first_key);
        hide(scores[m], visible, lane);
      }
      if (kIsGeneral && p.row_max.data != nullptr) maxima[m].add(scores[m]);
      // Turns scores into probs, with the reference as it is if possible. Otherwise raises the reference and rescales
      // acc.
      const auto sum_probs = [&](const auto& dropout_keep) {
        if (softmax[m].template try_probs<T>(scores[m], p.softmax_scale_log2, dropout_keep, probs[m])) return;
        float rescale[2];
        softmax[m].template raise_and_compute_probs<T>(scores[m], p.softmax_scale_log2, dropout_keep, probs[m],
                                                       rescale);
        scale_rows(acc[m], rescale);
      };
      if (kIsGeneral && p.dropout_seed != nullptr) {
        sum_probs(dropout_keep_of_query_rows<kTiles>(Dropout(p, head_slice), query, first_key, lane));
      } else {
        sum_probs(NoDropout{});
      }
    }

    copy_async_wait<0>();
    sync_threads();  // the values have come, and every warp is done with the keys
    block = last_to_visit(block - 1);
    if (block >= range.begin) {
      next_valid = valid_keys<kBlockN>(p, head_slice, block);
      load_keys(Columns<kHeadDim>{}, shared + Plan::kK, p.k, block, next_valid);
    }
    multiply<T, kValueDim>(acc, probs, value_corners, Plan::kV);
  }

  // Epilogue.
  GPU_UNROLL for (int m = 0; m < kRowTiles; ++m) {
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = first_row + warp_row + 16 * m + lane.g + 8 * r;
      const bool is_row = row < head_slice.seqlen_q;
      float row_max = -kInfinity;
      if (kIsGeneral && p.row_max.data != nullptr) row_max = maxima[m].of_row(r, p.softmax_scale);
      if (p.splits.count > 1) {
        store_split_row(p, split, head_slice, row, acc[m], r, softmax[m], row_max, lane);
        continue;
      }
      float factor, lse;
      softmax[m].finish(r, p.softmax_scale, p.softmax_scale_log2, factor, lse);
      if (p.sinks != nullptr) join_sink(load_global(p.sinks + head_slice.head), factor, lse);
      if constexpr (kIsGeneral) factor *= p.dropout_scale;
      if (kIsGeneral && p.row_max.data != nullptr && lane.q == 0 && is_row)
        store_global(head_slice.query_value(p.row_max, row), row_max);
      if (p.lse.data != nullptr && lane.q == 0 && is_row) store_global(head_slice.query_value(p.lse, row), lse);
      store_row<T>(head_slice.query_row<T>(p.out, row), acc[m], r, factor, is_row, p.out.columns, lane);
    }
  }
}

// The forward kernel. Pages have a kernel of their own: as a branch of the general kernel, they would add 5 % to the
// instructions of each step with head dim 128.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((ForwardPlan<kHeadDim, kValueDim>::kThreads), 1)
    forward_kernel(const GPU_GRID_CONSTANT Params p) {
  compute_rows<T, kHeadDim, kValueDim, kIsGeneral, false>(p);
}
template <class T, int kHeadDim, int kValueDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((ForwardPlan<kHeadDim, kValueDim>::kThreads), 1)
    paged_forward_kernel(const GPU_GRID_CONSTANT Params p) {
  compute_rows<T, kHeadDim, kValueDim, true, true>(p);
}

}  // namespace fused_attn::gpu::sm80
