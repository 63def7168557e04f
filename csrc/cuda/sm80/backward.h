// Backward for Ampere and later, in two kernels. Both compute the scores and dprobs, so there are 7 products instead of
// 5. In return, each gradient is summed by one block of threads, or by a fixed number of them (gradient_splits.h), in a
// fixed order: results are deterministic, there are no atomics, and probs stay in registers.
//
//   query_gradient_kernel: a block has kBlockM queries, and visits the keys they see:   dq += dscores @ k
//   key_gradient_kernel:   a block has kBlockN keys, and visits the queries that see    dv += probs^T @ dout
//                          them, of all query heads of the group:                       dk += dscores^T @ q
//
// Here probs = exp(scale * q @ k^T - lse), dprobs = dout @ v^T and dscores = probs * (dprobs - delta).
#pragma once
#include "../dropout.h"
#include "../gradient_splits.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../row_statistics.h"
#include "../splits.h"
#include "../tile_scheduler.h"
#include "../tiles.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm80 {

// Sizes of the kernel for dq, and where its tiles lie in shared memory (byte offsets).
template <int kHeadDim, int kValueDim>
struct QueryGradientPlan : QueryGradientTileSm80<kHeadDim> {
  using Tile = QueryGradientTileSm80<kHeadDim>;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kTiles = Tile::kBlockN / 8;
  static_assert(Tile::kBlockM == 16 * Tile::kWarps);
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + Tile::kBlockM * kHeadDim * 2;
  static constexpr uint32_t kK = kDout + Tile::kBlockM * kValueDim * 2;
  static constexpr uint32_t kV = kK + Tile::kBlockN * kHeadDim * 2;
  static constexpr uint32_t kBytes = kV + Tile::kBlockN * kValueDim * 2;
  static_assert(kBytes <= kMostSharedBytesSm80);
};

// Computes dq of one block of queries. Each warp has 16 of the queries, and all threads load tiles.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((QueryGradientPlan<kHeadDim, kValueDim>::kThreads), 1)
    query_gradient_kernel(const GPU_GRID_CONSTANT Params p) {
  using Plan = QueryGradientPlan<kHeadDim, kValueDim>;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kThreads = Plan::kThreads, kTiles = Plan::kTiles;

  // Find the rows.
  const SplitOfBlock program(block_index_x(), p.dq_splits);
  const WorkTile work = query_gradient_tile<kBlockM>(p, program.block, p.seqlen_q);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * kBlockM;
  if (first_row >= head_slice.seqlen_q) return;
  const BlockRange range =
      blocks_of_split(key_range<kBlockN>(p, head_slice, first_row, min(first_row + kBlockM, head_slice.seqlen_q) - 1),
                      program.split, p.dq_splits);
  const Lane lane = this_lane();
  const int warp_row = thread_index() / 32 * 16, query = first_row + warp_row + lane.g;

  // Load.
  const uint32_t shared = shared_address(shared_memory());
  const Corners<kHeadDim> corners(shared, warp_row, lane);
  const Corners<kValueDim> value_corners(shared, warp_row, lane);
  const auto load_queries = [&](auto columns, uint32_t tile, const Rows& x) {
    copy_rows<decltype(columns)::value, kBlockM, kThreads, kIsGeneral>(
        tile, x, head_slice.query_row<const T>(x, first_row),
        [&](int first, int offset) { return first_row + first + offset < head_slice.seqlen_q; });
  };
  const auto load_keys = [&](auto columns, uint32_t tile, const Rows& x, int block, const ValidRows<kBlockN>& valid) {
    copy_rows<decltype(columns)::value, kBlockN, kThreads, kIsGeneral>(
        tile, x, head_slice.key_row<const T>(x, int64_t{block} * kBlockN),
        [&](int first, int offset) { return valid.has(first, offset); });
    copy_async_commit();
  };
  const auto last_to_visit = [&](int block) {
    return last_block_to_visit<kIsGeneral, kBlockM, kBlockN>(p, head_slice, first_row, range.begin, block);
  };
  int block = last_to_visit(range.end - 1);
  if (block >= range.begin) {
    load_queries(Columns<kHeadDim>{}, shared + Plan::kQ, p.q);
    load_queries(Columns<kValueDim>{}, shared + Plan::kDout, p.dout);
    load_keys(Columns<kValueDim>{}, shared + Plan::kV, p.v, block, valid_keys<kBlockN>(p, head_slice, block));
  }
  const RowStatistics statistics[2] = {row_statistics(p, head_slice, query), row_statistics(p, head_slice, query + 8)};

  // Loop. The values are loaded first, because the keys are needed twice: for the scores and for dq.
  float dq[1][kHeadDim / 8][4];
  fill(dq[0], 0.0f);
  while (block >= range.begin) {
    const ValidRows<kBlockN> valid = valid_keys<kBlockN>(p, head_slice, block);
    copy_async_wait<0>();
    sync_threads();  // the values have come, and every warp is done with the keys before
    load_keys(Columns<kHeadDim>{}, shared + Plan::kK, p.k, block, valid);
    float dprobs[1][kTiles][4];
    fill(dprobs[0], 0.0f);
    multiply_transposed<T, kValueDim>(dprobs, value_corners, Plan::kDout, Plan::kV);

    copy_async_wait<0>();
    sync_threads();  // the keys have come, and every warp is done with the values
    const int this_block = block;
    block = last_to_visit(block - 1);
    if (block >= range.begin)
      load_keys(Columns<kValueDim>{}, shared + Plan::kV, p.v, block, valid_keys<kBlockN>(p, head_slice, block));
    float scores[1][kTiles][4];
    fill(scores[0], 0.0f);
    multiply_transposed<T, kHeadDim>(scores, corners, Plan::kQ, Plan::kK);
    const int first_key = this_block * kBlockN;
    if constexpr (kIsGeneral) {
      if (p.dropout_seed != nullptr)
        drop(dprobs[0], dropout_keep_of_query_rows<kTiles>(Dropout(p, head_slice), query, first_key, lane),
             p.dropout_scale);
    }
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) dprobs[0][t][j] -= statistics[j / 2].delta;
    }
    if constexpr (kIsGeneral)
      to_logits<T>(p, head_slice, scores[0], QueryRows{query, first_key + 2 * lane.q},
                   LogitGradients<kTiles>{dprobs[0]});
    const bool has_masked = has_masked_keys<kIsGeneral, kBlockM, kBlockN>(p, head_slice, first_row, this_block);
    if (!(range.is_within_band(this_block) && valid.all()) || has_masked) {
      VisibleColumns<kBlockN> visible = visible_keys({p, head_slice}, valid, this_block, query);
      if (has_masked) hide_masked_keys(p, head_slice, visible, query, first_key);
      hide(scores[0], visible, lane);
    }
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) {
        scores[0][t][j] = prob_of(scores[0][t][j], p.softmax_scale_log2, statistics[j / 2].lse_log2) * dprobs[0][t][j];
      }
    }
    multiply<T, kHeadDim>(dq, scores, corners, Plan::kK);
  }

  // Epilogue.
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = query + 8 * r;
    store_gradient_row<T>(
        p.dq, p.dq_parts, program.split,
        [&](auto type, const Rows& x) { return head_slice.query_row<decltype(type)>(x, row); }, dq[0], r, p.scale,
        row < head_slice.seqlen_q, lane);
  }
}

