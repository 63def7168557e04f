// The warp that loads tiles for the warpgroups that use them.
#pragma once
#include "pipeline.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kWarpsPerWarpgroup = 4;

// Whether setmaxnreg can hand out so many registers a thread, to one loading warpgroup and `consumers` others: a block
// that has a multiprocessor to itself is launched with equal shares of 65536, in multiples of 8, and cannot get more
// later.
constexpr bool fits_registers(int producer, int consumers, int consumer) {
  const int threads = kWarpgroup * (1 + consumers), at_launch = 65536 / threads / 8 * 8;
  return kWarpgroup * (producer + consumers * consumer) <= threads * at_launch;
}

// What comes with a tile on the same barrier: what `store` stores, and `bytes` bytes that `start` copies.
struct NothingElse {
  static constexpr uint32_t bytes = 0;
  GPU_DEVICE void store() const {}
  GPU_DEVICE void start(uint32_t) const {}
};

// Its first lane alone waits for slots and fills them: another one that came late to a barrier could find it a phase
// further on, and wait for the one after that.
struct TileLoader {
  uint32_t cleaning;  // a barrier: rows that have to be overwritten have come
  bool is_leader;
  uint32_t cleaning_parity = 0;

  // Fills a slot: rows from `row` on, into the tile at `slot_tile`.
  template <class SlotTile, int kSlots, class Also = NothingElse>
  GPU_DEVICE void load(const Ring<kSlots>& ring, RingPosition<kSlots> position, uint32_t slot_tile, const Map& map,
                       int row, int head, int batch, const Also& also = {}) const {
    if (is_leader) {
      position.wait_empty(ring);
      also.store();
      const uint32_t barrier = ring.full(position.slot());
      mbarrier_arrive_expect(barrier, SlotTile::kBytes + also.bytes);
      SlotTile::load(slot_tile, map, barrier, row, head, batch);
      also.start(barrier);
    }
  }

  // Likewise, with zeros in the rows that are not valid: what lies there may be NaN, which not even a probability of 0 would
  // stop.
  template <class SlotTile, int kSlots, class Valid, class Also = NothingElse>
  GPU_DEVICE void load_valid(const Ring<kSlots>& ring, RingPosition<kSlots> position, uint32_t slot_tile,
                             const Map& map, int row, int head, int batch, const Valid& valid, const Also& also = {}) {
    if (valid.all()) {
      load<SlotTile>(ring, position, slot_tile, map, row, head, batch, also);
      return;
    }
    if (is_leader) {
      position.wait_empty(ring);
      also.store();
      mbarrier_arrive_expect(cleaning, SlotTile::kBytes + also.bytes);
      SlotTile::load(slot_tile, map, cleaning, row, head, batch);
      also.start(cleaning);
    }
    mbarrier_wait(cleaning, cleaning_parity);
    cleaning_parity ^= 1;
    SlotTile::clear_invalid_rows(slot_tile, valid, this_lane());
    fence_async_proxy();
    sync_warp();
    if (is_leader) mbarrier_arrive(ring.full(position.slot()));
  }
};

}  // namespace fused_attn::gpu::sm90
