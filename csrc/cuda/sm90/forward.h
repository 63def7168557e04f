// Forward for Hopper: softmax(scores) @ value with TMA and wgmma. A block stays on its multiprocessor and takes one
// tile of queries after another. Its first warpgroup only loads: queries once per tile, keys and values through rings
// of kStages tiles. The others have 64 queries each, and
//
//   overlap:    the scores of the next keys are being computed while the softmax of these runs, and the values are summed
//   ping-pong:  they take turns in starting products, so that the softmax of one runs while the tensor cores work for the other
//
// Keys that padding drops, and rows of other sequences, may hold NaN, which not even a weight of 0 would stop. The
// scores of such keys are hidden; their values are overwritten with zeros by the loading warp before it passes the tile
// on.
#pragma once
#include "../dropout.h"
#include "../softmax.h"
#include "../tiles.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

template <int kHeadDim>
struct ForwardPlan : ForwardTileSm90<kHeadDim> {
  using Sizes = ForwardTileSm90<kHeadDim>;
  static constexpr int kConsumers = Sizes::kConsumers, kBlockN = Sizes::kBlockN, kStages = Sizes::kStages;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kTiles = kBlockN / 8;
  static constexpr int kConsumerWarps = kConsumers * kWarpsPerWarpgroup;

  // setmaxnreg: what the loading warpgroup gives up, the others get.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(fits_registers(kProducerRegisters, kConsumers, kConsumerRegisters));
  // Ping-pong has two named barriers.
  static_assert(kConsumers == 2);

  using QTile = Tile<kHeadDim, kBlockM>;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KeyTile::kBytes;
  static constexpr uint32_t kRings = kV + kStages * KeyTile::kBytes;
  static constexpr uint32_t kBytes = kRings + 256;
  static_assert(kBytes <= 227 * 1024);
};

// Which tile comes next goes from the loading warp to the consumers through a ring, so that it can be ahead of them.
constexpr int kWorkSlots = 2;
constexpr int kNoMoreWork = -1;

template <int kHeadDim>
struct ForwardRings {
  using Plan = ForwardPlan<kHeadDim>;
  Ring<1> q;
  Ring<Plan::kStages> k;
  Ring<Plan::kStages> v;
  Ring<kWorkSlots> work;
  uint32_t cleaning;   // a barrier: values that have to be overwritten have come
  uint32_t next_work;  // kWorkSlots numbers of tiles

  GPU_DEVICE explicit ForwardRings(uint32_t shared) {
    q.barriers = shared + Plan::kRings;
    k.barriers = q.barriers + q.kBytes;
    v.barriers = k.barriers + k.kBytes;
    work.barriers = v.barriers + v.kBytes;
    cleaning = work.barriers + work.kBytes;
    next_work = cleaning + 8;
  }

  GPU_DEVICE void init() const {
    q.init(Plan::kConsumerWarps);
    k.init(Plan::kConsumerWarps);
    v.init(Plan::kConsumerWarps);
    work.init(Plan::kConsumerWarps);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }
};

// A tile of queries, and the keys that it visits.
template <int kHeadDim>
struct QueryTile {
  using Plan = ForwardPlan<kHeadDim>;
  Place place;
  int32_t first_row;
  BlockRange range;

  GPU_DEVICE QueryTile(const Params& p, int32_t number) {
    const int num_blocks = (p.seqlen_q + Plan::kBlockM - 1) / Plan::kBlockM;
    const Work work = scheduled_work(number, num_blocks, p.num_heads, p.batch, p.heads_per_section, true);
    place = place_of(p, work.batch, work.head, work.head / p.group_size);
    first_row = work.block * Plan::kBlockM;
    range = key_range<Plan::kBlockN>(p, place, first_row, min(first_row + Plan::kBlockM, place.len_q) - 1);
  }
  GPU_DEVICE bool is_empty() const { return first_row >= place.len_q; }
  GPU_DEVICE int32_t last_live(const Params& p, int32_t block) const {
    return last_live_block<Plan::kBlockN>(p, place, range.begin, block);
  }
};

// What a kernel gets besides Params.
struct ForwardMaps {
  Map q;
  Map k;
  Map v;
};

// ---- The loading warp

template <int kHeadDim>
struct Loader {
  using Plan = ForwardPlan<kHeadDim>;
  using KeyTile = typename Plan::KeyTile;
  const Params& p;
  const ForwardMaps& maps;
  const uint32_t shared;
  const ForwardRings<kHeadDim> rings;
  TileLoader loader;
  RingPosition<1> q_position;
  RingPosition<Plan::kStages> k_position;
  RingPosition<Plan::kStages> v_position;