// Sizes of the kernel for dk and dv, and where its tiles and the row statistics lie in shared memory (byte offsets).
template <int kHeadDim, int kValueDim>
struct KeyGradientPlan : KeyGradientTileSm80<kHeadDim> {
  using Tile = KeyGradientTileSm80<kHeadDim>;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kTiles = Tile::kBlockM / 8;
  static constexpr int kWarpsPerGradient = Tile::kBlockN / 16;  // each warp has 16 keys
  static constexpr bool kByOffset = kHeadDim == kValueDim;      // ptxas spills a register of the kernel for 192 and 128
  static_assert(Tile::kWarps == kWarpsPerGradient * (Tile::kSplitsGradients ? 2 : 1));
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + Tile::kBlockN * kHeadDim * 2;
  static constexpr uint32_t kQ = kV + Tile::kBlockN * kValueDim * 2;
  static constexpr uint32_t kDout = kQ + Tile::kBlockM * kHeadDim * 2;
  static constexpr uint32_t kRowStatistics = kDout + Tile::kBlockM * kValueDim * 2;
  static constexpr uint32_t kBytes = kRowStatistics + Tile::kBlockM * sizeof(RowStatistics);
  static_assert(kBytes <= kMostSharedBytesSm80);
};

// Computes dk and dv of one block of keys. This is the whole kernel, and every thread of the block calls it. kMakesDk
// and kMakesDv say which gradients this warp sums. Other warps of the block may sum the other gradient of the same
// keys.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral, bool kMakesDk, bool kMakesDv>
GPU_DEVICE void sum_key_gradients(const Params& p) {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim>;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kThreads = Plan::kThreads, kTiles = Plan::kTiles;

  // Find the rows.
  const SplitOfBlock program(block_index_x(), p.dk_splits);
  const WorkTile work = key_gradient_tile<kBlockN, Plan::kByOffset>(p, program.block);
  HeadSlice head_slice = head_slice_of(p, work.batch, work.head * p.group_size, work.head);
  const int first_key = work.block * kBlockN;
  if (first_key >= head_slice.seqlen_k) return;
  const ValidRows<kBlockN> valid = valid_keys<kBlockN>(p, head_slice, work.block);
  BlockRange range =
      blocks_of_split(query_range<kBlockM>(p, head_slice, first_key, min(first_key + kBlockN, head_slice.seqlen_k) - 1),
                      program.split, p.dk_splits);
  if (valid.none()) range.end = range.begin;
  const Lane lane = this_lane();
  const int warp_row = thread_index() / 32 % Plan::kWarpsPerGradient * 16, key = first_key + warp_row + lane.g;
  const bool are_all_valid = valid.all(),
             is_valid[2] = {valid.has(warp_row + lane.g), valid.has(warp_row + lane.g + 8)};

  // Load.
  const uint32_t shared = shared_address(shared_memory());
  const Corners<kHeadDim> corners(shared, warp_row, lane);
  const Corners<kValueDim> value_corners(shared, warp_row, lane);
  const auto load_keys = [&](auto columns, uint32_t tile, const Rows& x) {
    copy_rows<decltype(columns)::value, kBlockN, kThreads, kIsGeneral>(
        tile, x, head_slice.key_row<const T>(x, first_key),
        [&](int first, int offset) { return valid.has(first, offset); });
  };
  const auto load_queries = [&](auto columns, uint32_t tile, const Rows& x, int first_row) {
    copy_rows<decltype(columns)::value, kBlockM, kThreads, kIsGeneral>(
        tile, x, head_slice.query_row<const T>(x, first_row),
        [&](int first, int offset) { return first_row + first + offset < head_slice.seqlen_q; });
    copy_async_commit();
  };

  // Each step visits one block of queries of one query head of the group. advance goes on to the next step, and
  // skip_masked_blocks skips steps in which the mask hides every entry.
  int block = range.begin, steps_left = max(range.end - range.begin, 0) * p.group_size;
  const auto advance = [&] {
    --steps_left;
    if (++block == range.end) {
      block = range.begin;
      ++head_slice.head;
    }
  };
  const auto skip_masked_blocks = [&] {
    if constexpr (kIsGeneral) {
      while (steps_left > 0 && !has_visible_queries<kBlockM, kBlockN>(p, head_slice, block, first_key)) advance();
    }
  };
  skip_masked_blocks();
  if (steps_left > 0) {
    load_keys(Columns<kHeadDim>{}, shared + Plan::kK, p.k);
    load_keys(Columns<kValueDim>{}, shared + Plan::kV, p.v);
    load_queries(Columns<kHeadDim>{}, shared + Plan::kQ, p.q, block * kBlockM);
  }

  // Loop.
  float dk[1][kMakesDk ? kHeadDim / 8 : 1][4], dv[1][kMakesDv ? kValueDim / 8 : 1][4];
  fill(dk[0], 0.0f);
  fill(dv[0], 0.0f);
  while (steps_left > 0) {
    const int first_row = block * kBlockM;
    copy_async_wait<0>();
    sync_threads();  // q has come, and every warp is done with dout and the statistics before
    load_queries(Columns<kValueDim>{}, shared + Plan::kDout, p.dout, first_row);
    if (thread_index() < kBlockM) {
      const RowStatistics statistics = row_statistics(p, head_slice, first_row + thread_index());
      store_shared(shared + Plan::kRowStatistics + thread_index() * sizeof(RowStatistics),
                   Float2{statistics.lse_log2, statistics.delta});
    }
    float probs[1][kTiles][4];
    fill(probs[0], 0.0f);
    multiply_transposed<T, kHeadDim>(probs, corners, Plan::kK, Plan::kQ);

    copy_async_wait<0>();
    sync_threads();  // dout and the statistics have come
    // The columns of a fragment are queries here, and this thread has two of the 8 queries of tile t. The function
    // returns lse_log2 and delta of the first query (x, y) and of the second one (z, w).
    const auto statistics_of = [&](int t) {
      return load_shared<Float4>(shared + Plan::kRowStatistics + (8 * t + 2 * lane.q) * sizeof(RowStatistics));
    };
    const auto lse_of = [](const Float4& statistics, int j) { return j % 2 == 0 ? statistics.x : statistics.z; };
    const auto delta_of = [](const Float4& statistics, int j) { return j % 2 == 0 ? statistics.y : statistics.w; };
    float dscores[1][kTiles][4];
    // Computes dprobs^T = v @ dout^T in the registers of dscores, because dscores will take the place of dprobs.
    const auto multiply_dout_by_values = [&] {
      fill(dscores[0], 0.0f);
      multiply_transposed<T, kValueDim>(dscores, value_corners, Plan::kV, Plan::kDout);
    };
    const bool is_full = range.is_within_band(block) && are_all_valid;
    if constexpr (!kIsGeneral) {
      if (!is_full) hide(probs[0], visible_queries<kBlockM>({p, head_slice}, is_valid, block, key), lane);
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        const Float4 statistics = statistics_of(t);
        GPU_UNROLL for (int j = 0; j < 4; ++j) probs[0][t][j] =
            prob_of(probs[0][t][j], p.scale_log2, lse_of(statistics, j));
      }
      if constexpr (kMakesDv) multiply<T, kValueDim>(dv, probs, value_corners, Plan::kDout);
      if constexpr (kMakesDk) {
        multiply_dout_by_values();
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float4 statistics = statistics_of(t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) dscores[0][t][j] =
              probs[0][t][j] * (dscores[0][t][j] - delta_of(statistics, j));
        }
      }
    } else {
      DropoutKeep<kTiles> dropout_keep{};
      if (p.dropout_seed != nullptr)
        dropout_keep = dropout_keep_of_key_rows<kTiles>(Dropout(p, head_slice), first_row, first_key + warp_row, lane);
      const KeyRows at{first_row + 2 * lane.q, key};
      if constexpr (kMakesDk) {
        multiply_dout_by_values();
        if (p.dropout_seed != nullptr) drop(dscores[0], dropout_keep, p.dropout_scale);
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float4 statistics = statistics_of(t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) dscores[0][t][j] -= delta_of(statistics, j);
        }
        to_logits<T>(p, head_slice, probs[0], at, LogitGradients<kTiles>{dscores[0]});
      } else {
        to_logits<T>(p, head_slice, probs[0], at, NoGradients{});
      }
      const bool has_masked = has_masked_queries<kIsGeneral, kBlockM, kBlockN>(p, head_slice, block, first_key);
      if (!is_full || has_masked) {
        VisibleColumns<kBlockM> visible = visible_queries<kBlockM>({p, head_slice}, is_valid, block, key);
        if (has_masked) hide_masked_queries(p, head_slice, visible, first_row, key);
        hide(probs[0], visible, lane);
      }
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        const Float4 statistics = statistics_of(t);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          probs[0][t][j] = prob_of(probs[0][t][j], p.softmax_scale_log2, lse_of(statistics, j));
          if constexpr (kMakesDk) dscores[0][t][j] *= probs[0][t][j];
        }
      }
      if constexpr (kMakesDv) {
        if (p.dropout_seed != nullptr) drop(probs[0], dropout_keep, 1.0f);
        multiply<T, kValueDim>(dv, probs, value_corners, Plan::kDout);
      }
    }
    if constexpr (kMakesDk) multiply<T, kHeadDim>(dk, dscores, corners, Plan::kQ);
    advance();
    skip_masked_blocks();
    if (steps_left > 0) {
      sync_threads();  // every warp is done with q
      load_queries(Columns<kHeadDim>{}, shared + Plan::kQ, p.q, block * kBlockM);
    }
  }

  // Epilogue.
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = key + 8 * r;
    const bool is_row = row < head_slice.seqlen_k;
    const auto row_of = [&](auto type, const Rows& x) { return head_slice.key_row<decltype(type)>(x, row); };
    if constexpr (kMakesDk) {
      if (p.dk.data != nullptr)
        store_gradient_row<T>(p.dk, p.dk_parts, program.split, row_of, dk[0], r, p.scale, is_row, lane);
    }
    if constexpr (kMakesDv) {
      const float factor = kIsGeneral ? p.dropout_scale : 1.0f;
      if (p.dv.data != nullptr)
        store_gradient_row<T>(p.dv, p.dv_parts, program.split, row_of, dv[0], r, factor, is_row, lane);
    }
  }
}

// Computes dk and dv of one block of keys. With kSplitsGradients, half of the warps sum dk and the other half sum dv.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((KeyGradientPlan<kHeadDim, kValueDim>::kThreads), 1)
    key_gradient_kernel(const GPU_GRID_CONSTANT Params p) {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim>;
  if constexpr (!Plan::kSplitsGradients) {
    sum_key_gradients<T, kHeadDim, kValueDim, kIsGeneral, /*kMakesDk=*/true, /*kMakesDv=*/true>(p);
  } else if (thread_index() / 32 < Plan::kWarpsPerGradient) {
    sum_key_gradients<T, kHeadDim, kValueDim, kIsGeneral, /*kMakesDk=*/true, /*kMakesDv=*/false>(p);
  } else {
    sum_key_gradients<T, kHeadDim, kValueDim, kIsGeneral, /*kMakesDk=*/false, /*kMakesDv=*/true>(p);
  }
}

}  // namespace fused_attn::gpu::sm80
