// Backward for Hopper, in the same two kernels as for Ampere (sm80/backward.h says why): dq by blocks of queries, dk
// and dv by blocks of keys. One warp loads with TMA, two warpgroups multiply with wgmma; weights and their gradients
// stay in registers, as left factors of the products that follow.
#pragma once
#include <cmath>

#include "../dropout.h"
#include "../row_sums.h"
#include "../tiles.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

constexpr int kGradientConsumers = 2;
constexpr int kGradientThreads = kWarpgroup * (1 + kGradientConsumers);
constexpr int kGradientConsumerWarps = kGradientConsumers * kWarpsPerWarpgroup;
constexpr int kGradientProducerRegisters = 40, kGradientConsumerRegisters = 232;
static_assert(fits_registers(kGradientProducerRegisters, kGradientConsumers, kGradientConsumerRegisters));

struct BackwardMaps {
  Map q;
  Map k;
  Map v;
  Map dout;
};

// Rounds a fragment to the left factors of the next product.
template <class T, int kTiles>
GPU_DEVICE void round_fragment(uint32_t (&rounded)[kTiles / 2][4], const float (&x)[kTiles][4]) {
  GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) left_factor<T>(rounded[k], x, k);
}

// ---- dq

template <int kHeadDim>
struct QueryGradientPlan : QueryGradientTileSm90<kHeadDim> {
  using Sizes = QueryGradientTileSm90<kHeadDim>;
  static constexpr int kBlockM = 64 * kGradientConsumers, kBlockN = Sizes::kBlockN, kStages = Sizes::kStages;
  static constexpr int kTiles = kBlockN / 8;
  using QTile = Tile<kHeadDim, kBlockM>;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + QTile::kBytes;
  static constexpr uint32_t kK = kDout + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KeyTile::kBytes;
  static constexpr uint32_t kRings = kV + kStages * KeyTile::kBytes;
  static constexpr uint32_t kBytes = kRings + 256;
  static_assert(kBytes <= 227 * 1024);
};

template <int kHeadDim>
struct QueryGradientRings {
  using Plan = QueryGradientPlan<kHeadDim>;
  Ring<1> q;  // q and dout are loaded once
  Ring<1> dout;
  Ring<Plan::kStages> k;
  Ring<Plan::kStages> v;
  uint32_t cleaning;

  GPU_DEVICE explicit QueryGradientRings(uint32_t shared) {
    q.barriers = shared + Plan::kRings;
    dout.barriers = q.barriers + q.kBytes;
    k.barriers = dout.barriers + dout.kBytes;
    v.barriers = k.barriers + k.kBytes;
    cleaning = v.barriers + v.kBytes;
  }
  GPU_DEVICE void init() const {
    q.init(kGradientConsumerWarps);
    dout.init(kGradientConsumerWarps);
    k.init(kGradientConsumerWarps);
    v.init(kGradientConsumerWarps);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }
};