  GPU_DEVICE void load_queries(const QueryTile<kHeadDim>& tile) {
    const Place& place = tile.place;
    loader.template load<typename Plan::QTile>(rings.q, q_position, shared + Plan::kQ, maps.q,
                                               place.first_q + tile.first_row, place.head, place.batch);
    q_position.advance();
  }

  GPU_DEVICE void load_keys(const QueryTile<kHeadDim>& tile, int block) {
    const Place& place = tile.place;
    loader.template load<KeyTile>(rings.k, k_position, shared + Plan::kK + k_position.slot() * KeyTile::kBytes, maps.k,
                                  place.first_k + block * Plan::kBlockN, place.kv_head, place.batch);
    k_position.advance();
  }

  GPU_DEVICE void load_values(const QueryTile<kHeadDim>& tile, int block) {
    const Place& place = tile.place;
    loader.template load_kept<KeyTile>(rings.v, v_position, shared + Plan::kV + v_position.slot() * KeyTile::kBytes,
                                       maps.v, place.first_k + block * Plan::kBlockN, place.kv_head, place.batch,
                                       kept_keys<Plan::kBlockN>(p, place, block));
    v_position.advance();
  }

  GPU_DEVICE void run(int num_tiles) {
    RingPosition<kWorkSlots> work_position;
    int number = block_index_x();
    while (true) {
      const bool is_last = number >= num_tiles;
      if (loader.is_leader) {
        work_position.wait_empty(rings.work);
        store_shared<int>(rings.next_work + work_position.slot() * 4, is_last ? kNoMoreWork : number);
        mbarrier_arrive(rings.work.full(work_position.slot()));
      }
      work_position.advance();
      if (is_last) return;

      const QueryTile<kHeadDim> tile(p, number);
      int block = tile.is_empty() ? tile.range.begin - 1 : tile.last_live(p, tile.range.end - 1);
      if (block >= tile.range.begin) {
        load_keys(tile, block);
        load_queries(tile);
        while (true) {
          const int next = tile.last_live(p, block - 1);
          if (next >= tile.range.begin) load_keys(tile, next);
          load_values(tile, block);
          if (next < tile.range.begin) break;
          block = next;
        }
      }

      number += grid_size_x();
      if (p.tile_counter != nullptr) {
        int taken = 0;
        if (loader.is_leader) taken = atomic_fetch_add(p.tile_counter, 1);
        number = grid_size_x() + shuffle(taken, 0);
      }
    }
  }
};

// ---- The consumers

// Consumers 0 and 1 start products in turns. Consumer 1 gives consumer 0 the first turn.
GPU_DEVICE void wait_for_turn(int consumer) {
  if (consumer == 0) {
    barrier_sync<1>(2 * kWarpgroup);
  } else {
    barrier_sync<2>(2 * kWarpgroup);
  }
}
GPU_DEVICE void pass_turn(int consumer) {
  if (consumer == 0) {
    barrier_arrive<2>(2 * kWarpgroup);
  } else {
    barrier_arrive<1>(2 * kWarpgroup);
  }
}

