// Backward for Hopper in one kernel: five products for each pair of tiles. A block takes kKeyBlock keys of one head,
// and goes over the queries that see these keys, kBlockM at a time. Scores and probabilities are transposed: rows are
// keys.
//
//   scores^T = k @ q^T        dprobs^T = v @ dout^T
//   dv += probs^T @ dout      dk += dscores^T @ q        dq = dscores @ k
//
// Probabilities and dscores stay in registers, as left factors of dv and dk. For dq, dscores also go through shared
// memory, once. A tile of dq is part of a sum over all blocks of keys: the copy engine adds the tile to float sums in
// global memory. In the end a small kernel rounds these sums.
//
// The additions to a tile of dq come in a fixed order, so the result does not depend on timing. The last block of keys
// that sees the tile adds first, then the block before, and so on. Each block waits for its turn at a counter of the
// tile. Blocks of keys are taken in the same order, from the last one to the first, and each goes over the queries
// upwards. This has two consequences:
//
//   - Neighbouring blocks are at different tiles at the same time, and hardly ever wait for each other.
//   - A block waits only for blocks of the same head that were taken earlier. The unfinished block that was taken first
//     never waits, whatever else runs on the GPU. So nothing can hang.
//
// Who does what:
//
//   warp 0             loads keys, queries and lse
//   warp 1             loads values, dout and delta
//   warps 2, 3         add tiles of dq, in turns
//   warpgroups 1, 2    multiply; each has 64 keys
#pragma once
#include <cmath>
#include <type_traits>

#include "../dropout.h"
#include "../preparation.h"
#include "../row_statistics.h"
#include "../tile_scheduler.h"
#include "../tiles.h"
#include "backward.h"
#include "key_blocks.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

// The first loading warp tells the other roles through a ring which keys come next. So this warp can be ahead of the
// others.
constexpr int kKeyBlockSlots = 4;
constexpr uint32_t kKeyBlockSlotBytes = 128;
static_assert(kKeyBlockBytes <= kKeyBlockSlotBytes);

template <int kHeadDim>
struct FusedBackwardPlan : FusedBackwardTileSm90<kHeadDim> {
  using Sizes = FusedBackwardTileSm90<kHeadDim>;
  static constexpr int kBlockM = Sizes::kBlockM, kQStages = Sizes::kQStages, kDoutStages = Sizes::kDoutStages;
  static constexpr int kBlockN = kKeyBlock, kTiles = kBlockM / 8;
  static constexpr int kConsumers = kBlockN / 64, kConsumerWarps = kConsumers * kWarpsPerWarpgroup;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(fits_registers(kProducerRegisters, kConsumers, kConsumerRegisters));

  // A tile of dq, and a warpgroup's part of the tile: 64 rows, or half of the columns. The columns that fill up the
  // last panel are zeros.
  static constexpr bool kSplitsRows = kBlockM == 128;
  static constexpr int kDqColumns = Tile<kHeadDim, kBlockM>::kPanels * kPanelColumns;
  static constexpr int kOwnColumns = kSplitsRows ? kDqColumns : kDqColumns / 2;
  static constexpr int kDqFloats = kBlockM * kDqColumns, kOwnDqFloats = kDqFloats / kConsumers;
  static constexpr int kTilesPerRowBlock = kRowBlock / kBlockM;

