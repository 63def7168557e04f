// Backward for Hopper in one kernel, which computes five products for each pair of a tile of queries and a block of
// keys. A block of threads takes kKeyBlock keys of one head, and visits the queries that see these keys, kBlockM at a
// time. Scores and probs are transposed: their rows are keys.
//
//   scores^T = k @ q^T        dprobs^T = v @ dout^T
//   dv += probs^T @ dout      dk += dscores^T @ q        dq = dscores @ k
//
// Probs and dscores stay in registers, as left factors of the products for dv and dk. For dq, dscores also go through
// shared memory, once. A tile of dq is a sum over all blocks of keys: bulk copies add each part to float sums in global
// memory (dq_sums). In the end, a small kernel rounds these sums to dq.
//
// A call may want some of the gradients only. The others are computed all the same, but not stored: a branch around a
// product would cost the steps of all calls time.
//
// Parts are added to a tile of dq in a fixed order, so the result does not depend on timing. The last block of keys
// that sees the tile adds first, then the block of keys before it, and so on. Each sum has a counter (dq_turns), and a
// block of keys waits until the counter shows the block's own number in this order. A tile has one sum, or with few
// queries and many keys several ones (DqTurn). Blocks of keys are taken in the same order, from the last one to the
// first, and each visits its tiles of queries upwards. This order has two consequences:
//
//   - Neighbouring blocks of keys are at different tiles at the same time, and hardly ever wait for each other.
//   - A block of keys waits only for blocks of the same head that were taken earlier. Of all unfinished blocks, the one
//     that was taken first never waits, whatever else runs on the GPU. So there is no deadlock.
//
// Blocks of keys that do not see the tile add nothing, and have no number. Which ones see it follows from the band and
// the padding. A dense mask has to be read for it, so a small kernel lists all steps and turns
// (list_mask_steps_kernel).
//
// The warps of a block of threads have these roles:
//
//   warp 0             loads keys, queries and lse
//   warp 1             loads values, dout and delta
//   warps 2, 3         one thread of each adds tiles of dq to the sums; one takes even steps, the other odd steps
//   warpgroups 1, 2    multiply; each has 64 of the keys
//
// A step is the work for one tile of queries. If there are few blocks of keys, several blocks of threads take a part of
// the steps of each (gradient_splits.h). Each part is a KeyBlock of its own.
//
// Two ideas do not go with this order. A cluster of two blocks of threads could share each tile of queries (multicast),
// but two blocks of keys that visit the same tile at the same time would wait for each other's turn. Sums of integers
// would need no order, but each thread would convert 32 numbers more in a step, and would need a scale for each row.
//
// The general kernel (kIsGeneral) also supports dropout, softcap, biases, dense masks and any scale, as branches that
// all threads take alike. All of it is done between the products for scores and dprobs and those that use them.
#pragma once
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "../dropout.h"
#include "../logits.h"
#include "../mask_bits.h"
#include "../preparation.h"
#include "../row_statistics.h"
#include "../tile_scheduler.h"
#include "../tiles.h"
#include "backward.h"
#include "key_blocks.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

// The ring through which the first loading warp hands the next KeyBlock to all roles. With several slots, this warp can
// already load for the next block of keys while the other roles still work on the current one.
constexpr int kKeyBlockSlots = 4;
constexpr uint32_t kKeyBlockSlotBytes = 128;
static_assert(kKeyBlockBytes <= kKeyBlockSlotBytes);

constexpr int kFusedBackwardThreads = kWarpgroup * (1 + kKeyBlock / 64);  // each consumer warpgroup has 64 keys

// Sizes of the fused backward: threads, registers, parts of dq, and where each tile, array and barrier lies in shared
// memory (byte offsets from its start).
template <int kHeadDim, bool kIsGeneral>
struct FusedBackwardPlan : FusedBackwardTileSm90<kHeadDim, kIsGeneral> {
  using Sizes = FusedBackwardTileSm90<kHeadDim, kIsGeneral>;
  static constexpr int kBlockM = Sizes::kBlockM, kQStages = Sizes::kQStages, kDoutStages = Sizes::kDoutStages;
  static constexpr int kBlockN = kKeyBlock, kTiles = kBlockM / 8;
  static constexpr int kConsumers = kBlockN / 64, kConsumerWarps = kConsumers * kWarpsPerWarpgroup;
  static_assert(kFusedBackwardThreads == kWarpgroup * (1 + kConsumers));
  // 24 registers are too few for the loading warps of the general kernel.
  static constexpr int kProducerRegisters = kIsGeneral ? 40 : 24, kConsumerRegisters = kIsGeneral ? 232 : 240;
  static_assert(fits_registers(kProducerRegisters, kConsumers, kConsumerRegisters));

  // Each of the two consumer warpgroups computes its own part of a tile of dq: 64 of 128 rows (kSplitsRows), or half of
  // the columns. Columns of the last panel beyond the head dim are zeros.
  static constexpr bool kSplitsRows = kBlockM == 128;
  static constexpr int kDqColumns = Tile<kHeadDim, kBlockM>::kPanels * kPanelColumns;
  static constexpr int kOwnColumns = kSplitsRows ? kDqColumns : kDqColumns / 2;
  static constexpr int kDqFloats = kBlockM * kDqColumns, kOwnDqFloats = kDqFloats / kConsumers;
  static constexpr int kTilesPerRowBlock = kRowBlock / kBlockM;  // tiles of dq in a row block

