// Rings of mbarriers: how the warp that loads tiles and the warpgroups that use them wait for one another.
#pragma once
#include "../hardware.h"

namespace fused_attn::gpu::sm90 {

// The slots of a ring. Each slot has a barrier "full" and a barrier "empty", of 8 bytes each.
template <int kSlots>
struct Ring {
  static constexpr uint32_t kBytes = kSlots * 16;
  uint32_t barriers;

  GPU_DEVICE uint32_t full(int slot) const { return barriers + slot * 16; }
  GPU_DEVICE uint32_t empty(int slot) const { return full(slot) + 8; }

  // One thread calls this before the block synchronises. To empty a slot, each of `consumers` warps has to arrive once.
  GPU_DEVICE void init(int consumers) const {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), consumers);
    }
  }
};

// How far one side of a ring has got. Both sides start at 0, and advance once for each use of a slot.
template <int kSlots>
struct RingPosition {
  static constexpr bool kIsPowerOfTwo = (kSlots & (kSlots - 1)) == 0;
  uint32_t uses = 0;  // if kSlots is no power of two, modulo 2 * kSlots, so that no division is needed

  GPU_DEVICE int slot() const { return kIsPowerOfTwo ? uses % kSlots : uses < kSlots ? uses : uses - kSlots; }
  GPU_DEVICE uint32_t parity() const { return kIsPowerOfTwo ? uses / kSlots & 1 : uses >= kSlots; }
  GPU_DEVICE void advance() {
    ++uses;
    if (!kIsPowerOfTwo && uses == 2 * kSlots) uses = 0;
  }
  GPU_DEVICE void wait_full(const Ring<kSlots>& ring) const { mbarrier_wait(ring.full(slot()), parity()); }
  GPU_DEVICE void wait_empty(const Ring<kSlots>& ring) const { mbarrier_wait(ring.empty(slot()), parity() ^ 1); }

  // All lanes of a consumer's warp call this when they have finished with the slot.
  GPU_DEVICE void release(const Ring<kSlots>& ring) const {
    sync_warp();
    if (thread_index() % 32 == 0) mbarrier_arrive(ring.empty(slot()));
  }
};

}  // namespace fused_attn::gpu::sm90
