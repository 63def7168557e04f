// Backward for Hopper in two kernels, as for Ampere (sm80/backward.h says why): query_gradient_kernel computes dq by
// blocks of queries, key_gradient_kernel computes dk and dv by blocks of keys. In each block of threads, one warpgroup
// loads with TMA and two consumer warpgroups multiply with wgmma. Probs and dscores stay in registers, as left factors
// of the products for the gradients.
//
// These kernels run with head dims above 128. With smaller head dims, fused_backward.h runs instead.
#pragma once
#include <cmath>

#include "../dropout.h"
#include "../gradient_splits.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../row_statistics.h"
#include "../splits.h"
#include "../tile_scheduler.h"
#include "../tiles.h"
#include "bias_tiles.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

constexpr int kGradientConsumers = 2;  // warpgroups that multiply, in both kernels and in bias_gradient.h
constexpr int kGradientThreads = kWarpgroup * (1 + kGradientConsumers);
constexpr int kGradientConsumerWarps = kGradientConsumers * kWarpsPerWarpgroup;
constexpr int kGradientProducerRegisters = 40, kGradientConsumerRegisters = 232;
static_assert(fits_registers(kGradientProducerRegisters, kGradientConsumers, kGradientConsumerRegisters));

// Tensor maps, by which TMA loads tiles of query, key, value, dout and, for the fused backward, a dense bias.
struct BackwardMaps {
  Map q;
  Map k;
  Map v;
  Map dout;
  BiasMap bias;
};

// Rounds all columns of a fragment to T, as left factors of the next product. Each thread rounds its own entries.
template <class T, int kTiles>
GPU_DEVICE void round_fragment(uint32_t (&rounded)[kTiles / 2][4], const float (&x)[kTiles][4]) {
  GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) left_factor<T>(rounded[k], x, k);
}

// ---- dq

// Sizes of the kernel for dq: threads, registers, and where each tile and barrier lies in shared memory (byte offsets).
template <int kHeadDim, int kValueDim, bool kIsGeneral>
struct QueryGradientPlan : QueryGradientTileSm90<kHeadDim, kIsGeneral> {
  using Sizes = QueryGradientTileSm90<kHeadDim, kIsGeneral>;
  static constexpr int kBlockM = 64 * kGradientConsumers, kBlockN = Sizes::kBlockN, kStages = Sizes::kStages;
  static constexpr int kTiles = kBlockN / 8;
  // The loading warp of a general kernel needs more registers, because it reads the map of the mask to find the next
  // block of keys with a visible entry.
  static constexpr int kProducerRegisters = kIsGeneral ? 56 : kGradientProducerRegisters;
  static constexpr int kConsumerRegisters = kIsGeneral ? 224 : kGradientConsumerRegisters;
  static_assert(fits_registers(kProducerRegisters, kGradientConsumers, kConsumerRegisters));
  using QTile = Tile<kHeadDim, kBlockM>;
  using DoutTile = Tile<kValueDim, kBlockM>;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  using ValueTile = Tile<kValueDim, kBlockN>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + QTile::kBytes;
  static constexpr uint32_t kK = kDout + DoutTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KeyTile::kBytes;
  static constexpr uint32_t kRings = kV + kStages * ValueTile::kBytes;
  static constexpr uint32_t kBytes = kRings + 256;
  static_assert(kBytes <= 227 * 1024);
};

// The rings of the kernel for dq. Queries and dout of the block are loaded once; keys and values block by block.
template <int kHeadDim, int kValueDim, bool kIsGeneral>
struct QueryGradientRings {
  using Plan = QueryGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  Ring<1> q;
  Ring<1> dout;
  Ring<Plan::kStages> k;
  Ring<Plan::kStages> v;
  uint32_t cleaning;

  GPU_DEVICE explicit QueryGradientRings(uint32_t shared) {
    cleaning = lay_out_rings<Plan::kBytes - Plan::kRings, 8>(shared + Plan::kRings, q, dout, k, v);
  }
  GPU_DEVICE void init() const {
    init_rings(kGradientConsumerWarps, q, dout, k, v);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }
};