  // If each warpgroup computes half of the columns, this half is a panel of the keys.
  static constexpr int kKeyPanelColumns = kSplitsRows ? kPanelColumns : kOwnColumns;
  using KeyTile = Tile<kHeadDim, kBlockN, kKeyPanelColumns>;
  using QTile = Tile<kHeadDim, kBlockM>;
  static_assert(kSplitsRows || KeyTile::kPanels == kConsumers);
  static constexpr uint32_t kStatisticsBytes = kBlockM * 4;
  using DscoresTile = Tile<kBlockM, kBlockN>;  // dscores^T: the columns are queries, the rows are keys
  static constexpr uint32_t kOwnDqBytes = kOwnDqFloats * 4;
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + KeyTile::kBytes;
  static constexpr uint32_t kQ = kV + KeyTile::kBytes;
  static constexpr uint32_t kDout = kQ + kQStages * QTile::kBytes;
  static constexpr uint32_t kDscores = kDout + kDoutStages * QTile::kBytes;
  static constexpr uint32_t kDq = kDscores + 2 * DscoresTile::kBytes;
  static constexpr uint32_t kLse = kDq + kConsumers * kOwnDqBytes;
  static constexpr uint32_t kDelta = kLse + kQStages * kStatisticsBytes;
  static constexpr uint32_t kKeyBlocks = kDelta + kDoutStages * kStatisticsBytes;
  static constexpr uint32_t kStepInfos = kKeyBlocks + kKeyBlockSlots * kKeyBlockSlotBytes;
  static constexpr uint32_t kBarriers = kStepInfos + kQStages * 8;
  static constexpr uint32_t kBytesWithoutBias = kBarriers + 320;
  // Tiles of a bias come last, so that a call without them leaves their memory to the L1 cache.
  using BiasTile = sm90::BiasTile<kBlockN, kBlockM>;
  static constexpr uint32_t kBias = (kBytesWithoutBias + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr uint32_t kBytes = kIsGeneral ? kBias + kDoutStages * BiasTile::kBytes : kBytesWithoutBias;
  static_assert(kBytes <= 227 * 1024);
};

// ---- How the roles wait for one another

// All rings and barriers of the fused backward. A full barrier of a ring says that a tile has arrived, an empty one
// that its slot may be written again.
template <int kHeadDim, bool kIsGeneral>
struct FusedBackwardRings {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  Ring<kKeyBlockSlots> work;  // KeyBlocks, see kKeyBlockSlots
  Ring<1> k;
  Ring<1> v;
  Ring<Plan::kQStages> q;        // tiles of queries, each with its lse and its StepInfo
  Ring<Plan::kDoutStages> dout;  // tiles of dout, each with its delta and, in a general kernel, its tile of the bias
  uint32_t dscores;   // two barriers, of the buffer for even and for odd steps: all warps have written dscores
  uint32_t dq_full;   // two barriers for each warpgroup: its part of dq of an even, or odd, step is written
  uint32_t dq_empty;  // a barrier for each warpgroup: the buffer of its part of dq may be written again
  uint32_t cleaning;  // a barrier for each loading warp, see TileLoader::cleaning

  GPU_DEVICE explicit FusedBackwardRings(uint32_t shared) {
    constexpr uint32_t kOtherBytes = 16 + 24 * Plan::kConsumers + 16;
    dscores = lay_out_rings<Plan::kBytesWithoutBias - Plan::kBarriers, kOtherBytes>(shared + Plan::kBarriers, work, k,
                                                                                    v, q, dout);
    dq_full = dscores + 16;
    dq_empty = dq_full + 16 * Plan::kConsumers;
    cleaning = dq_empty + 8 * Plan::kConsumers;
  }
  // The barrier for the part of dq that warpgroup `group` writes in `step`.
  GPU_DEVICE uint32_t dq_full_of(int group, uint32_t step) const { return dq_full + 16 * group + step % 2 * 8; }

  // Initialises all barriers. One thread calls this, before the block synchronises.
  GPU_DEVICE void init() const {
    // Both loading warps, and both threads that add tiles of dq, also read each KeyBlock.
    constexpr int kOtherRoles = 4;
    work.init(Plan::kConsumerWarps + kOtherRoles);
    init_rings(Plan::kConsumerWarps, k, v, q, dout);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(dscores + 8 * i, Plan::kConsumerWarps);
      mbarrier_init(cleaning + 8 * i, 1);
      for (int group = 0; group < Plan::kConsumers; ++group) mbarrier_init(dq_full_of(group, i), kWarpsPerWarpgroup);
    }
    for (int group = 0; group < Plan::kConsumers; ++group) mbarrier_init(dq_empty + 8 * group, 1);
    fence_mbarrier_init();
  }
};

// The position of one role in the ring of KeyBlocks. Every role reads every block of keys: it waits for the next one,
// works on its steps, and releases it.
template <int kHeadDim, bool kIsGeneral>
struct KeyBlockReader {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  uint32_t shared;
  Ring<kKeyBlockSlots> ring;
  RingPosition<kKeyBlockSlots> position;