  using KeyTile = Tile<kHeadDim, kBlockN>;
  using QTile = Tile<kHeadDim, kBlockM>;
  static constexpr uint32_t kStatisticsBytes = kBlockM * 4;
  static constexpr uint32_t kDscoresPanelBytes = kBlockN * kPanelRowBytes;  // of 64 queries: a row for each key
  static constexpr uint32_t kDscoresBytes = kBlockM / kPanelColumns * kDscoresPanelBytes;
  static constexpr uint32_t kOwnDqBytes = kOwnDqFloats * 4;
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + KeyTile::kBytes;
  static constexpr uint32_t kQ = kV + KeyTile::kBytes;
  static constexpr uint32_t kDout = kQ + kQStages * QTile::kBytes;
  static constexpr uint32_t kDscores = kDout + kDoutStages * QTile::kBytes;
  static constexpr uint32_t kDq = kDscores + 2 * kDscoresBytes;
  static constexpr uint32_t kLse = kDq + kConsumers * kOwnDqBytes;
  static constexpr uint32_t kDelta = kLse + kQStages * kStatisticsBytes;
  static constexpr uint32_t kKeyBlocks = kDelta + kDoutStages * kStatisticsBytes;
  static constexpr uint32_t kStepInfos = kKeyBlocks + kKeyBlockSlots * kKeyBlockSlotBytes;
  static constexpr uint32_t kBarriers = kStepInfos + kQStages * 8;
  static constexpr uint32_t kBytes = kBarriers + 320;
  static_assert(kBytes <= 227 * 1024);
};

// ---- How the roles wait for one another

// What the consumers have to know about a tile of queries.
struct alignas(8) StepInfo {
  int32_t tile;  // the number of the tile; kHasMask is set if some key is hidden from some query
  int32_t head;
};
constexpr int32_t kHasMask = 1 << 30;
constexpr int32_t kTileNumber = kHasMask - 1;

template <int kHeadDim>
struct FusedBackwardRings {
  using Plan = FusedBackwardPlan<kHeadDim>;
  Ring<kKeyBlockSlots> work;
  Ring<1> k;
  Ring<1> v;
  Ring<Plan::kQStages> q;        // with lse and StepInfo
  Ring<Plan::kDoutStages> dout;  // with delta
  uint32_t dscores;              // two barriers, one for each buffer: the buffer is full
  uint32_t dq_full;              // two barriers for each warpgroup: its dq of an even, or odd, step has been written
  uint32_t dq_empty;             // one barrier for each warpgroup: its dq may be written
  uint32_t cleaning;             // one barrier for each loading warp: a tile has come, and rows have to be overwritten

  GPU_DEVICE explicit FusedBackwardRings(uint32_t shared) {
    work.barriers = shared + Plan::kBarriers;
    k.barriers = work.barriers + work.kBytes;
    v.barriers = k.barriers + k.kBytes;
    q.barriers = v.barriers + v.kBytes;
    dout.barriers = q.barriers + q.kBytes;
    dscores = dout.barriers + dout.kBytes;
    dq_full = dscores + 16;
    dq_empty = dq_full + 16 * Plan::kConsumers;
    cleaning = dq_empty + 8 * Plan::kConsumers;
    static_assert(work.kBytes + k.kBytes + v.kBytes + q.kBytes + dout.kBytes + 16 + 24 * Plan::kConsumers + 16 <=
                  Plan::kBytes - Plan::kBarriers);
  }
  GPU_DEVICE uint32_t dq_full_of(int group, uint32_t step) const { return dq_full + 16 * group + step % 2 * 8; }

  GPU_DEVICE void init() const {
    constexpr int kOtherRoles = 4;  // both loading warps, and both threads that add, read which keys come next
    work.init(Plan::kConsumerWarps + kOtherRoles);
    k.init(Plan::kConsumerWarps);
    v.init(Plan::kConsumerWarps);
    q.init(Plan::kConsumerWarps);
    dout.init(Plan::kConsumerWarps);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(dscores + 8 * i, Plan::kConsumerWarps);
      mbarrier_init(cleaning + 8 * i, 1);
      for (int group = 0; group < Plan::kConsumers; ++group) mbarrier_init(dq_full_of(group, i), kWarpsPerWarpgroup);
    }
    for (int group = 0; group < Plan::kConsumers; ++group) mbarrier_init(dq_empty + 8 * group, 1);
    fence_mbarrier_init();
  }
};