// Computes dq of kBlockM queries of one head. The block of threads visits the blocks of keys that these queries see,
// from the last one to the first. Every warp finds the next block of keys by itself, with last_to_visit.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kGradientThreads, 1)
    query_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps) {
  using Plan = QueryGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  using KeyTile = typename Plan::KeyTile;
  using ValueTile = typename Plan::ValueTile;
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;

  // Find the rows.
  const SplitOfBlock program(block_index_x(), p.dq_splits);
  const WorkTile work = query_gradient_tile<kBlockM>(p, program.block, p.seqlen_q);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * kBlockM;
  if (first_row >= head_slice.seqlen_q) return;
  const BlockRange range =
      blocks_of_split(key_range<kBlockN>(p, head_slice, first_row, min(first_row + kBlockM, head_slice.seqlen_q) - 1),
                      program.split, p.dq_splits);
  // shuffle tells the compiler that a warp agrees about the block, and so about the end of the loops. Otherwise it
  // would compute descriptors in ordinary registers, and move them between the products.
  const int first_block = shuffle(range.begin, 0);
  const auto last_to_visit = [&](int block) {
    return shuffle(last_block_to_visit<kIsGeneral, kBlockM, kBlockN>(p, head_slice, first_row, first_block, block), 0);
  };
  int block = last_to_visit(range.end - 1);

  const uint32_t shared = shared_address(shared_memory());
  const QueryGradientRings<kHeadDim, kValueDim, kIsGeneral> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  RingPosition<Plan::kStages> position;  // in the rings for k and v

  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // for the same reason
  if (warpgroup == 0) {
    // Load.
    decrease_registers<Plan::kProducerRegisters>();
    if (thread_index() >= 32 || block < range.begin) return;
    TileLoader loader{rings.cleaning, thread_index() == 0};
    const int row = head_slice.q_offset + first_row;
    loader.load<typename Plan::QTile>(rings.q, {}, shared + Plan::kQ, {maps.q, row, head_slice.head, head_slice.batch});
    loader.load<typename Plan::DoutTile>(rings.dout, {}, shared + Plan::kDout,
                                         {maps.dout, row, head_slice.head, head_slice.batch});
    for (; block >= first_block; block = last_to_visit(block - 1)) {
      const ValidRows<kBlockN> valid = valid_keys<kBlockN>(p, head_slice, block);
      const int key = head_slice.k_offset + block * kBlockN;
      loader.load_valid<KeyTile>(rings.k, position, shared + Plan::kK + position.slot() * KeyTile::kBytes,
                                 {maps.k, key, head_slice.kv_head, head_slice.batch}, valid);
      loader.load_valid<ValueTile>(rings.v, position, shared + Plan::kV + position.slot() * ValueTile::kBytes,
                                   {maps.v, key, head_slice.kv_head, head_slice.batch}, valid);
      position.advance();
    }
    return;
  }

  // Loop.
  increase_registers<Plan::kConsumerRegisters>();
  const int consumer = warpgroup - 1;
  const Lane lane = this_lane();
  const int query = first_row + 64 * consumer + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  const RowStatistics statistics[2] = {row_statistics(p, head_slice, query), row_statistics(p, head_slice, query + 8)};
  float dq[kHeadDim / 8][4], scores[kTiles][4], dprobs[kTiles][4];
  uint32_t dscores[kTiles / 2][4];
  fill(dq, 0.0f);
  if (block >= range.begin) {
    mbarrier_wait(rings.q.full(0), 0);
    mbarrier_wait(rings.dout.full(0), 0);
  }
  for (; block >= first_block; block = last_to_visit(block - 1)) {
    const uint32_t k_tile = shared + Plan::kK + position.slot() * KeyTile::kBytes;
    const uint32_t v_tile = shared + Plan::kV + position.slot() * ValueTile::kBytes;
    // Which keys are valid is read again where a block is not full: so a full block reads it while no product waits,
    // and keeps one bit of it.
    const bool is_full = range.is_within_band(block) && valid_keys<kBlockN>(p, head_slice, block).all();
    position.wait_full(rings.k);
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockM>(scores, shared + Plan::kQ, 64 * consumer, k_tile);
    wgmma_commit();
    position.wait_full(rings.v);
    wgmma_fence();
    start_multiply_transposed<T, kValueDim, kBlockM>(dprobs, shared + Plan::kDout, 64 * consumer, v_tile);
    wgmma_commit();
    if constexpr (!kIsGeneral) {
      wgmma_wait<1>();
      keep_registers(flat(scores));
      if (!is_full)
        hide(scores, visible_keys({p, head_slice}, valid_keys<kBlockN>(p, head_slice, block), block, query), lane);
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] =
            prob_of(scores[t][j], p.scale_log2, statistics[j / 2].lse_log2);
      }
      // The second wait for the same tile returns at once. It is here for its branch, which keeps ptxas from moving
      // wgmma_wait before the exponentials.
      position.wait_full(rings.v);
      wgmma_wait<0>();
      keep_registers(flat(dprobs));
      position.release(rings.v);
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] *= dprobs[t][j] - statistics[j / 2].delta;
      }
    } else {
      const int first_key = block * kBlockN;
      DropoutKeep<kTiles> dropout_keep{};
      if (p.dropout_seed != nullptr)
        dropout_keep = dropout_keep_of_query_rows<kTiles>(Dropout(p, head_slice), query, first_key, lane);
      wgmma_wait<0>();  // waits for dprobs, too, because to_logits multiplies them by the derivative of the softcap
      keep_registers(flat(scores));
      keep_registers(flat(dprobs));
      position.release(rings.v);
      if (p.dropout_seed != nullptr) drop(dprobs, dropout_keep, p.dropout_scale);
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        GPU_UNROLL for (int j = 0; j < 4; ++j) dprobs[t][j] -= statistics[j / 2].delta;
      }
      to_logits<T>(p, head_slice, scores, QueryRows{query, first_key + 2 * lane.q}, LogitGradients<kTiles>{dprobs});
      const bool has_masked = has_masked_keys<kIsGeneral, kBlockM, kBlockN>(p, head_slice, first_row, block);
      if (!is_full || has_masked) {
        VisibleColumns<kBlockN> visible =
            visible_keys({p, head_slice}, valid_keys<kBlockN>(p, head_slice, block), block, query);
        if (has_masked) hide_masked_keys(p, head_slice, visible, query, first_key);
        hide(scores, visible, lane);
      }
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] =
            prob_of(scores[t][j], p.softmax_scale_log2, statistics[j / 2].lse_log2) * dprobs[t][j];
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
    store_gradient_row<T>(
        p.dq, p.dq_parts, program.split,
        [&](auto type, const Rows& x) { return head_slice.query_row<decltype(type)>(x, row); }, dq, r, p.scale,
        row < head_slice.seqlen_q, lane);
  }
}