  // Waits for the next block of keys. The caller may read the result until it calls a release function.
  GPU_DEVICE SharedKeyBlock wait() const {
    position.wait_full(ring);
    return {shared + Plan::kKeyBlocks + position.slot() * kKeyBlockSlotBytes};
  }
  // All lanes of a warp call this when they have read the current block of keys for the last time.
  GPU_DEVICE void release_by_warp() {
    position.release(ring);
    position.advance();
  }
  // The same for a role that is a single thread.
  GPU_DEVICE void release_by_thread() {
    mbarrier_arrive(ring.empty(position.slot()));
    position.advance();
  }
};

// ---- The loading warps

// Takes the number of the next block of keys from the counter in global memory, and starts to copy its KeyBlock into a
// slot of the ring. If no block is left, writes kNoMoreKeys to the slot. The leader lane of the first loading warp
// calls this, and waits until the slot is empty.
template <int kHeadDim, bool kIsGeneral>
GPU_DEVICE void take_key_block(const Params& p, uint32_t shared, const Ring<kKeyBlockSlots>& ring,
                               RingPosition<kKeyBlockSlots> position, int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
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

// What arrives with a tile of queries, on the same barrier: lse and a StepInfo with queries (kIsFirst), delta and a
// tile of the bias with dout. TileLoader calls these functions.
template <int kHeadDim, bool kIsFirst, bool kIsGeneral>
struct StepLoad {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const Params& p;
  const BiasMap& bias;
  const uint32_t shared;
  const SharedKeyBlock b;
  const Step<Plan::kBlockM, kIsGeneral>& step;
  const int slot;  // of the ring for queries, or for dout
  const uint32_t bytes = Plan::kStatisticsBytes + (has_bias() ? Plan::BiasTile::loaded_bytes(bias) : 0);

  GPU_DEVICE bool has_bias() const { return kIsGeneral && !kIsFirst && bias.is_used; }
  // Writes the StepInfo to shared memory with an ordinary store.
  GPU_DEVICE void store() const {
    if constexpr (kIsFirst) store_shared(shared + Plan::kStepInfos + slot * uint32_t{sizeof(StepInfo)}, step.info(b));
  }
  // Starts to copy a float for each row, lse or delta, and the tile of the bias.
  GPU_DEVICE void start(uint32_t barrier) const {
    const RowValues& sums = kIsFirst ? p.lse_log2 : p.delta;
    bulk_load(shared + (kIsFirst ? Plan::kLse : Plan::kDelta) + slot * Plan::kStatisticsBytes,
              sums.data + b.batch() * sums.stride_batch + step.head() * sums.stride_head + b.padded_q_offset() +
                  step.tile() * Plan::kBlockM,
              Plan::kStatisticsBytes, barrier);
    if (has_bias())
      Plan::BiasTile::load(shared + Plan::kBias + slot * Plan::BiasTile::kBytes, bias, barrier,
                           step.tile() * Plan::kBlockM, b.number() * kKeyBlock, step.head(), b.batch());
  }
};

// The roles of the two loading warps. The first one (kIsFirst) takes blocks of keys, and loads their keys, and queries
// and lse for each step. The second one loads values, and dout and delta for each step. All lanes of the warp call
// this, and return when no block of keys is left.
template <int kHeadDim, bool kIsGeneral, bool kIsFirst>
GPU_DEVICE void load_tiles(const Params& p, const BackwardMaps& maps, uint32_t shared,
                           const FusedBackwardRings<kHeadDim, kIsGeneral>& rings, int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  constexpr int kStages = kIsFirst ? Plan::kQStages : Plan::kDoutStages;
  const bool is_leader = thread_index() % 32 == 0;
  TileLoader loader{rings.cleaning + (kIsFirst ? 0 : 8), is_leader};
  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  RingPosition<kStages> position;
  while (true) {
    // The next block of keys is taken only after all loads of the current one have been issued. If it were taken
    // earlier, other blocks of keys, which add to the same tiles of dq after it, would have to wait longer.
    if (kIsFirst && is_leader)
      take_key_block<kHeadDim, kIsGeneral>(p, shared, rings.work, reader.position, num_programs);
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    const Ring<1>& key_ring = kIsFirst ? rings.k : rings.v;
    const RingPosition<1> key_position{reader.position.uses};
    // No query sees this block, so nothing is loaded. The slot is marked as full all the same, to keep the rings of all
    // roles at the same position.
    if (b.steps() == 0) {
      if (is_leader) {
        key_position.wait_empty(key_ring);
        mbarrier_arrive(key_ring.full(0));
      }
      reader.release_by_warp();
      continue;
    }
    loader.template load_valid<KeyTile>(
        key_ring, key_position, shared + (kIsFirst ? Plan::kK : Plan::kV),
        {kIsFirst ? maps.k : maps.v, b.k_offset() + b.number() * kKeyBlock, b.kv_head(), b.batch()}, b.valid());
    GPU_NO_UNROLL for (Step<Plan::kBlockM, kIsGeneral> step(p, b); step.is_left(p, b); step.advance(p, b)) {
      const int32_t row = step.tile() * Plan::kBlockM;
      const StepLoad<kHeadDim, kIsFirst, kIsGeneral> also{p, maps.bias, shared, b, step, position.slot()};
      const uint32_t tile = shared + (kIsFirst ? Plan::kQ : Plan::kDout) + position.slot() * QTile::kBytes;
      const Map& map = kIsFirst ? maps.q : maps.dout;
      const auto load = [&](const auto& ring) {
        // Only in a packed tensor do rows of another sequence follow the rows of this one. TMA gives zeros for rows
        // past the end of the tensor.
        const FirstRows<Plan::kBlockM> own{p.cu_seqlens_q != nullptr ? b.seqlen_q() - row : Plan::kBlockM};
        loader.template load_valid<QTile>(ring, position, tile, {map, b.q_offset() + row, step.head(), b.batch()}, own,
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

// ---- The threads that add to dq, or drop its parts. One works for even steps, the other for odd steps: to wait for a
// turn, and for an addition to be complete, takes longer than a step.

// Adds the tiles of dq of every second step (step % 2 == parity) to the sums in global memory. One thread calls this.
// For each step, it waits for the turn of this block of keys at the tile, and for both warpgroups to have written their
// parts to shared memory. After the addition, it raises the counter of the tile, so that the next block of keys has its
// turn.
template <int kHeadDim, bool kIsGeneral>
GPU_DEVICE void add_dq(const Params& p, uint32_t shared, const FusedBackwardRings<kHeadDim, kIsGeneral>& rings,
                       uint32_t parity) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    Step<Plan::kBlockM, kIsGeneral> at(p, b);
    const auto is_left = [&](int left) { return kIsGeneral ? at.is_left(p, b) : left > 0; };  // fewest registers
    GPU_NO_UNROLL for (int left = b.steps(); is_left(left); --left, ++step, at.advance(p, b)) {
      if (step % 2 != parity) continue;
      const int64_t tile = b.row_block(p, at.head()) * Plan::kTilesPerRowBlock + at.tile();
      const DqTurn turn(p, tile, at.earlier(p, b));
      wait_until_equal(p.dq_turns + turn.sum, turn.number);
      fence_async_proxy_global();
      GPU_UNROLL for (int group = 0; group < Plan::kConsumers; ++group) {
        mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1);
        fence_async_proxy();
        const uint32_t source = shared + Plan::kDq + group * Plan::kOwnDqBytes;
        float* const sums = p.dq_sums + turn.sum * Plan::kDqFloats + group * Plan::kOwnDqFloats;
        if (turn.number == 0) {  // memory holds no sum yet, not even zeros
          bulk_store(sums, source, Plan::kOwnDqBytes);
        } else {
          bulk_reduce_add_f32(sums, source, Plan::kOwnDqBytes);
        }
        tma_store_commit();
      }
      // Wait until the copy engine has read the first part from shared memory, then the second part, and then until
      // both parts have been added in global memory.
      tma_store_wait_read<1>();
      mbarrier_arrive(rings.dq_empty);
      tma_store_wait_read<0>();
      mbarrier_arrive(rings.dq_empty + 8);
      tma_store_wait<0>();
      fence_async_proxy_global();
      add_release(p.dq_turns + turn.sum, 1);
    }
    reader.release_by_thread();
  }
}

// Takes the place of add_dq if dq is not wanted: marks the memory of each part of dq as empty again. A branch in add_dq
// would need a register more than there are.
template <int kHeadDim, bool kIsGeneral>
GPU_DEVICE void drop_dq(uint32_t shared, const FusedBackwardRings<kHeadDim, kIsGeneral>& rings, uint32_t parity) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    const SharedKeyBlock b = reader.wait();
    if (b.number() == kNoMoreKeys) return;
    GPU_NO_UNROLL for (int left = b.steps(); left > 0; --left, ++step) {
      if (step % 2 != parity) continue;
      GPU_UNROLL for (int group = 0; group < Plan::kConsumers; ++group) {
        mbarrier_wait(rings.dq_full_of(group, step), step / 2 & 1);
        mbarrier_arrive(rings.dq_empty + 8 * group);
      }
    }
    reader.release_by_thread();
  }
}

// ---- The consumers

// All lanes of a warp call this when they have written or read what the barrier stands for. The barrier counts one
// arrival for the warp.
GPU_DEVICE void arrive_once_a_warp(uint32_t barrier) {
  sync_warp();
  if (thread_index() % 32 == 0) mbarrier_arrive(barrier);
}

// The tile of the bias of a step, as to_logits takes it. The warp has the 16 keys from first_key of the block on.
template <class T, class Plan>
struct StepBias {
  const BiasMap& bias;
  uint32_t tile;
  int first_key;
  Lane lane;

  GPU_DEVICE bool is_used() const { return bias.is_used; }
  GPU_DEVICE void add(float (&scores)[Plan::kTiles][4], float factor) const {
    Plan::BiasTile::template add_transposed<T>(scores, factor, tile, bias, first_key, lane);
  }
};

// The role of a consumer warpgroup: sums dk and dv of 64 keys over all steps of a block of keys, and computes this
// warpgroup's part of a tile of dq in each step. All 128 threads call this, and return when no block of keys is left.
// `group` is 0 or 1.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_DEVICE void sum_gradients(const Params& p, const BiasMap& bias, uint32_t shared,
                              const FusedBackwardRings<kHeadDim, kIsGeneral>& rings, int group) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  using QTile = typename Plan::QTile;
  using KeyTile = typename Plan::KeyTile;
  using DscoresTile = typename Plan::DscoresTile;
  constexpr int kTiles = Plan::kTiles, kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  constexpr int kDqTiles = Plan::kOwnColumns / 8;
  const Lane lane = this_lane();
  const int warp_row = 64 * group + thread_index() % kWarpgroup / 32 * 16;  // of the keys
  // The row of dscores^T whose address this thread gives to stmatrix.
  const uint32_t dscores_row = DscoresTile::matrix_row(shared + Plan::kDscores, warp_row, lane);
  const uint32_t thread = thread_index() % kWarpgroup;
  // Where this thread's lse and delta lie in a tile without its offset. keep_computed makes the compiler add constants
  // to one register. Otherwise it would hold an address for each load below in a register of its own.
  const uint32_t own_statistics = keep_computed(shared + 8 * lane.q);
  float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
  // When a step begins, its products for scores and dprobs are already running on the tensor cores.
  float scores[kTiles][4], dprobs[kTiles][4], dq[kDqTiles][4];
  uint32_t rounded_probs[kTiles / 2][4], rounded_dscores[kTiles / 2][4];
  Float2 lse[kTiles];

  KeyBlockReader<kHeadDim, kIsGeneral> reader{shared, rings.work, {}};
  uint32_t step = 0;  // over all blocks of keys
  while (true) {
    // Wait for the next block of keys. For head dim 64, registers spill unless its address is in a uniform register,
    // which shuffle achieves. For head dim 128, registers spill if the address is in a uniform register.
    const SharedKeyBlock b{Plan::kSplitsRows ? shuffle(reader.wait().address, 0) : reader.wait().address};
    if (b.number() == kNoMoreKeys) return;
    const RingPosition<1> key_position{reader.position.uses};
    const uint32_t first = step, end = step + shuffle(b.steps(), 0);
    // Calls `store` for this thread's two rows of dk and of dv, as far as these gradients are wanted.
    const auto store_gradients = [&](auto store) {
      const int split = SplitOfBlock(b.program(), p.dk_splits).split;
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        const int row = b.number() * kKeyBlock + warp_row + lane.g + 8 * r;
        const bool is_row = row < b.seqlen_k();
        const auto row_of = [&](auto type, const Rows& x) { return b.template key_row<decltype(type)>(x, row); };
        if (p.dk.data != nullptr) store(p.dk, p.dk_parts, split, row_of, dk, r, p.scale, is_row);
        const float factor = kIsGeneral ? p.dropout_scale : 1.0f;
        if (p.dv.data != nullptr) store(p.dv, p.dv_parts, split, row_of, dv, r, factor, is_row);
      }
    };
    // No query sees these keys: their gradients are zeros. The loading warps have marked the slots as full, without a
    // tile.
    if (first == end) {
      key_position.wait_full(rings.k);
      key_position.release(rings.k);
      key_position.wait_full(rings.v);
      key_position.release(rings.v);
      store_gradients([&](const Rows& gradient, const GradientParts& parts, int split, auto row_of, const auto&, int,
                          float, bool is_row) { store_zero_row<T>(gradient, parts, split, row_of, is_row, lane); });
      reader.release_by_warp();
      continue;
    }

    // Addresses of the tiles of queries and of dout of step i.
    const auto q_tile = [&](uint32_t i) { return shared + Plan::kQ + i % Plan::kQStages * QTile::kBytes; };
    const auto dout_tile = [&](uint32_t i) { return shared + Plan::kDout + i % Plan::kDoutStages * QTile::kBytes; };
    // Waits for the queries of step i, and starts scores^T = k @ q^T on the tensor cores.
    const auto start_scores = [&](uint32_t i) {
      mbarrier_wait(rings.q.full(i % Plan::kQStages), i / Plan::kQStages & 1);
      forget_registers(flat(scores));
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN, Plan::kKeyPanelColumns>(scores, shared + Plan::kK, 64 * group,
                                                                              q_tile(i));
      wgmma_commit();
    };
    // Waits for dout of step i, and starts dprobs^T = v @ dout^T on the tensor cores.
    const auto start_dprobs = [&](uint32_t i) {
      mbarrier_wait(rings.dout.full(i % Plan::kDoutStages), i / Plan::kDoutStages & 1);
      forget_registers(flat(dprobs));
      wgmma_fence();
      start_multiply_transposed<T, kHeadDim, kBlockN, Plan::kKeyPanelColumns>(dprobs, shared + Plan::kV, 64 * group,
                                                                              dout_tile(i));
      wgmma_commit();
    };
    // Each thread computes with two of the 8 queries of tile t in step i. lse_at and delta_at load the lse and the
    // delta of these two queries from shared memory.
    const auto lse_at = [&](uint32_t i, int t) {
      return load_shared<Float2>(own_statistics + Plan::kLse + i % Plan::kQStages * Plan::kStatisticsBytes + t * 32);
    };
    const auto delta_at = [&](uint32_t i, int t) {
      return load_shared<Float2>(own_statistics + Plan::kDelta + i % Plan::kDoutStages * Plan::kStatisticsBytes +
                                 t * 32);
    };
    // Loads what step i needs besides products: StepInfo, dropout, and the first kLseAhead pairs of lse. begin_step
    // comes before start_dprobs, because the accumulators of dprobs are free registers until then.
    StepInfo info;
    DropoutKeep<kTiles> dropout_keep;
    const auto begin_step = [&](uint32_t i) {
      info = load_shared<StepInfo>(shared + Plan::kStepInfos + i % Plan::kQStages * uint32_t{sizeof(StepInfo)});
      if constexpr (kIsGeneral) {
        if (p.dropout_seed != nullptr)
          dropout_keep =
              dropout_keep_of_key_rows<kTiles>(Dropout(p, b.batch(), info.head), (info.tile & kTileNumber) * kBlockM,
                                               b.number() * kKeyBlock + warp_row, lane);
      } else {
        GPU_UNROLL for (int t = 0; t < Plan::kLseAhead; ++t) lse[t] = lse_at(i, t);
      }
    };

    // Sets the scores of the current step to -inf where a query does not see a key. Loops over tiles without a mask
    // leave no registers for masks. So everything about the mask is computed here, one word of 32 queries at a time.
    const auto hide_scores = [&] {
      const int own = keep_computed(thread), own_row = 64 * group + own / 32 * 16 + own % 32 / 4;
      const int tile = info.tile & kTileNumber;
      const Diagonals band(p, b.score_slice(info.head));
      GPU_UNROLL for (int r = 0; r < 2; ++r) {
        const bool is_valid = b.is_valid(own_row + 8 * r);
        const int key = b.number() * kKeyBlock + own_row + 8 * r;
        const int first = band.first_query(key) - tile * kBlockM, end = band.last_query(key) + 1 - tile * kBlockM;
        const uint32_t* masked = nullptr;
        if constexpr (kIsGeneral) {
          if (p.mask.map != nullptr) masked = queries_of_key(p, b.score_slice(info.head), key) + tile * (kBlockM / 32);
        }
        GPU_UNROLL for (int w = 0; w < kBlockM / 32; ++w) {
          uint32_t visible = is_valid ? column_bits(first, end, w) : 0;
          if constexpr (kIsGeneral) {
            if (masked != nullptr) visible &= load_global(masked + w);
          }
          hide_word(scores, r, w, visible, lane);
        }
      }
    };

    // Waits for the products of step i. Turns scores into probs and dprobs into dscores, both in place. With dropout,
    // probs become those after dropout.
    const auto compute_dscores = [&](uint32_t i) {
      wgmma_wait<kIsGeneral ? 0 : 1>();
      keep_registers(flat(scores));
      if constexpr (kIsGeneral) {
        // dprobs are needed first: the derivative of the softcap multiplies them.
        keep_registers(flat(dprobs));
        if (p.dropout_seed != nullptr) drop(dprobs, dropout_keep, p.dropout_scale);
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float2 delta = delta_at(i, t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) dprobs[t][j] -= j % 2 == 0 ? delta.x : delta.y;
        }
        const int own = keep_computed(thread), first_key = 64 * group + own / 32 * 16;
        const Lane own_lane{own % 32, own % 32 / 4, own % 4};
        const KeyRows at{(info.tile & kTileNumber) * kBlockM + 2 * own_lane.q,
                         b.number() * kKeyBlock + first_key + own_lane.g};
        const uint32_t tile = shared + Plan::kBias + i % Plan::kDoutStages * Plan::BiasTile::kBytes;
        to_logits<T>(p, b.score_slice(info.head), scores, at, LogitGradients<kTiles>{dprobs},
                     StepBias<T, Plan>{bias, tile, first_key, own_lane});
        if (info.tile & kHasMask) hide_scores();
        GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
          const Float2 lse_pair = lse_at(i, t);
          GPU_UNROLL for (int j = 0; j < 4; ++j) {
            scores[t][j] = prob_of(scores[t][j], p.softmax_scale_log2, j % 2 == 0 ? lse_pair.x : lse_pair.y);
            dprobs[t][j] *= scores[t][j];
          }
        }
        if (p.dropout_seed != nullptr) drop(scores, dropout_keep, 1.0f);
        return;
      }
      if (info.tile & kHasMask) hide_scores();
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        if (t + Plan::kLseAhead < kTiles) lse[t + Plan::kLseAhead] = lse_at(i, t + Plan::kLseAhead);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          scores[t][j] = prob_of(scores[t][j], p.scale_log2, j % 2 == 0 ? lse[t].x : lse[t].y);
        }
      }
      Float2 delta[kTiles];
      GPU_UNROLL for (int t = 0; t < Plan::kDeltaAhead; ++t) delta[t] = delta_at(i, t);
      wgmma_wait<0>();
      keep_registers(flat(dprobs));
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        if (t + Plan::kDeltaAhead < kTiles) delta[t + Plan::kDeltaAhead] = delta_at(i, t + Plan::kDeltaAhead);
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          dprobs[t][j] = scores[t][j] * (dprobs[t][j] - (j % 2 == 0 ? delta[t].x : delta[t].y));
        }
      }
    };

    // Adds the products of step i to dv and dk, writes this warpgroup's part of dq to shared memory, and starts the
    // products of step i + 1. The last step of a block of keys releases keys and values instead.
    const auto propagate = [&](uint32_t i, auto is_last) {
      constexpr bool kIsLast = decltype(is_last)::value;  // the last step of a block of keys
      const uint32_t buffer = i % 2 * DscoresTile::kBytes;
      round_fragment<T>(rounded_probs, scores);
      wgmma_fence();
      start_multiply<T, kHeadDim>(dv, rounded_probs, dout_tile(i), i != first);
      wgmma_commit();
      round_fragment<T>(rounded_dscores, dprobs);
      GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
        store_matrix_x4(DscoresTile::matrix_chunk(dscores_row + buffer, k), rounded_dscores[k]);
      }
      arrive_once_a_warp(rings.dscores + i % 2 * 8);
      wgmma_fence();
      start_multiply<T, kHeadDim>(dk, rounded_dscores, q_tile(i), i != first);
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(flat(dv));
      arrive_once_a_warp(rings.dout.empty(i % Plan::kDoutStages));
      if constexpr (kIsLast) key_position.release(rings.v);

      // dq = dscores @ k needs the dscores of both warpgroups. Each reading thread executes the fence that makes them
      // visible to wgmma. If the writing threads did, each would have to wait for all its stores.
      mbarrier_wait(rings.dscores + i % 2 * 8, i / 2 & 1);
      fence_async_proxy();
      forget_registers(flat(dq));
      wgmma_fence();
      const uint64_t left = matrix_descriptor(
          shared + Plan::kDscores + buffer + (Plan::kSplitsRows ? group * DscoresTile::kPanelBytes : 0), 16,
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
    if constexpr (kIsGeneral) {  // with one copy of the long code of compute_dscores
      forget_registers(flat(dk));
      forget_registers(flat(dv));
      bool is_last;
      GPU_NO_UNROLL do {
        compute_dscores(step);
        is_last = shuffle(static_cast<uint32_t>(step == end - 1), 0);
        if (!is_last) propagate(step++, std::false_type{});
      }
      while (!is_last);
    } else {
      compute_dscores(step);
      forget_registers(flat(dk));
      forget_registers(flat(dv));
      GPU_NO_UNROLL for (; step != end - 1; ++step) {
        propagate(step, std::false_type{});
        compute_dscores(step + 1);
      }
    }
    propagate(step, std::true_type{});
    ++step;
    store_gradients([&](const Rows& gradient, const GradientParts& parts, int split, auto row_of, const auto& x, int r,
                        float factor, bool is_row) {
      store_gradient_row<T>(gradient, parts, split, row_of, x, r, factor, is_row, lane);
    });
    reader.release_by_warp();
  }
}