// A role's way through the blocks of keys.
template <int kHeadDim>
struct KeyBlockReader {
  using Plan = FusedBackwardPlan<kHeadDim>;
  uint32_t shared;
  Ring<kKeyBlockSlots> ring;
  RingPosition<kKeyBlockSlots> position;

  // The result may be read until it is released.
  GPU_DEVICE SharedKeyBlock wait() const {
    position.wait_full(ring);
    return {shared + Plan::kKeyBlocks + position.slot() * kKeyBlockSlotBytes};
  }
  GPU_DEVICE void release_by_warp() {
    position.release(ring);
    position.advance();
  }
  GPU_DEVICE void release_by_thread() {
    mbarrier_arrive(ring.empty(position.slot()));
    position.advance();
  }
};

// ---- The loading warps

// Takes the next block of keys that nobody has taken, and starts to tell the other roles. The leader of the first
// loading warp calls this.
template <int kHeadDim>
GPU_DEVICE void take_key_block(const Params& p, uint32_t shared, const Ring<kKeyBlockSlots>& ring,
                               RingPosition<kKeyBlockSlots> position, int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  const int number = atomic_fetch_add(p.tile_counter, 1);
  const uint32_t slot = shared + Plan::kKeyBlocks + position.slot() * kKeyBlockSlotBytes;
  position.wait_empty(ring);
  if (number < num_programs) {
    mbarrier_arrive_expect(ring.full(position.slot()), kKeyBlockBytes);
    bulk_load(slot, p.key_blocks + number, kKeyBlockBytes, ring.full(position.slot()));
  } else {
    store_shared<int32_t>(slot, kNoMoreKeys);
    mbarrier_arrive(ring.full(position.slot()));
  }
}

// What comes with a tile of queries, on the same barrier: a float for each row, and with lse a StepInfo.
template <int kHeadDim, bool kIsFirst>
struct StepLoad {
  using Plan = FusedBackwardPlan<kHeadDim>;
  static constexpr uint32_t bytes = Plan::kStatisticsBytes;
  const Params& p;
  const uint32_t shared;
  const SharedKeyBlock b;
  const Step& step;
  const int slot;

  GPU_DEVICE void store() const {
    if constexpr (kIsFirst) {
      const StepInfo info{step.tile | (b.is_whole(step.tile) ? 0 : kHasMask), step.head};
      store_shared(shared + Plan::kStepInfos + slot * uint32_t{sizeof(StepInfo)}, info);
    }
  }
  GPU_DEVICE void start(uint32_t barrier) const {
    const RowValues& sums = kIsFirst ? p.lse_log2 : p.delta;
    bulk_load(shared + (kIsFirst ? Plan::kLse : Plan::kDelta) + slot * Plan::kStatisticsBytes,
              sums.data + b.batch() * sums.stride_batch + step.head * sums.stride_head + b.padded_q_offset() +
                  step.tile * Plan::kBlockM,
              bytes, barrier);
  }
};