// ---- dk and dv

// Sizes of the kernel for dk and dv, and where each tile and barrier lies in shared memory (byte offsets).
template <int kHeadDim, int kValueDim, bool kIsGeneral>
struct KeyGradientPlan : KeyGradientTileSm90<kHeadDim, kIsGeneral> {
  using Sizes = KeyGradientTileSm90<kHeadDim, kIsGeneral>;
  static constexpr int kBlockN = 64;
  static constexpr int kBlockM = Sizes::kBlockM, kStages = Sizes::kStages;
  static constexpr int kTiles = kBlockM / 8;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  using ValueTile = Tile<kValueDim, kBlockN>;
  using QTile = Tile<kHeadDim, kBlockM>;
  using DoutTile = Tile<kValueDim, kBlockM>;
  static constexpr uint32_t kStatisticsBytes = kBlockM * sizeof(RowStatistics);
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + KeyTile::kBytes;
  static constexpr uint32_t kQ = kV + ValueTile::kBytes;
  static constexpr uint32_t kDout = kQ + kStages * QTile::kBytes;
  static constexpr uint32_t kStatistics = kDout + kStages * DoutTile::kBytes;
  static constexpr uint32_t kRings = kStatistics + kStages * kStatisticsBytes;
  static constexpr uint32_t kBytes = kRings + 256;
  static_assert(kBytes <= 227 * 1024);
};