// The fused backward, launched by launch_fused (launchers.h) with one block of threads for each multiprocessor.
// num_programs is the number of blocks of keys of all heads.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kFusedBackwardThreads, 1)
    fused_backward_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT BackwardMaps maps,
                          int num_programs) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const uint32_t shared = shared_address(shared_memory());
  const FusedBackwardRings<kHeadDim, kIsGeneral> rings(shared);
  if (thread_index() == 0) rings.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp agrees about it
  if (warpgroup == 0) {
    decrease_registers<Plan::kProducerRegisters>();
    const int warp = shuffle(thread_index() / 32, 0);
    if (warp == 0) {
      load_tiles<kHeadDim, kIsGeneral, true>(p, maps, shared, rings, num_programs);
    } else if (warp == 1) {
      load_tiles<kHeadDim, kIsGeneral, false>(p, maps, shared, rings, num_programs);
    } else if (thread_index() % 32 == 0) {
      if (p.dq_sums != nullptr) {
        add_dq<kHeadDim, kIsGeneral>(p, shared, rings, warp % 2);
      } else {
        drop_dq<kHeadDim, kIsGeneral>(shared, rings, warp % 2);
      }
    }
  } else {
    increase_registers<Plan::kConsumerRegisters>();
    sum_gradients<T, kHeadDim, kIsGeneral>(p, maps.bias, shared, rings, warpgroup - 1);
  }
}