// The first warp (kIsFirst) takes blocks of keys, and loads keys, queries and lse. The second warp loads values, dout
// and delta.
template <int kHeadDim, bool kIsFirst>
GPU_DEVICE void load_tiles(const Params& p, const BackwardMaps& maps, uint32_t shared,
                           const FusedBackwardRings<kHeadDim>& rings, int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  constexpr int kStages = kIsFirst ? Plan::kQStages : Plan::kDoutStages;
  const bool is_leader = thread_index() % 32 == 0;
  TileLoader loader{rings.cleaning + (kIsFirst ? 0 : 8), is_leader};
  KeyBlockReader<kHeadDim> reader{shared, rings.work, {}};
  RingPosition<kStages> position;
  while (true) {
    // The next block is taken only when all is loaded for the block before. If it were taken earlier, blocks that add
    // to dq after it would have to wait longer.
    if (kIsFirst && is_leader) take_key_block<kHeadDim>(p, shared, rings.work, reader.position, num_programs);
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    const Ring<1>& key_ring = kIsFirst ? rings.k : rings.v;
    const RingPosition<1> key_position{reader.position.uses};
    if (b.steps() == 0) {
      if (is_leader) {
        key_position.wait_empty(key_ring);
        mbarrier_arrive(key_ring.full(0));
      }
      reader.release_by_warp();
      continue;
    }
    loader.template load_valid<KeyTile>(key_ring, key_position, shared + (kIsFirst ? Plan::kK : Plan::kV),
                                        kIsFirst ? maps.k : maps.v, b.k_offset() + b.number() * kKeyBlock, b.kv_head(),
                                        b.batch(), b.valid());
    GPU_NO_UNROLL for (Step step(b); step.head < b.head() + p.group_size; step.advance(b)) {
      const int32_t row = step.tile * Plan::kBlockM;
      const StepLoad<kHeadDim, kIsFirst> also{p, shared, b, step, position.slot()};
      const uint32_t tile = shared + (kIsFirst ? Plan::kQ : Plan::kDout) + position.slot() * QTile::kBytes;
      const Map& map = kIsFirst ? maps.q : maps.dout;
      const auto load = [&](const auto& ring) {
        // Only a packed tensor has rows past the end of the sequence.
        const FirstRows<Plan::kBlockM> own{p.cu_seqlens_q != nullptr ? b.seqlen_q() - row : Plan::kBlockM};
        loader.template load_valid<QTile>(ring, position, tile, map, b.q_offset() + row, step.head, b.batch(), own,
                                          also);
      };
      if constexpr (kIsFirst) {
        load(rings.q);
      } else {
        load(rings.dout);
      }
      position.advance();
    }
    reader.release_by_warp();
  }
}

// ---- The threads that add to dq. One works for even steps, the other for odd steps: to wait for a turn, and for an
// addition to be complete, takes longer than a step.

template <int kHeadDim>
GPU_DEVICE void add_dq(const Params& p, uint32_t shared, const FusedBackwardRings<kHeadDim>& rings, uint32_t parity) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  KeyBlockReader<kHeadDim> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    Step at(b);
    GPU_NO_UNROLL for (int left = b.steps(); left > 0; --left, ++step, at.advance(b)) {
      if (step % 2 != parity) continue;
      const int64_t tile = b.row_block(p, at.head) * Plan::kTilesPerRowBlock + at.tile;
      const int32_t turn = turn_at<Plan::kBlockM>(p, b, at.tile);
      wait_until_equal(p.dq_turns + tile, turn);
      fence_async_proxy_global();
      GPU_UNROLL for (int group = 0; group < Plan::kConsumers; ++group) {
        mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1);
        fence_async_proxy();
        const uint32_t source = shared + Plan::kDq + group * Plan::kOwnDqBytes;
        float* const sums = p.dq_sums + tile * Plan::kDqFloats + group * Plan::kOwnDqFloats;
        if (turn == 0) {  // memory holds no sum yet, not even zeros
          bulk_store(sums, source, Plan::kOwnDqBytes);
        } else {
          bulk_reduce_add_f32(sums, source, Plan::kOwnDqBytes);
        }
        tma_store_commit();
      }
      tma_store_wait_read<1>();
      mbarrier_arrive(rings.dq_empty);
      tma_store_wait_read<0>();
      mbarrier_arrive(rings.dq_empty + 8);
      tma_store_wait<0>();
      fence_async_proxy_global();
      add_release(p.dq_turns + tile, 1);
    }
    reader.release_by_thread();
  }
}

// ---- The consumers

GPU_DEVICE void arrive_once_a_warp(uint32_t barrier) {
  sync_warp();
  if (thread_index() % 32 == 0) mbarrier_arrive(barrier);
}

// For rows of a gradient to which nothing is added.
template <class T>
GPU_DEVICE void store_zeros(T* row, int columns, Lane lane) {
  for (int chunk = lane.q; 8 * chunk < columns; chunk += 4) {
    store_global(reinterpret_cast<Vec4*>(row + 8 * chunk), Vec4{0, 0, 0, 0});
  }
}