template <class T, int kHeadDim, bool kHasDropout>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kGradientThreads, 1)
    query_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps) {
  using Plan = QueryGradientPlan<kHeadDim>;
  using KeyTile = typename Plan::KeyTile;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;

  // Which rows.
  const int num_blocks = (p.seqlen_q + kBlockM - 1) / kBlockM;
  const Work work = scheduled_work(block_index_x(), num_blocks, p.num_heads, p.batch, p.heads_per_section, true);
  const Place place = place_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * kBlockM;
  if (first_row >= place.len_q) return;
  const BlockRange range = key_range<kBlockN>(p, place, first_row, min(first_row + kBlockM, place.len_q) - 1);
  int block = last_live_block<kBlockN>(p, place, range.begin, range.end - 1);

  const uint32_t shared = shared_address(shared_memory());
  const QueryGradientRings<kHeadDim> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  RingPosition<Plan::kStages> position;  // of both rings

  if (thread_index() < kWarpgroup) {
    // Load.
    decrease_registers<kGradientProducerRegisters>();
    if (thread_index() >= 32 || block < range.begin) return;
    TileLoader loader{rings.cleaning, thread_index() == 0};
    const int row = place.first_q + first_row;
    loader.load<typename Plan::QTile>(rings.q, {}, shared + Plan::kQ, maps.q, row, place.head, place.batch);
    loader.load<typename Plan::QTile>(rings.dout, {}, shared + Plan::kDout, maps.dout, row, place.head, place.batch);
    for (; block >= range.begin; block = last_live_block<kBlockN>(p, place, range.begin, block - 1)) {
      const KeptKeys<kBlockN> kept = kept_keys<kBlockN>(p, place, block);
      const int key = place.first_k + block * kBlockN;
      loader.load_kept<KeyTile>(rings.k, position, shared + Plan::kK + position.slot() * KeyTile::kBytes, maps.k, key,
                                place.kv_head, place.batch, kept);
      loader.load_kept<KeyTile>(rings.v, position, shared + Plan::kV + position.slot() * KeyTile::kBytes, maps.v, key,
                                place.kv_head, place.batch, kept);
      position.advance();
    }
    return;
  }

  // Loop.
  increase_registers<kGradientConsumerRegisters>();
  const int consumer = thread_index() / kWarpgroup - 1;
  const Lane lane = this_lane();
  const int query = first_row + 64 * consumer + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  const RowSums sums[2] = {row_sums(p, place, query), row_sums(p, place, query + 8)};
  float dq[kHeadDim / 8][4], scores[kTiles][4], dweights[kTiles][4];
  uint32_t dscores[kTiles / 2][4];
  fill(dq, 0.0f);
  if (block >= range.begin) {
    mbarrier_wait(rings.q.full(0), 0);
    mbarrier_wait(rings.dout.full(0), 0);
  }
  for (; block >= range.begin; block = last_live_block<kBlockN>(p, place, range.begin, block - 1)) {
    const uint32_t k_tile = shared + Plan::kK + position.slot() * KeyTile::kBytes;
    const uint32_t v_tile = shared + Plan::kV + position.slot() * KeyTile::kBytes;
    position.wait_full(rings.k);
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockM>(scores, shared + Plan::kQ, 64 * consumer, k_tile);
    wgmma_commit();
    position.wait_full(rings.v);
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockM>(dweights, shared + Plan::kDout, 64 * consumer, v_tile);
    wgmma_commit();
    KeepBits<kTiles> keep;
    if constexpr (kHasDropout) keep = keep_of_query_rows<kTiles>(Dropout(p, place), query, block * kBlockN, lane);

    wgmma_wait<1>();
    keep_registers(flat(scores));
    const KeptKeys<kBlockN> kept = kept_keys<kBlockN>(p, place, block);
    if (!(range.is_within_band(block) && kept.all())) hide(scores, visible_keys(p, kept, block, query), lane);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] = weight_of(scores[t][j], p.scale_log2, sums[j / 2].lse_log2);
    }
    position.wait_full(rings.v);  // again: a branch keeps ptxas from waiting for the product before the exponentials
    wgmma_wait<0>();
    keep_registers(flat(dweights));
    position.release(rings.v);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) {
        if constexpr (kHasDropout) dweights[t][j] = keep.has(t, j) ? dweights[t][j] * p.dropout_scale : 0.0f;
        scores[t][j] *= dweights[t][j] - sums[j / 2].delta;
      }
    }
    round_fragment<T>(dscores, scores);
    wgmma_fence();
    start_multiply<T, kHeadDim>(dq, dscores, k_tile);
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(flat(dq));
    position.release(rings.k);
    position.advance();
  }

  // Epilogue.
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = query + 8 * r;
    store_row<T>(place.query_row<T>(p.dq, row), dq, r, p.scale, row < place.len_q, lane);
  }
}

// ---- dk and dv

template <int kHeadDim>
struct KeyGradientPlan : KeyGradientTileSm90<kHeadDim> {
  using Sizes = KeyGradientTileSm90<kHeadDim>;
  static constexpr int kBlockN = Sizes::kSplitsGradients ? 64 : 128;
  static constexpr int kBlockM = Sizes::kBlockM, kStages = Sizes::kStages;
  static constexpr int kTiles = kBlockM / 8;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  using QTile = Tile<kHeadDim, kBlockM>;
  static constexpr uint32_t kSumsBytes = kBlockM * sizeof(RowSums);
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + KeyTile::kBytes;
  static constexpr uint32_t kQ = kV + KeyTile::kBytes;
  static constexpr uint32_t kDout = kQ + kStages * QTile::kBytes;
  static constexpr uint32_t kSums = kDout + kStages * QTile::kBytes;
  static constexpr uint32_t kRings = kSums + kStages * kSumsBytes;
  static constexpr uint32_t kBytes = kRings + 256;
  static_assert(kBytes <= 227 * 1024);
};