// The rings of the kernel for dk and dv. Keys and values of the block are loaded once; queries, dout and the row
// statistics tile by tile.
template <int kHeadDim, int kValueDim, bool kIsGeneral>
struct KeyGradientRings {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  Ring<1> k;
  Ring<1> v;
  Ring<Plan::kStages> q;
  Ring<Plan::kStages> dout;
  Ring<Plan::kStages> statistics;
  uint32_t cleaning;

  GPU_DEVICE explicit KeyGradientRings(uint32_t shared) {
    cleaning = lay_out_rings<Plan::kBytes - Plan::kRings, 8>(shared + Plan::kRings, k, v, q, dout, statistics);
  }
  GPU_DEVICE void init() const {
    init_rings(kGradientConsumerWarps, k, v, q, dout, statistics);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }
};

// The steps of the kernel for dk and dv. A block of threads has one block of keys, and each step visits one block of
// queries that sees these keys, of one head of the group. Every thread has a KeyWork of its own and advances it, so
// that the warps need not tell one another which step comes next.
template <int kHeadDim, int kValueDim, bool kIsGeneral>
struct KeyWork {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  HeadSlice head_slice;  // head_slice.head is the query head of the current step
  int32_t first_key;
  ValidRows<Plan::kBlockN> valid;  // which keys of the block are valid
  BlockRange range;                // blocks of queries that see some key of the block, by the band
  int32_t steps_left;              // with the current step; skipped steps count until they are skipped
  int32_t block;                   // number of the block of queries of the current step

  const Params& p;

  GPU_DEVICE explicit KeyWork(const Params& params) : p(params) {
    const SplitOfBlock program(block_index_x(), p.dk_splits);
    const WorkTile work = key_gradient_tile<Plan::kBlockN>(p, program.block);
    head_slice = head_slice_of(p, work.batch, work.head * p.group_size, work.head);
    first_key = work.block * Plan::kBlockN;
    valid = valid_keys<Plan::kBlockN>(p, head_slice, work.block);
    range = blocks_of_split(
        query_range<Plan::kBlockM>(p, head_slice, first_key, min(first_key + Plan::kBlockN, head_slice.seqlen_k) - 1),
        program.split, p.dk_splits);
    steps_left = valid.none() ? 0 : max(range.end - range.begin, 0) * p.group_size;
    block = range.begin;
    skip_masked_blocks();
  }
  // Whether the block of keys lies beyond the end of its sequence, so that there is nothing to store.
  GPU_DEVICE bool is_empty() const { return first_key >= head_slice.seqlen_k; }
  // Goes on to the next step that has a visible entry by the mask.
  GPU_DEVICE void advance() {
    next_block();
    skip_masked_blocks();
  }

 private:
  // Goes on to the next block of queries, or to the first one of the next head of the group.
  GPU_DEVICE void next_block() {
    --steps_left;
    if (++block < range.end) return;
    block = range.begin;
    ++head_slice.head;
  }
  // Skips steps in which the mask hides every entry.
  GPU_DEVICE void skip_masked_blocks() {
    if constexpr (kIsGeneral) {
      while (steps_left > 0 && !has_visible_queries<Plan::kBlockM, Plan::kBlockN>(p, head_slice, block, first_key))
        next_block();
    }
  }
};

