// What all warps of the forward kernel (forward.h) share: the sizes of tiles, where each of them lies in shared memory,
// the rings by which warps wait for one another, and the tensor maps.
#pragma once
#include "../tiles.h"
#include "bias_tiles.h"
#include "forward_notes.h"
#include "loader.h"

namespace fused_attn::gpu::sm90 {

constexpr int kWarpRows = 16;  // queries of one of the four warps of a consumer

// Sizes of the forward kernel: threads, registers, and where each tile, note and barrier lies in shared memory (byte
// offsets from its start).
template <int kHeadDim, int kValueDim, bool kIsGeneralOption>
struct ForwardPlan : ForwardTileSm90<kHeadDim, kIsGeneralOption> {
  using Sizes = ForwardTileSm90<kHeadDim, kIsGeneralOption>;
  static constexpr bool kIsGeneral = kIsGeneralOption;
  static constexpr int kConsumers = Sizes::kConsumers, kBlockN = Sizes::kBlockN;
  static constexpr int kStages = Sizes::kStages, kQueryStages = Sizes::kQueryStages;
  static constexpr int kBiasStages = Sizes::kBiasStages;
  static constexpr int kBlockM = kForwardRowsSm90<kHeadDim, kIsGeneral>;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kTiles = kBlockN / 8;  // tiles of 8 columns in a fragment of scores
  static constexpr int kConsumerWarps = kConsumers * kWarpsPerWarpgroup;

  // Registers of each thread. With setmaxnreg, the first warpgroup (all warps that do not multiply) gives up registers,
  // and the consumers get them.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 224;
  static_assert(fits_registers(kProducerRegisters, kConsumers, kConsumerRegisters));

  // Whether the planning warp looks at several blocks at once (last_block_to_visit). With head dim 256, ptxas would
  // then spill a register of the consumers.
  static constexpr bool kSkipsByLanes = kHeadDim < 256;

  // Whether TMA stores the output. With head dim 128, this takes 175 instructions, and stores from registers take 296.
  // With larger head dims, shared memory is full. In a general kernel, tiles of 16-bit biases use the rest of the
  // memory. The speed has not been measured.
  static constexpr bool kStoresByTma = !kIsGeneral && kHeadDim <= 128;

  using QTile = Tile<kHeadDim, kBlockM>;
  using KeyTile = Tile<kHeadDim, kBlockN>;
  using ValueTile = Tile<kValueDim, kBlockN>;
  using OutTile = Tile<kValueDim, kWarpRows>;  // each warp of the consumers stores its own rows
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + kQueryStages * QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KeyTile::kBytes;
  static constexpr uint32_t kOut = kV + kStages * ValueTile::kBytes;
  static constexpr uint32_t kTileNotesAt = kOut + (kStoresByTma ? kConsumerWarps * OutTile::kBytes : 0);
  static constexpr uint32_t kKeyNotesAt = kTileNotesAt + kTileNotes * kTileNoteBytes;
  static constexpr uint32_t kKeyNoteBytes = kIsGeneral ? 128 : 64;  // a plain kernel has no pages
  static constexpr uint32_t kRings = kKeyNotesAt + kKeyNotes * kKeyNoteBytes;
  static constexpr uint32_t kBytesWithoutBias = kRings + 512;
  // Tiles of a bias come last, so that a call without them leaves their memory to the L1 cache.
  using BiasTile = sm90::BiasTile<kBlockN, kConsumerRows>;
  static constexpr uint32_t kBias = (kBytesWithoutBias + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr uint32_t kBytes =
      kIsGeneral ? kBias + kConsumers * kBiasStages * BiasTile::kBytes : kBytesWithoutBias;
  static_assert(kBytes <= 227 * 1024);
  static_assert(!kIsGeneral || kConsumers == 2);  // there are two warps that load a bias
  static_assert(kKeyNotes % kBiasStages == 0);    // see Consumer::bias_position
  // The loading warp needs the note of block n to load the keys of this block, and releases the note of block n -
  // kStages - 1 only then (Loader::load_keys). With fewer slots, the planning warp would wait for this slot for ever.
  static_assert(kKeyNotes >= kStages + 2);
};

// All rings and barriers of the forward kernel, and the addresses of their slots in shared memory.
template <class Plan>
struct ForwardRings {
  Ring<Plan::kQueryStages> q;  // tiles of queries
  Ring<Plan::kStages> k;       // tiles of keys; v: tiles of values
  Ring<Plan::kStages> v;
  Ring<kTileNotes> tiles;            // TileNotes
  Ring<kKeyNotes> notes;             // KeyNotes
  Ring<2 * Plan::kBiasStages> bias;  // tiles of the bias, in a general kernel: see bias_ring
  uint32_t cleaning;  // a barrier: a tile of values has arrived, and its rows that are not valid can be overwritten
  uint32_t shared;    // address of the dynamic shared memory

  GPU_DEVICE explicit ForwardRings(uint32_t shared) : shared(shared) {
    cleaning =
        lay_out_rings<Plan::kBytesWithoutBias - Plan::kRings, 8>(shared + Plan::kRings, q, k, v, tiles, notes, bias);
  }

  // Initialises all barriers. One thread calls this, before the block synchronises.
  GPU_DEVICE void init() const {
    init_rings(Plan::kConsumerWarps, q, k, v, tiles);
    notes.init(1);  // the loading warp alone releases KeyNotes, see Loader::load_keys
    if constexpr (Plan::kIsGeneral) bias.init(kWarpsPerWarpgroup);
    mbarrier_init(cleaning, 1);
    fence_mbarrier_init();
  }

  // The slot in shared memory that a position in a ring stands for: a note, or the address of a tile.
  GPU_DEVICE TileNote tile_note(RingPosition<kTileNotes> position) const {
    return {shared + Plan::kTileNotesAt + position.slot() * kTileNoteBytes};
  }
  GPU_DEVICE KeyNote<Plan::kBlockN> key_note(RingPosition<kKeyNotes> position) const {
    return {shared + Plan::kKeyNotesAt + position.slot() * Plan::kKeyNoteBytes};
  }
  GPU_DEVICE uint32_t query_tile(RingPosition<Plan::kQueryStages> position) const {
    return shared + Plan::kQ + position.slot() * Plan::QTile::kBytes;
  }
  GPU_DEVICE uint32_t key_tile(RingPosition<Plan::kStages> position) const {
    return shared + Plan::kK + position.slot() * Plan::KeyTile::kBytes;
  }
  GPU_DEVICE uint32_t value_tile(RingPosition<Plan::kStages> position) const {
    return shared + Plan::kV + position.slot() * Plan::ValueTile::kBytes;
  }

  // Each consumer of a general kernel has a ring of its own for tiles of the bias.
  GPU_DEVICE Ring<Plan::kBiasStages> bias_ring(int consumer) const { return {bias.full(consumer * Plan::kBiasStages)}; }
  GPU_DEVICE uint32_t bias_tile(int consumer, RingPosition<Plan::kBiasStages> position) const {
    return shared + Plan::kBias + (consumer * Plan::kBiasStages + position.slot()) * Plan::BiasTile::kBytes;
  }
};

// Tensor maps, by which TMA loads query, key, value and a dense bias, and stores the output (kStoresByTma).
struct ForwardMaps {
  Map q;
  Map k;
  Map v;
  Map out;
  BiasMap bias;
  int32_t piece_rows;  // the rows that one copy of keys or values moves: a whole block, or a piece of it within a page
};

}  // namespace fused_attn::gpu::sm90