// ---- Before and after

// Lists the steps of block `program` of the list of blocks of keys, and writes their number into its KeyBlock. One warp
// calls this. It reads the map of the mask for 32 tiles of queries at a time.
template <int kBlockM>
GPU_DEVICE void list_mask_steps(const Params& p, int32_t program) {
  const int32_t lane = this_lane().index;
  Vec4* const listed = reinterpret_cast<Vec4*>(p.key_blocks + program);
  Vec4 words[kKeyBlockBytes / 16];
  GPU_UNROLL for (uint32_t w = 0; w < kKeyBlockBytes / 16; ++w) words[w] = load_global(listed + w);
  KeyBlock b;
  __builtin_memcpy(&b, words, kKeyBlockBytes);
  if (b.steps == 0) return;
  HeadSlice head_slice{};
  head_slice.batch = b.batch;
  StepInfo* const steps = mask_steps_of<kBlockM>(p, program);
  int32_t count = 0;
  for (head_slice.head = b.head; head_slice.head < b.head + p.group_size; ++head_slice.head) {
    for (int32_t first = b.begin; first < b.end; first += 32) {
      const int32_t tile = first + lane;
      MaskContents contents{0};
      if (tile < b.end)
        contents = mask_contents<kBlockM, kKeyBlock>(p.mask, head_slice, tile * kBlockM, b.number * kKeyBlock);
      const uint32_t visited = warp_ballot(contents.has_visible());
      const bool has_mask = contents.has_hidden() || tile < b.full_begin || tile >= b.full_end;
      if (contents.has_visible())
        store_global(steps + count + count_bits(visited & low_bits(lane)),
                     StepInfo{tile | (has_mask ? kHasMask : 0), head_slice.head});
      count += count_bits(visited);
    }
  }
  sync_warp();  // all lanes have read the KeyBlock
  if (lane == 0) store_global(reinterpret_cast<int32_t*>(listed) + offsetof(KeyBlock, steps) / sizeof(int32_t), count);
}