template <class T, int kHeadDim, bool kHasDropout>
GPU_DEVICE void sum_gradients(const Params& p, uint32_t shared, const FusedBackwardRings<kHeadDim>& rings, int group) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  constexpr int kTiles = Plan::kTiles, kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  constexpr int kDqTiles = Plan::kOwnColumns / 8;
  const Lane lane = this_lane();
  const int warp_row = 64 * group + thread_index() % kWarpgroup / 32 * 16;  // of the keys
  // Where this thread stores rows of dscores^T (stmatrix) and its accumulators of dq.
  const int dscores_row = warp_row + lane.index / 8 % 2 * 8 + lane.index % 8;
  const uint32_t dscores_store =
      shared + Plan::kDscores + dscores_row * kPanelRowBytes + ((lane.index / 16) ^ (lane.index % 8)) * 16;
  const uint32_t thread = thread_index() % kWarpgroup;
  // keep_computed: otherwise the compiler computes an address of its own for each load below.
  const uint32_t own_statistics = keep_computed(shared + 8 * lane.q);
  float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
  // At the border between two steps, the products for scores and dprobs of the next step are in flight.
  float scores[kTiles][4], dprobs[kTiles][4], dq[kDqTiles][4];
  uint32_t rounded_probs[kTiles / 2][4], rounded_dscores[kTiles / 2][4];
  Float2 lse[kTiles];

  KeyBlockReader<kHeadDim> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    // The next keys. For head dim 64, registers spill unless the address is in a uniform register (shuffle). For head
    // dim 128, they spill if it is.
    const SharedKeyBlock b{Plan::kSplitsRows ? shuffle(reader.wait().address, 0) : reader.wait().address};
    if (b.number() == kNoMoreKeys) return;
    const RingPosition<1> key_position{reader.position.uses};
    const uint32_t first = step, end = step + shuffle(b.steps(), 0);
    const auto store_gradients = [&](auto store) {
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        const int row = b.number() * kKeyBlock + warp_row + lane.g + 8 * r;
        const bool is_row = row < b.seqlen_k();
        // With dropout there is no register left for another number of columns, see is_fused_backward.
        if (p.dk.data != nullptr)
          store(b.template key_row<T>(p.dk, row), dk, r, p.scale, is_row, kHasDropout ? kHeadDim : p.dk.columns);
        const float factor = kHasDropout ? p.dropout_scale : 1.0f;
        if (p.dv.data != nullptr)
          store(b.template key_row<T>(p.dv, row), dv, r, factor, is_row, kHasDropout ? kHeadDim : p.dv.columns);
      }
    };
    if (first == end) {
      key_position.wait_full(rings.k);
      key_position.release(rings.k);
      key_position.wait_full(rings.v);
      key_position.release(rings.v);
      store_gradients([&](T* row, const auto&, int, float, bool is_row, int columns) {
        if (is_row) store_zeros(row, columns, lane);
      });
      reader.release_by_warp();
      continue;
    }

    const auto q_tile = [&](uint32_t i) { return shared + Plan::kQ + i % Plan::kQStages * QTile::kBytes; };
    const auto dout_tile = [&](uint32_t i) { return shared + Plan::kDout + i % Plan::kDoutStages * QTile::kBytes; };
    const auto start_scores = [&](uint32_t i) {
      mbarrier_wait(rings.q.full(i % Plan::kQStages), i / Plan::kQStages & 1);
      forget_registers(flat(scores));
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN>(scores, shared + Plan::kK, 64 * group, q_tile(i));
      wgmma_commit();
    };
    const auto start_dprobs = [&](uint32_t i) {
      mbarrier_wait(rings.dout.full(i % Plan::kDoutStages), i / Plan::kDoutStages & 1);
      forget_registers(flat(dprobs));
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN>(dprobs, shared + Plan::kV, 64 * group, dout_tile(i));
      wgmma_commit();
    };
    // Each thread computes with two of the 8 queries of tile t in block i. These functions load their lse and their
    // delta from shared memory.
    const auto lse_at = [&](uint32_t i, int t) {
      return load_shared<Float2>(own_statistics + Plan::kLse + i % Plan::kQStages * Plan::kStatisticsBytes + t * 32);
    };
    const auto delta_at = [&](uint32_t i, int t) {
      return load_shared<Float2>(own_statistics + Plan::kDelta + i % Plan::kDoutStages * Plan::kStatisticsBytes +
                                 t * 32);
    };
    // Loads what a step needs besides products. This comes before dprobs are started, while there are registers to
    // spare.
    StepInfo info;
    DropoutKeep<kTiles> dropout_keep;
    const auto begin_step = [&](uint32_t i) {
      info = load_shared<StepInfo>(shared + Plan::kStepInfos + i % Plan::kQStages * uint32_t{sizeof(StepInfo)});
      if constexpr (kHasDropout) {
        dropout_keep =
            dropout_keep_of_key_rows<kTiles>(Dropout(p, b.batch(), info.head), (info.tile & kTileNumber) * kBlockM,
                                             b.number() * kKeyBlock + warp_row, lane);
      }
      GPU_UNROLL for (int t = 0; t < Plan::kLseAhead; ++t) lse[t] = lse_at(i, t);
    };

    // From scores and dprobs to probs (in place of scores) and dscores (in place of dprobs).
    const auto compute_dscores = [&](uint32_t i) {
      wgmma_wait<1>();
      keep_registers(flat(scores));
      if (info.tile & kHasMask) {
        // The loop over full tiles has no registers to spare. So all of this is computed here, word by word.
        const int own = keep_computed(thread), own_row = 64 * group + own / 32 * 16 + own % 32 / 4;
        const int tile = info.tile & kTileNumber;
        GPU_UNROLL for (int r = 0; r < 2; ++r) {
          const bool is_valid = b.is_valid(own_row + 8 * r);
          const int key = b.number() * kKeyBlock + own_row + 8 * r;
          const int first = first_query(p, key) - tile * kBlockM, end = last_query(p, key) + 1 - tile * kBlockM;
          GPU_UNROLL for (int w = 0; w < kBlockM / 32; ++w) {
            hide_word(scores, r, w, is_valid ? column_bits(first, end, w) : 0, lane);
          }
        }
      }
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        if (t + Plan::kLseAhead < kTiles) lse[t + Plan::kLseAhead] = lse_at(i, t + Plan::kLseAhead);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          scores[t][j] = prob_of(scores[t][j], p.scale_log2, j % 2 == 0 ? lse[t].x : lse[t].y);
          // A negative sign marks what dropout drops, so that the bits need no register any longer.
          if (kHasDropout && !dropout_keep.has(t, j)) scores[t][j] = -scores[t][j];
        }
      }
      Float2 delta[kTiles];
      GPU_UNROLL for (int t = 0; t < Plan::kDeltaAhead; ++t) delta[t] = delta_at(i, t);
      wgmma_wait<0>();
      keep_registers(flat(dprobs));
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        if (t + Plan::kDeltaAhead < kTiles) delta[t + Plan::kDeltaAhead] = delta_at(i, t + Plan::kDeltaAhead);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          float dprob = dprobs[t][j], prob = scores[t][j];
          if constexpr (kHasDropout) {
            const bool is_dropped = prob < 0.0f;  // false for NaN, which must not be lost
            dprob = is_dropped ? 0.0f : dprob * p.dropout_scale;
            scores[t][j] = is_dropped ? 0.0f : prob;
            prob = fabsf(prob);
          }
          dprobs[t][j] = prob * (dprob - (j % 2 == 0 ? delta[t].x : delta[t].y));
        }
      }
    };

    // Computes dv, dk and dq of step i, and begins the next step.
    const auto propagate = [&](uint32_t i, auto is_last) {
      constexpr bool kIsLast = decltype(is_last)::value;
      const uint32_t buffer = i % 2 * Plan::kDscoresBytes;
      round_fragment<T>(rounded_probs, scores);
      wgmma_fence();
      start_multiply<T, kHeadDim>(dv, rounded_probs, dout_tile(i), i != first);
      wgmma_commit();
      round_fragment<T>(rounded_dscores, dprobs);
      GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
        store_matrix_x4((dscores_store + buffer + k / 4 * Plan::kDscoresPanelBytes) ^ (32 * (k % 4)),
                        rounded_dscores[k]);
      }
      arrive_once_a_warp(rings.dscores + i % 2 * 8);
      wgmma_fence();
      start_multiply<T, kHeadDim>(dk, rounded_dscores, q_tile(i), i != first);
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(flat(dv));
      arrive_once_a_warp(rings.dout.empty(i % Plan::kDoutStages));
      if constexpr (kIsLast) key_position.release(rings.v);

      // dq needs the dscores of both warpgroups. The readers execute the fence, not the writers: these would have to
      // wait for all their stores.
      mbarrier_wait(rings.dscores + i % 2 * 8, i / 2 & 1);
      fence_async_proxy();
      forget_registers(flat(dq));
      wgmma_fence();
      const uint64_t left = matrix_descriptor(
          shared + Plan::kDscores + buffer + (Plan::kSplitsRows ? group * Plan::kDscoresPanelBytes : 0), 16,
          kSwizzleBytes);
      const uint32_t right = shared + Plan::kK + (Plan::kSplitsRows ? 0 : group * KeyTile::kPanelBytes);
      GPU_UNROLL for (int k = 0; k < kBlockN / 16; ++k) {
        wgmma_ss<T, Plan::kOwnColumns, 1, 1>(flat(dq), left + matrix_descriptor_step(16 * k * kPanelRowBytes),
                                             KeyTile::rows(right, k), k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(flat(dk));
      if constexpr (!kIsLast) start_scores(i + 1);
      arrive_once_a_warp(rings.q.empty(i % Plan::kQStages));
      wgmma_wait<kIsLast ? 0 : 1>();
      keep_registers(flat(dq));
      if constexpr (kIsLast) key_position.release(rings.k);
      mbarrier_wait(rings.dq_empty + 8 * group, (i & 1) ^ 1);
      const uint32_t own_dq = shared + Plan::kDq + group * Plan::kOwnDqBytes + keep_computed(thread) * 16;
      GPU_UNROLL for (int t = 0; t < kDqTiles; ++t) {
        store_shared(own_dq + t * (kWarpgroup * 16), Float4{dq[t][0], dq[t][1], dq[t][2], dq[t][3]});
      }
      arrive_once_a_warp(rings.dq_full_of(group, i));
      if constexpr (!kIsLast) {
        begin_step(i + 1);
        start_dprobs(i + 1);
      }
    };

    key_position.wait_full(rings.k);
    start_scores(step);
    begin_step(step);
    key_position.wait_full(rings.v);
    start_dprobs(step);
    compute_dscores(step);
    forget_registers(flat(dk));
    forget_registers(flat(dv));
    GPU_NO_UNROLL for (; step != end - 1; ++step) {
      propagate(step, std::false_type{});
      compute_dscores(step + 1);
    }
    propagate(step, std::true_type{});
    ++step;
    store_gradients([&](T* row, const auto& gradient, int r, float factor, bool is_row, int columns) {
      store_row<T>(row, gradient, r, factor, is_row, columns, lane);
    });
    reader.release_by_warp();
  }
}