template <int kHeadDim>
struct KeyGradientRings {
  using Plan = KeyGradientPlan<kHeadDim>;
  Ring<1> k;  // k and v are loaded once
  Ring<1> v;
  Ring<Plan::kStages> q;
  Ring<Plan::kStages> dout;
  Ring<Plan::kStages> sums;
  uint32_t cleaning;

  GPU_DEVICE explicit KeyGradientRings(uint32_t shared) {
    k.barriers = shared + Plan::kRings;
    v.barriers = k.barriers + k.kBytes;
    q.barriers = v.barriers + v.kBytes;
    dout.barriers = q.barriers + q.kBytes;
    sums.barriers = dout.barriers + dout.kBytes;
    cleaning = sums.barriers + sums.kBytes;
  }
  GPU_DEVICE void init() const {
    k.init(kGradientConsumerWarps);
    v.init(kGradientConsumerWarps);
    q.init(kGradientConsumerWarps);
    dout.init(kGradientConsumerWarps);
    sums.init(kGradientConsumerWarps);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }
};

// A block of keys, and the blocks of queries of all heads of the group that see them, one a step.
template <int kHeadDim>
struct KeyWork {
  using Plan = KeyGradientPlan<kHeadDim>;
  Place place;  // its head is that of the step
  int32_t first_key;
  KeptKeys<Plan::kBlockN> kept;
  BlockRange range;
  int32_t steps_left;
  int32_t block;  // of queries, of the step

  GPU_DEVICE explicit KeyWork(const Params& p) {
    const int num_blocks = (p.seqlen_k + Plan::kBlockN - 1) / Plan::kBlockN, kv_heads = p.num_heads / p.group_size;
    const Work work = scheduled_work(block_index_x(), num_blocks, kv_heads, p.batch, p.heads_per_section, false);
    place = place_of(p, work.batch, work.head * p.group_size, work.head);
    first_key = work.block * Plan::kBlockN;
    kept = kept_keys<Plan::kBlockN>(p, place, work.block);
    range = query_range<Plan::kBlockM>(p, place, first_key, min(first_key + Plan::kBlockN, place.len_k) - 1);
    steps_left = kept.none() ? 0 : max(range.end - range.begin, 0) * p.group_size;
    block = range.begin;
  }
  GPU_DEVICE bool is_empty() const { return first_key >= place.len_k; }
  GPU_DEVICE void advance() {
    --steps_left;
    if (++block < range.end) return;
    block = range.begin;
    ++place.head;
  }
};

template <int kHeadDim>
GPU_DEVICE void load_key_work(const Params& p, const BackwardMaps& maps, uint32_t shared,
                              const KeyGradientRings<kHeadDim>& rings, KeyWork<kHeadDim>& work) {
  using Plan = KeyGradientPlan<kHeadDim>;
  using QTile = typename Plan::QTile;
  TileLoader loader{rings.cleaning, thread_index() == 0};
  RingPosition<Plan::kStages> position;  // of both rings for queries
  const Place& place = work.place;
  const int key = place.first_k + work.first_key;
  loader.load<typename Plan::KeyTile>(rings.k, {}, shared + Plan::kK, maps.k, key, place.kv_head, place.batch);
  loader.load_kept<typename Plan::KeyTile>(rings.v, {}, shared + Plan::kV, maps.v, key, place.kv_head, place.batch,
                                           work.kept);
  for (; work.steps_left > 0; work.advance()) {
    const int first_row = work.block * Plan::kBlockM;
    KeptKeys<Plan::kBlockM> rows;  // those of the sequence: only a packed tensor has others after them
    GPU_UNROLL for (int w = 0; w < rows.kWords; ++w) {
      rows.words[w] = p.cu_seqlens_q != nullptr ? column_bits(0, place.len_q - first_row, w) : ~0u;
    }
    loader.load_kept<QTile>(rings.q, position, shared + Plan::kQ + position.slot() * QTile::kBytes, maps.q,
                            place.first_q + first_row, place.head, place.batch, rows);
    loader.load_kept<QTile>(rings.dout, position, shared + Plan::kDout + position.slot() * QTile::kBytes, maps.dout,
                            place.first_q + first_row, place.head, place.batch, rows);
    position.advance();
  }
}