// Writes the turns of all blocks of keys at tile `tile` of queries: for each block that visits the tile, how many later
// blocks do so, too. One warp calls this. A block visits the tile exactly if list_mask_steps lists the tile.
template <int kBlockM>
GPU_DEVICE void list_mask_turns(const Params& p, int32_t batch, int32_t head, int32_t tile) {
  const HeadSlice head_slice = head_slice_of(p, batch, head, head / p.group_size);
  const int32_t lane = this_lane().index;
  int32_t* const turns = mask_turns_of<kBlockM>(p, batch, head, tile);
  int32_t later = 0;
  const Diagonals band(p, head_slice);
  const int32_t key_blocks = (head_slice.seqlen_k + kKeyBlock - 1) / kKeyBlock;
  for (int32_t last = key_blocks - 1; last >= 0; last -= 32) {
    const int32_t n = last - lane;
    const bool is_visited =
        n >= 0 && tile >= first_tile<kBlockM>(band, n) && tile <= last_tile<kBlockM>(band, n) &&
        key_rank(p, batch, n + 1) != key_rank(p, batch, n) &&
        mask_contents<kBlockM, kKeyBlock>(p.mask, head_slice, tile * kBlockM, n * kKeyBlock).has_visible();
    const uint32_t visited = warp_ballot(is_visited);
    if (is_visited) store_global(turns + n, later + count_bits(visited & low_bits(lane)));
    later += count_bits(visited);
  }
}