template <class T, int kHeadDim, bool kHasDropout>
GPU_DEVICE void consume(const Params& p, uint32_t shared, const ForwardRings<kHeadDim>& rings) {
  using Plan = ForwardPlan<kHeadDim>;
  using KeyTile = typename Plan::KeyTile;
  constexpr int kBlockN = Plan::kBlockN, kTiles = Plan::kTiles;
  const int consumer = thread_index() / kWarpgroup - 1;
  const Lane lane = this_lane();
  const int thread_row = 64 * consumer + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  RingPosition<1> q_position;
  RingPosition<Plan::kStages> k_position, v_position;
  RingPosition<kWorkSlots> work_position;
  if (consumer == 1) pass_turn(consumer);

  while (true) {
    // Which rows.
    work_position.wait_full(rings.work);
    const int number = load_shared<int>(rings.next_work + work_position.slot() * 4);
    work_position.release(rings.work);
    work_position.advance();
    if (number == kNoMoreWork) break;
    const QueryTile<kHeadDim> tile(p, number);
    if (tile.is_empty()) continue;
    const Place& place = tile.place;
    const int query = tile.first_row + thread_row;

    OnlineSoftmax softmax;
    softmax.init();
    float acc[kHeadDim / 8][4], scores[kTiles][4], rescale[2];
    uint32_t weights[kBlockN / 16][4];
    fill(acc, 0.0f);
    const auto start_scores = [&] {
      start_multiply_transposed<T, kHeadDim, Plan::kBlockM>(scores, shared + Plan::kQ, 64 * consumer,
                                                            shared + Plan::kK + k_position.slot() * KeyTile::kBytes);
      wgmma_commit();
    };
    const auto start_values = [&] {
      start_multiply<T, kHeadDim>(acc, weights, shared + Plan::kV + v_position.slot() * KeyTile::kBytes);
      wgmma_commit();
    };
    KeepBits<kTiles> keep;
    const auto draw_dropout = [&](int block) {  // to be called while products run
      if constexpr (kHasDropout) keep = keep_of_query_rows<kTiles>(Dropout(p, place), query, block * kBlockN, lane);
    };
    const auto weigh = [&](int block) {
      const KeptKeys<kBlockN> kept = kept_keys<kBlockN>(p, place, block);
      if (!(tile.range.is_within_band(block) && kept.all())) hide(scores, visible_keys(p, kept, block, query), lane);
      softmax.update(scores, p.scale_log2, rescale);
      if constexpr (kHasDropout) {
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] = keep.has(t, j) ? scores[t][j] : 0.0f;
        }
      }
    };
    const auto round_weights = [&] {
      GPU_UNROLL for (int k = 0; k < kBlockN / 16; ++k) left_factor<T>(weights[k], scores, k);
    };

    int block = tile.last_live(p, tile.range.end - 1);
    if (block >= tile.range.begin) {
      // The first scores.
      q_position.wait_full(rings.q);
      k_position.wait_full(rings.k);
      wgmma_fence();
      start_scores();
      draw_dropout(block);
      wgmma_wait<0>();
      keep_registers(flat(scores));
      k_position.release(rings.k);
      k_position.advance();
      weigh(block);
      round_weights();

      // Loop: the next scores and these values.
      while (true) {
        block = tile.last_live(p, block - 1);
        if (block < tile.range.begin) break;
        k_position.wait_full(rings.k);
        wait_for_turn(consumer);
        wgmma_fence();
        start_scores();
        v_position.wait_full(rings.v);
        wgmma_fence();
        start_values();
        pass_turn(consumer);
        draw_dropout(block);
        wgmma_wait<1>();
        keep_registers(flat(scores));
        k_position.release(rings.k);
        k_position.advance();
        weigh(block);
        // The phase is over already: this is a branch, past which ptxas does not lift the next wait. Without it, it waits for
        // the values before the softmax, and nothing overlaps.
        v_position.wait_full(rings.v);
        wgmma_wait<0>();
        keep_registers(flat(acc));
        v_position.release(rings.v);
        v_position.advance();
        scale_rows(acc, rescale);
        round_weights();
      }
      q_position.release(rings.q);
      q_position.advance();

      // The last values.
      v_position.wait_full(rings.v);
      wgmma_fence();
      start_values();
      wgmma_wait<0>();
      keep_registers(flat(acc));
      v_position.release(rings.v);
      v_position.advance();
    }

    // Epilogue.
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = query + 8 * r;
      float factor, lse;
      softmax.finish(r, p.scale_log2, factor, lse);
      if (kHasDropout) factor *= p.dropout_scale;
      if (p.lse.data != nullptr && lane.q == 0 && row < place.len_q) store_global(place.query_value(p.lse, row), lse);
      store_row<T>(place.query_row<T>(p.out, row), acc, r, factor, row < place.len_q, lane);
    }
  }
  if (consumer == 0) wait_for_turn(consumer);  // the turn that consumer 1 has passed last
}

template <class T, int kHeadDim, bool kHasDropout>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(ForwardPlan<kHeadDim>::kThreads, 1)
    forward_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT ForwardMaps maps, int num_tiles) {
  using Plan = ForwardPlan<kHeadDim>;
  const uint32_t shared = shared_address(shared_memory());
  const ForwardRings<kHeadDim> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  if (thread_index() < kWarpgroup) {
    decrease_registers<Plan::kProducerRegisters>();
    if (thread_index() < 32) {
      Loader<kHeadDim>{p, maps, shared, rings, {rings.cleaning, thread_index() == 0}}.run(num_tiles);
    }
  } else {
    increase_registers<Plan::kConsumerRegisters>();
    consume<T, kHeadDim, kHasDropout>(p, shared, rings);
  }
}

}  // namespace fused_attn::gpu::sm90
