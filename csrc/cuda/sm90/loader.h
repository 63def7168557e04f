// The warp that loads tiles for the warpgroups that use them.
#pragma once
#include "pipeline.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kWarpsPerWarpgroup = 4;

// Whether setmaxnreg can give `producer` registers to each thread of one loading warpgroup, and `consumer` registers to
// each thread of `consumers` others. A block that has a multiprocessor to itself starts with equal shares of 65536
// registers, in multiples of 8 for a thread. Later it cannot get more.
constexpr bool fits_registers(int producer, int consumers, int consumer) {
  const int threads = kWarpgroup * (1 + consumers), at_launch = 65536 / threads / 8 * 8;
  return kWarpgroup * (producer + consumers * consumer) <= threads * at_launch;
}

// What may come with a tile, on the same barrier: `store` stores something, and `start` starts to copy `bytes` bytes.
// Here: nothing.
struct NothingElse {
  static constexpr uint32_t bytes = 0;
  GPU_DEVICE void store() const {}
  GPU_DEVICE void start(uint32_t) const {}
};

// Loads tiles into the slots of rings. Only the first lane of the warp waits for slots and fills them. Another lane
// that came late to a barrier could find the barrier one phase further on, and would wait for the phase after that.
struct TileLoader {
  uint32_t cleaning;  // a barrier: a tile has come, and some of its rows have to be overwritten
  bool is_leader;
  uint32_t cleaning_parity = 0;

  // Fills a slot: loads rows from `row` on into the tile at `slot_tile`.
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

  // Fills a slot likewise, with zeros in the rows that are not valid. Memory may hold NaN there, and NaN times a
  // probability of 0 is NaN.
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
