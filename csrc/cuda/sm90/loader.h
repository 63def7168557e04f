// How a loading warp fills slots of rings with tiles, by TMA.
#pragma once
#include "pipeline.h"
#include "tile_memory.h"

namespace fused_attn::gpu::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kWarpsPerWarpgroup = 4;

// Whether setmaxnreg can give `producer` registers to each thread of the loading warpgroup, and `consumer` registers to
// each thread of `consumers` other warpgroups. A block that has a multiprocessor to itself starts with equal shares of
// 65536 registers, in multiples of 8 for a thread. setmaxnreg moves registers between the warpgroups, but cannot add
// any.
constexpr bool fits_registers(int producer, int consumers, int consumer) {
  const int threads = kWarpgroup * (1 + consumers), at_launch = 65536 / threads / 8 * 8;
  return kWarpgroup * (producer + consumers * consumer) <= threads * at_launch;
}

// A caller of TileLoader can load something else together with a tile, for which consumers wait at the same barrier.
// This type, the default, loads nothing else. In another type (StepLoad in fused_backward_loading.h), `store` writes to
// shared memory, and `start` starts to copy `bytes` bytes.
struct NothingElse {
  static constexpr uint32_t bytes = 0;
  GPU_DEVICE void store() const {}
  GPU_DEVICE void start(uint32_t) const {}
};

// Where TMA finds the rows of a tile: row `row` of a head and the following ones.
struct HeadRows {
  const Map& map;
  int row;
  int head;
  int batch;

  template <class SlotTile>
  GPU_DEVICE void load(uint32_t tile, uint32_t barrier) const {
    SlotTile::load(tile, map, barrier, row, head, batch);
  }
};

// Loads tiles into slots of rings. All lanes of one warp call the functions, but only the leader lane waits for empty
// slots and issues TMA. If every lane waited, a late lane could miss a phase: mbarrier_wait knows a phase by its parity
// only, so a lane that came one phase late would wait until the same parity comes again.
struct TileLoader {
  uint32_t cleaning;             // a barrier: a tile has arrived, and its rows that are not valid can be overwritten
  bool is_leader;                // this thread is the lane that issues TMA
  uint32_t cleaning_parity = 0;  // of the next wait at `cleaning`

  // When the slot is empty, starts to load `rows` into the tile at `slot_tile`. The full barrier of the slot then
  // counts the bytes that arrive.
  template <class SlotTile, int kSlots, class Source = HeadRows, class Also = NothingElse>
  GPU_DEVICE void load(const Ring<kSlots>& ring, RingPosition<kSlots> position, uint32_t slot_tile, const Source& rows,
                       const Also& also = {}) const {
    if (is_leader) {
      position.wait_empty(ring);
      also.store();
      const uint32_t barrier = ring.full(position.slot());
      mbarrier_arrive_expect(barrier, SlotTile::kBytes + also.bytes);
      rows.template load<SlotTile>(slot_tile, barrier);
      also.start(barrier);
    }
  }

  // Fills a slot with zeros in the rows that are not valid: memory may hold NaN there, and NaN times a probability of 0
  // is NaN. TMA reports the arrival at the barrier `cleaning`, the warp waits, overwrites the rows, and then marks the
  // slot as full.
  template <class SlotTile, int kSlots, class Valid, class Source = HeadRows, class Also = NothingElse>
  GPU_DEVICE void load_valid(const Ring<kSlots>& ring, RingPosition<kSlots> position, uint32_t slot_tile,
                             const Source& rows, const Valid& valid, const Also& also = {}) {
    if (valid.all()) {
      load<SlotTile>(ring, position, slot_tile, rows, also);
      return;
    }
    if (is_leader) {
      position.wait_empty(ring);
      also.store();
      mbarrier_arrive_expect(cleaning, SlotTile::kBytes + also.bytes);
      rows.template load<SlotTile>(slot_tile, cleaning);
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
