// What all warps of the fused backward (fused_backward.h) share: the sizes of tiles, where each of them lies in shared
// memory, and the rings by which warps wait for one another.
#pragma once
#include "../tiles.h"
#include "bias_tiles.h"
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
    // Both loading warps, and both warps that take tiles of dq, also read each KeyBlock.
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

}  // namespace fused_attn::gpu::sm90