// Runs before the fused backward if there is a dense mask: fills Params::mask_steps and Params::mask_turns. The first
// warps list the steps of a block of keys each, and the other ones the turns at a tile of queries. Without dq, there
// are no turns.
template <int kBlockM>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kPreparationThreads, 1)
    list_mask_steps_kernel(const GPU_GRID_CONSTANT Params p, int num_programs) {
  const int64_t warp = int64_t{block_index_x()} * (kPreparationThreads / 32) + thread_index() / 32;
  if (warp < num_programs) return list_mask_steps<kBlockM>(p, static_cast<int32_t>(warp));
  const int64_t number = warp - num_programs, tiles = tiles_of_head<kBlockM>(p), head = number / tiles;
  if (p.mask_turns == nullptr || head >= int64_t{p.batch} * p.num_heads) return;
  list_mask_turns<kBlockM>(p, static_cast<int32_t>(head / p.num_heads), static_cast<int32_t>(head % p.num_heads),
                           static_cast<int32_t>(number % tiles));
}

constexpr int kRoundingThreads = 256;

// Runs after the fused backward: adds the sums of one tile of dq, multiplies the result by the scale, rounds it, and
// writes it to dq. Thread i of a block reads the sums that thread i of the two consumer warpgroups computed.
template <class T, int kHeadDim, bool kIsGeneral>
GPU_KERNEL void GPU_LAUNCH_BOUNDS(kRoundingThreads, 1) round_dq_kernel(const GPU_GRID_CONSTANT Params p) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const int num_tiles = (p.seqlen_q + Plan::kBlockM - 1) / Plan::kBlockM;
  const WorkTile work = scheduled_tile(block_index_x(), num_tiles, p.num_heads, p.batch, p.heads_per_l2_group, true);
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head / p.group_size);
  const int first_row = work.block * Plan::kBlockM;
  if (first_row >= head_slice.seqlen_q) return;
  const int64_t first_sum = (head_slice.first_row_block(p) * Plan::kTilesPerRowBlock + work.block) << p.dq_sums_log2;
  int num_sums = 0;  // the first ones, to which a block of keys has added. The others are not even zeros
  while (num_sums < 1 << p.dq_sums_log2 && load_global(p.dq_turns + first_sum + num_sums) != 0) ++num_sums;
  const int group = thread_index() / kWarpgroup;
  const Lane lane = this_lane();
  const int own_row = first_row + (Plan::kSplitsRows ? 64 * group : 0) + thread_index() % kWarpgroup / 32 * 16 + lane.g;
  const int first_column = Plan::kSplitsRows ? 0 : group * Plan::kOwnColumns;
  const float* sums =
      p.dq_sums + first_sum * Plan::kDqFloats + group * Plan::kOwnDqFloats + thread_index() % kWarpgroup * 4;
  const auto load_sum = [&](int n, int t) {
    return load_global(reinterpret_cast<const Float4*>(sums + int64_t{n} * Plan::kDqFloats + t * (kWarpgroup * 4)));
  };
  constexpr int kTiles = Plan::kOwnColumns / 8;
  float dq[kTiles][4];
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    const Float4 sum = num_sums > 0 ? load_sum(0, t) : Float4{0.0f, 0.0f, 0.0f, 0.0f};
    dq[t][0] = sum.x;
    dq[t][1] = sum.y;
    dq[t][2] = sum.z;
    dq[t][3] = sum.w;
  }
  GPU_NO_UNROLL for (int n = 1; n < num_sums; ++n) {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      const Float4 sum = load_sum(n, t);
      dq[t][0] += sum.x;
      dq[t][1] += sum.y;
      dq[t][2] += sum.z;
      dq[t][3] += sum.w;
    }
  }
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = own_row + 8 * r;
    store_row<T>(head_slice.query_row<T>(p.dq, row) + first_column, dq, r, p.scale, row < head_slice.seqlen_q,
                 p.dq.columns - first_column, lane);
  }
}

}  // namespace fused_attn::gpu::sm90