// The role of the loading warp: loads keys and values once, and queries and dout for each step. All lanes of the warp
// call this.
template <int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_DEVICE void load_key_work(const Params& p, const BackwardMaps& maps, uint32_t shared,
                              const KeyGradientRings<kHeadDim, kValueDim, kIsGeneral>& rings,
                              KeyWork<kHeadDim, kValueDim, kIsGeneral>& work) {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  using QTile = typename Plan::QTile;
  using DoutTile = typename Plan::DoutTile;
  TileLoader loader{rings.cleaning, thread_index() == 0};
  RingPosition<Plan::kStages> position;  // in the rings for q and dout
  const HeadSlice& head_slice = work.head_slice;
  const int key = head_slice.k_offset + work.first_key;
  if constexpr (kIsGeneral) {
    // Keys that are not valid may hold NaN, and then their scores are NaN. The plain kernel hides these scores. In the
    // general kernel, the derivative of the softcap would be NaN as well, and so would its product with a prob of 0.
    loader.load_valid<typename Plan::KeyTile>(rings.k, {}, shared + Plan::kK,
                                              {maps.k, key, head_slice.kv_head, head_slice.batch}, work.valid);
  } else {
    loader.load<typename Plan::KeyTile>(rings.k, {}, shared + Plan::kK,
                                        {maps.k, key, head_slice.kv_head, head_slice.batch});
  }
  loader.load_valid<typename Plan::ValueTile>(rings.v, {}, shared + Plan::kV,
                                              {maps.v, key, head_slice.kv_head, head_slice.batch}, work.valid);
  for (; work.steps_left > 0; work.advance()) {
    const int first_row = work.block * Plan::kBlockM;
    // The rows that belong to the sequence. In a packed tensor, rows of another sequence follow. Otherwise TMA loads
    // zeros behind the last row, and no row needs a test.
    ValidRows<Plan::kBlockM> rows;
    GPU_UNROLL for (int w = 0; w < rows.kWords; ++w) {
      rows.words[w] = p.cu_seqlens_q != nullptr ? column_bits(0, head_slice.seqlen_q - first_row, w) : ~0u;
    }
    loader.load_valid<QTile>(rings.q, position, shared + Plan::kQ + position.slot() * QTile::kBytes,
                             {maps.q, head_slice.q_offset + first_row, head_slice.head, head_slice.batch}, rows);
    loader.load_valid<DoutTile>(rings.dout, position, shared + Plan::kDout + position.slot() * DoutTile::kBytes,
                                {maps.dout, head_slice.q_offset + first_row, head_slice.head, head_slice.batch}, rows);
    position.advance();
  }
}