template <class T, int kHeadDim, bool kHasDropout>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(FusedBackwardPlan<kHeadDim>::kThreads, 1)
    fused_backward_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps,
                          int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  const uint32_t shared = shared_address(shared_memory());
  const FusedBackwardRings<kHeadDim> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<Plan::kProducerRegisters>();
    const int warp = shuffle(thread_index() / 32, 0);
    if (warp == 0) {
      load_tiles<kHeadDim, true>(p, maps, shared, rings, num_programs);
    } else if (warp == 1) {
      load_tiles<kHeadDim, false>(p, maps, shared, rings, num_programs);
    } else if (thread_index() % 32 == 0) {
      add_dq<kHeadDim>(p, shared, rings, warp % 2);
    }
  } else {
    increase_registers<Plan::kConsumerRegisters>();
    sum_gradients<T, kHeadDim, kHasDropout>(p, shared, rings, warpgroup - 1);
  }
}

// ---- Before and after

// Prepares the row statistics, turns that begin at 0, and the list of all blocks of keys.
template <class T, int kHeadDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 1)
    prepare_fused_backward_kernel(const GPU_GRID_CONSTANT Params p, int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  reset_tile_counter(p);
  prepare_rows<T, kHeadDim, Plan::kBlockM>(p);
  const int64_t threads = int64_t{grid_size_x()} * kPreparationThreads;
  for (int64_t i = int64_t{block_index_x()} * kPreparationThreads + thread_index(); i < num_programs; i += threads) {
    const KeyBlock b = key_block<Plan::kBlockM>(p, static_cast<int32_t>(i));
    Vec4 words[kKeyBlockBytes / 16];
    __builtin_memcpy(words, &b, kKeyBlockBytes);
    Vec4* const listed = reinterpret_cast<Vec4*>(p.key_blocks + i);
    GPU_UNROLL for (uint32_t w = 0; w < kKeyBlockBytes / 16; ++w) store_global(listed + w, words[w]);
  }
}