// By a warp of its own, because registers are few where TMA is issued.
template <int kHeadDim>
GPU_DEVICE void load_row_sums(const Params& p, uint32_t shared, const KeyGradientRings<kHeadDim>& rings,
                              KeyWork<kHeadDim>& work) {
  using Plan = KeyGradientPlan<kHeadDim>;
  const int lane = this_lane().index;
  RingPosition<Plan::kStages> position;
  for (; work.steps_left > 0; work.advance()) {
    if (lane == 0) position.wait_empty(rings.sums);
    sync_warp();
    const uint32_t sums_tile = shared + Plan::kSums + position.slot() * Plan::kSumsBytes;
    for (int row = lane; row < Plan::kBlockM; row += 32) {
      const RowSums sums = row_sums(p, work.place, work.block * Plan::kBlockM + row);
      store_shared(sums_tile + row * sizeof(RowSums), Float2{sums.lse_log2, sums.delta});
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(rings.sums.full(position.slot()));
    position.advance();
  }
}

// kMakesDk, kMakesDv: which gradients this warpgroup sums. first_row: of its keys in the block.
template <class T, int kHeadDim, bool kHasDropout, bool kMakesDk, bool kMakesDv>
GPU_DEVICE void sum_key_gradients(const Params& p, uint32_t shared, const KeyGradientRings<kHeadDim>& rings,
                                  KeyWork<kHeadDim>& work, int first_row) {
  using Plan = KeyGradientPlan<kHeadDim>;
  using QTile = typename Plan::QTile;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;
  const Lane lane = this_lane();
  const int warp_row = first_row + thread_index() % kWarpgroup / 32 * 16;
  const int key = work.first_key + warp_row + lane.g;
  bool is_kept[2];
  const bool are_all_kept = work.kept.all();
  GPU_UNROLL for (int r = 0; r < 2; ++r) is_kept[r] = work.kept.has(warp_row + lane.g + 8 * r);
  RingPosition<Plan::kStages> position;  // of all three rings

  float dk[kMakesDk ? kHeadDim / 8 : 1][4], dv[kMakesDv ? kHeadDim / 8 : 1][4];
  float weights[kTiles][4], dweights[kTiles][4];
  uint32_t rounded_weights[kTiles / 2][4], rounded_dscores[kTiles / 2][4];
  fill(dk, 0.0f);
  fill(dv, 0.0f);
  if (work.steps_left > 0) {
    mbarrier_wait(rings.k.full(0), 0);
    mbarrier_wait(rings.v.full(0), 0);
  }
  for (; work.steps_left > 0; work.advance()) {
    const uint32_t q_tile = shared + Plan::kQ + position.slot() * QTile::kBytes;
    const uint32_t dout_tile = shared + Plan::kDout + position.slot() * QTile::kBytes;
    const uint32_t sums_tile = shared + Plan::kSums + position.slot() * Plan::kSumsBytes;
    KeepBits<kTiles> keep;
    if constexpr (kHasDropout) {  // while few registers are in use
      keep = keep_of_key_rows<kTiles>(Dropout(p, work.place), work.block * kBlockM, key - lane.g, lane);
    }
    position.wait_full(rings.q);
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockN>(weights, shared + Plan::kK, first_row, q_tile);
    wgmma_commit();
    position.wait_full(rings.dout);
    if constexpr (kMakesDk) {
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN>(dweights, shared + Plan::kV, first_row, dout_tile);
      wgmma_commit();
    }

    // The weights, and dv.
    wgmma_wait<kMakesDk ? 1 : 0>();
    keep_registers(flat(weights));
    if (!(work.range.is_within_band(work.block) && are_all_kept)) {
      hide(weights, visible_queries<kBlockM>(p, is_kept, work.block, key), lane);
    }
    // lse_log2 and delta of the queries of tile t that this thread has: (lse_log2, delta, lse_log2, delta).
    const auto sums_of = [&](int t) { return load_shared<Float4>(sums_tile + (8 * t + 2 * lane.q) * sizeof(RowSums)); };
    position.wait_full(rings.sums);
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      const Float4 sums = sums_of(t);
      GPU_UNROLL for (int j = 0; j < 4; ++j) {
        weights[t][j] = weight_of(weights[t][j], p.scale_log2, j % 2 == 0 ? sums.x : sums.z);
        // The sign says what is dropped, so that the bits need no register any longer.
        if (kHasDropout && !keep.has(t, j)) weights[t][j] = -weights[t][j];
      }
    }
    if constexpr (kMakesDv) {
      float dropped[kTiles][4];
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        GPU_UNROLL for (int j = 0; j < 4; ++j) dropped[t][j] =
            kHasDropout && weights[t][j] < 0.0f ? 0.0f : weights[t][j];
      }
      round_fragment<T>(rounded_weights, dropped);
    }

    // Their gradients, and dk.
    if constexpr (kMakesDk) {
      position.wait_full(
          rings.dout);  // again: a branch keeps ptxas from waiting for the product before the exponentials
      wgmma_wait<0>();
      keep_registers(flat(dweights));
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        const Float4 sums = sums_of(t);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          float dweight = dweights[t][j];
          if constexpr (kHasDropout) dweight = weights[t][j] < 0.0f ? 0.0f : dweight * p.dropout_scale;
          weights[t][j] = fabsf(weights[t][j]) * (dweight - (j % 2 == 0 ? sums.y : sums.w));
        }
      }
      round_fragment<T>(rounded_dscores, weights);
    }
    position.release(rings.sums);
    wgmma_fence();
    if constexpr (kMakesDv) start_multiply<T, kHeadDim>(dv, rounded_weights, dout_tile);
    if constexpr (kMakesDk) start_multiply<T, kHeadDim>(dk, rounded_dscores, q_tile);
    wgmma_commit();
    wgmma_wait<0>();
    if constexpr (kMakesDv) keep_registers(flat(dv));
    if constexpr (kMakesDk) keep_registers(flat(dk));
    position.release(rings.q);
    position.release(rings.dout);
    position.advance();
  }

  // Epilogue. Where the keys lie is worked out again, rather than kept in registers.
  const Place place = KeyWork<kHeadDim>(p).place;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = key + 8 * r;
    const bool is_row = row < place.len_k;
    if constexpr (kMakesDk) {
      if (p.dk.data != nullptr) store_row<T>(place.key_row<T>(p.dk, row), dk, r, p.scale, is_row, lane);
    }
    if constexpr (kMakesDv) {
      const float factor = kHasDropout ? p.dropout_scale : 1.0f;
      if (p.dv.data != nullptr) store_row<T>(place.key_row<T>(p.dv, row), dv, r, factor, is_row, lane);
    }
  }
}