// Copies lse_log2 and delta of the queries of each step to shared memory, when the consumers have released the slot. A
// second warp of the first warpgroup calls this, because the first warp, which issues TMA, would need more registers
// than it has.
template <int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_DEVICE void load_row_statistics(const Params& p, uint32_t shared,
                                    const KeyGradientRings<kHeadDim, kValueDim, kIsGeneral>& rings,
                                    KeyWork<kHeadDim, kValueDim, kIsGeneral>& work) {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  const int lane = this_lane().index;
  RingPosition<Plan::kStages> position;
  for (; work.steps_left > 0; work.advance()) {
    if (lane == 0) position.wait_empty(rings.statistics);
    sync_warp();
    const uint32_t statistics_tile = shared + Plan::kStatistics + position.slot() * Plan::kStatisticsBytes;
    for (int row = lane; row < Plan::kBlockM; row += 32) {
      const RowStatistics statistics = row_statistics(p, work.head_slice, work.block * Plan::kBlockM + row);
      store_shared(statistics_tile + row * sizeof(RowStatistics), Float2{statistics.lse_log2, statistics.delta});
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(rings.statistics.full(position.slot()));
    position.advance();
  }
}

// Sums dk (kMakesDk), or else dv, of the block of keys over all steps, and stores the gradient. All threads of a
// consumer warpgroup call this.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral, bool kMakesDk>
GPU_DEVICE void sum_key_gradient(const Params& p, uint32_t shared,
                                 const KeyGradientRings<kHeadDim, kValueDim, kIsGeneral>& rings,
                                 KeyWork<kHeadDim, kValueDim, kIsGeneral>& work) {
  using Plan = KeyGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  using QTile = typename Plan::QTile;
  using DoutTile = typename Plan::DoutTile;
  constexpr int kDim = kMakesDk ? kHeadDim : kValueDim;  // columns of the gradient
  constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;
  const Lane lane = this_lane();
  const int warp_row = thread_index() % kWarpgroup / 32 * 16;
  const int key = work.first_key + warp_row + lane.g;
  bool is_valid[2];
  const bool are_all_valid = work.valid.all();
  GPU_UNROLL for (int r = 0; r < 2; ++r) is_valid[r] = work.valid.has(warp_row + lane.g + 8 * r);
  RingPosition<Plan::kStages> position;  // in the rings for q, dout and the statistics

  float gradient[kDim / 8][4], probs[kTiles][4], dprobs[kTiles][4];
  uint32_t rounded[kTiles / 2][4];  // the left factor of the product for the gradient: dscores for dk, probs for dv
  fill(gradient, 0.0f);
  if (work.steps_left > 0) {
    mbarrier_wait(rings.k.full(0), 0);
    mbarrier_wait(rings.v.full(0), 0);
  }
  for (; work.steps_left > 0; work.advance()) {
    const uint32_t q_tile = shared + Plan::kQ + position.slot() * QTile::kBytes;
    const uint32_t dout_tile = shared + Plan::kDout + position.slot() * DoutTile::kBytes;
    const uint32_t statistics_tile = shared + Plan::kStatistics + position.slot() * Plan::kStatisticsBytes;
    DropoutKeep<kTiles> dropout_keep{};
    if constexpr (kIsGeneral) {  // Philox runs before the products, while few registers are in use
      if (p.dropout_seed != nullptr)
        dropout_keep =
            dropout_keep_of_key_rows<kTiles>(Dropout(p, work.head_slice), work.block * kBlockM, key - lane.g, lane);
    }
    position.wait_full(rings.q);
    wgmma_fence();
    start_multiply_transposed<T, kHeadDim, kBlockN>(probs, shared + Plan::kK, 0, q_tile);
    wgmma_commit();
    position.wait_full(rings.dout);
    if constexpr (kMakesDk) {
      wgmma_fence();
      start_multiply_transposed<T, kValueDim, kBlockN>(dprobs, shared + Plan::kV, 0, dout_tile);
      wgmma_commit();
    }

    // The columns of a fragment are queries here, and this thread has two of the 8 queries of tile t. The function
    // returns lse_log2 and delta of the first query (x, y) and of the second one (z, w).
    const auto statistics_of = [&](int t) {
      return load_shared<Float4>(statistics_tile + (8 * t + 2 * lane.q) * sizeof(RowStatistics));
    };
    const bool is_full = work.range.is_within_band(work.block) && are_all_valid;
    if constexpr (!kIsGeneral) {
      wgmma_wait<kMakesDk ? 1 : 0>();
      keep_registers(flat(probs));
      if (!is_full) hide(probs, visible_queries<kBlockM>({p, work.head_slice}, is_valid, work.block, key), lane);
      position.wait_full(rings.statistics);
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        const Float4 statistics = statistics_of(t);
        GPU_UNROLL for (int j = 0; j < 4; ++j) probs[t][j] =
            prob_of(probs[t][j], p.scale_log2, j % 2 == 0 ? statistics.x : statistics.z);
      }
      if constexpr (kMakesDk) {
        // The second wait for the same tile returns at once. It is here for its branch, which keeps ptxas from moving
        // wgmma_wait before the exponentials.
        position.wait_full(rings.dout);
        wgmma_wait<0>();
        keep_registers(flat(dprobs));
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float4 statistics = statistics_of(t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) probs[t][j] *=
              dprobs[t][j] - (j % 2 == 0 ? statistics.y : statistics.w);
        }
      }
      round_fragment<T>(rounded, probs);
    } else {
      wgmma_wait<0>();  // waits for dprobs, too, because to_logits multiplies them by the derivative of the softcap
      keep_registers(flat(probs));
      if constexpr (kMakesDk) keep_registers(flat(dprobs));
      position.wait_full(rings.statistics);
      if constexpr (kMakesDk) {
        if (p.dropout_seed != nullptr) drop(dprobs, dropout_keep, p.dropout_scale);
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float4 statistics = statistics_of(t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) dprobs[t][j] -= j % 2 == 0 ? statistics.y : statistics.w;
        }
      }
      const KeyRows at{work.block * kBlockM + 2 * lane.q, key};
      if constexpr (kMakesDk) {
        to_logits<T>(p, work.head_slice, probs, at, LogitGradients<kTiles>{dprobs});
      } else {
        to_logits<T>(p, work.head_slice, probs, at, NoGradients{});
      }
      const bool has_masked =
          has_masked_queries<kIsGeneral, kBlockM, kBlockN>(p, work.head_slice, work.block, work.first_key);
      if (!is_full || has_masked) {
        VisibleColumns<kBlockM> visible = visible_queries<kBlockM>({p, work.head_slice}, is_valid, work.block, key);
        if (has_masked) hide_masked_queries(p, work.head_slice, visible, work.block * kBlockM, key);
        hide(probs, visible, lane);
      }
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        const Float4 statistics = statistics_of(t);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          probs[t][j] = prob_of(probs[t][j], p.softmax_scale_log2, j % 2 == 0 ? statistics.x : statistics.z);
          if constexpr (kMakesDk) dprobs[t][j] *= probs[t][j];
        }
      }
      if constexpr (kMakesDk) {
        round_fragment<T>(rounded, dprobs);
      } else {
        if (p.dropout_seed != nullptr) drop(probs, dropout_keep, 1.0f);
        round_fragment<T>(rounded, probs);
      }
    }
    position.release(rings.statistics);
    wgmma_fence();
    start_multiply<T, kDim>(gradient, rounded, kMakesDk ? q_tile : dout_tile);
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(flat(gradient));
    position.release(rings.q);
    position.release(rings.dout);
    position.advance();
  }

  // Epilogue. The head slice is computed again here, because keeping it would take registers during the loop.
  const HeadSlice head_slice = KeyWork<kHeadDim, kValueDim, kIsGeneral>(p).head_slice;
  const Rows& stored = kMakesDk ? p.dk : p.dv;
  const int split = SplitOfBlock(block_index_x(), p.dk_splits).split;
  if (stored.data == nullptr) return;
  const float factor = kMakesDk ? p.scale : kIsGeneral ? p.dropout_scale : 1.0f;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = key + 8 * r;
    store_gradient_row<T>(
        stored, kMakesDk ? p.dk_parts : p.dv_parts, split,
        [&](auto type, const Rows& x) { return head_slice.key_row<decltype(type)>(x, row); }, gradient, r, factor,
        row < head_slice.seqlen_k, lane);
  }
}

// Computes dk and dv of one block of keys. Warp 0 loads tiles, warp 1 loads row statistics, one consumer warpgroup sums
// dk, and the other one dv.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kGradientThreads, 1)
    key_gradient_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps) {
  KeyWork<kHeadDim, kValueDim, kIsGeneral> work(p);
  if (work.is_empty()) return;
  const uint32_t shared = shared_address(shared_memory());
  const KeyGradientRings<kHeadDim, kValueDim, kIsGeneral> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<kGradientProducerRegisters>();
    if (work.steps_left > 0) {
      if (thread_index() < 32) load_key_work(p, maps, shared, rings, work);
      if (thread_index() / 32 == 1) load_row_statistics(p, shared, rings, work);
    }
  } else {
    increase_registers<kGradientConsumerRegisters>();
    if (warpgroup == 1) {
      sum_key_gradient<T, kHeadDim, kValueDim, kIsGeneral, /*kMakesDk=*/true>(p, shared, rings, work);
    } else {
      sum_key_gradient<T, kHeadDim, kValueDim, kIsGeneral, /*kMakesDk=*/false>(p, shared, rings, work);
    }
  }
}

}  // namespace fused_attn::gpu::sm90
