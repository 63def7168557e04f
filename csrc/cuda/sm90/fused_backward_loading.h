// The two loading warps of the fused backward (fused_backward.h).
#pragma once
#include "backward.h"
#include "fused_backward_plan.h"

namespace fused_attn::gpu::sm90 {

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

}  // namespace fused_attn::gpu::sm90