constexpr int kRoundingThreads = 256;

// Rounds one tile of dq. The threads of a block are laid out like the two warpgroups that computed the tile.
template <class T, int kHeadDim>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kRoundingThreads, 1) round_dq_kernel(const GPU_GRID_CONSTANT Params p) {
  using Plan = FusedBackwardPlan<kHeadDim>;
  constexpr int kChunk = 4;  // tiles of 8 columns that are stored together
  const int num_tiles = (p.seqlen_q + Plan::kBlockM - 1) / Plan::kBlockM;
  const WorkTile work = scheduled_tile(block_index_x(), num_tiles, p.num_heads, p.batch, p.heads_per_l2_group, true);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * Plan::kBlockM;
  if (first_row >= head_slice.seqlen_q) return;
  const int64_t tile = head_slice.first_row_block(p) * Plan::kTilesPerRowBlock + work.block;
  const bool is_any_added = load_global(p.dq_turns + tile) != 0;  // otherwise memory holds no sum, not even zeros
  const int group = thread_index() / kWarpgroup;
  const Lane lane = this_lane();
  const int own_row = first_row + (Plan::kSplitsRows ? 64 * group : 0) + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  const int first_column = Plan::kSplitsRows ? 0 : group * Plan::kOwnColumns;
  const float* sums = p.dq_sums + tile * Plan::kDqFloats + group * Plan::kOwnDqFloats + thread_index() % kWarpgroup * 4;
  GPU_UNROLL for (int t = 0; t < Plan::kOwnColumns / 8; t += kChunk) {
    if (first_column + 8 * t >= p.dq.columns) return;
    float x[kChunk][4];
    GPU_UNROLL for (int i = 0; i < kChunk; ++i) {
      Float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
      if (is_any_added) sum = load_global(reinterpret_cast<const Float4*>(sums + (t + i) * (kWarpgroup * 4)));
      x[i][0] = sum.x;
      x[i][1] = sum.y;
      x[i][2] = sum.z;
      x[i][3] = sum.w;
    }
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = own_row + 8 * r;
      const int column = first_column + 8 * t;
      store_row<T>(head_slice.query_row<T>(p.dq, row) + column, x, r, p.scale, row < head_slice.seqlen_q,
                   p.dq.columns - column, lane);
    }
  }
}

}  // namespace fused_attn::gpu::sm90