template <class T, int kHeadDim, bool kHasDropout>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kGradientThreads, 1)
    key_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps) {
  using Plan = KeyGradientPlan<kHeadDim>;
  KeyWork<kHeadDim> work(p);
  if (work.is_empty()) return;
  const uint32_t shared = shared_address(shared_memory());
  const KeyGradientRings<kHeadDim> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = thread_index() / kWarpgroup;
  if (warpgroup == 0) {
    decrease_registers<kGradientProducerRegisters>();
    if (work.steps_left > 0) {
      if (thread_index() < 32) load_key_work(p, maps, shared, rings, work);
      if (thread_index() / 32 == 1) load_row_sums(p, shared, rings, work);
    }
  } else {
    increase_registers<kGradientConsumerRegisters>();
    if constexpr (!Plan::kSplitsGradients) {
      sum_key_gradients<T, kHeadDim, kHasDropout, true, true>(p, shared, rings, work, 64 * (warpgroup - 1));
    } else if (warpgroup == 1) {
      sum_key_gradients<T, kHeadDim, kHasDropout, true, false>(p, shared, rings, work, 0);
    } else {
      sum_key_gradients<T, kHeadDim, kHasDropout, false, true>(p, shared, rings, work, 0);
    }
  }
}

}  // namespace fused_attn::gpu::sm90
