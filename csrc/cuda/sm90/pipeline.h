// Rings of mbarriers, by which a loading warp and the warpgroups that use its tiles wait for one another.
#pragma once
#include "../hardware.h"

namespace fused_attn::gpu::sm90 {

// The barriers of a ring of kSlots slots. Each slot has two mbarriers of 8 bytes. The barrier "full" says that the
// slot's contents have arrived, and "empty" that they are no longer needed.
template <int kSlots>
struct Ring {
  static constexpr uint32_t kBytes = kSlots * 16;
  uint32_t barriers;  // address of the first barrier

  GPU_DEVICE uint32_t full(int slot) const { return barriers + slot * 16; }
  GPU_DEVICE uint32_t empty(int slot) const { return full(slot) + 8; }

  // Initialises the barriers. One thread calls this before the block synchronises. To empty a slot, each of `consumers`
  // warps has to arrive once.
  GPU_DEVICE void init(int consumers) const {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), consumers);
    }
  }
};

// Gives each ring its barriers, one ring after another from `address` on, where the plan has kRoom bytes for barriers.
// Returns the address behind the last barrier of the rings. The caller's own barriers, of kOtherBytes bytes, follow
// there.
template <uint32_t kRoom, uint32_t kOtherBytes, int... kSlots>
GPU_DEVICE uint32_t lay_out_rings(uint32_t address, Ring<kSlots>&... rings) {
  static_assert((Ring<kSlots>::kBytes + ... + kOtherBytes) <= kRoom);
  ((rings.barriers = address, address += rings.kBytes), ...);
  return address;
}

// Initialises the barriers of several rings, see Ring::init.
template <int... kSlots>
GPU_DEVICE void init_rings(int consumers, const Ring<kSlots>&... rings) {
  (rings.init(consumers), ...);
}

// How many slots of a ring one side, producer or consumer, has used. Both sides start at 0, and advance once for each
// use of a slot.
template <int kSlots>
struct RingPosition {
  static constexpr bool kIsPowerOfTwo = (kSlots & (kSlots - 1)) == 0;
  uint32_t uses = 0;  // if kSlots is no power of two, modulo 2 * kSlots, so that no division is needed

  GPU_DEVICE int slot() const { return kIsPowerOfTwo ? uses % kSlots : uses < kSlots ? uses : uses - kSlots; }
  // The parity of the phase that mbarrier_wait waits for: it changes each time the position passes the end of the ring.
  GPU_DEVICE uint32_t parity() const { return kIsPowerOfTwo ? uses / kSlots & 1 : uses >= kSlots; }
  GPU_DEVICE void advance() {
    ++uses;
    if (!kIsPowerOfTwo && uses == 2 * kSlots) uses = 0;
  }
  // Waits until a producer has filled the slot at this position, or until consumers have emptied it. wait_empty passes
  // at once the first time round: a fresh barrier counts as complete for parity 1.
  GPU_DEVICE void wait_full(const Ring<kSlots>& ring) const { mbarrier_wait(ring.full(slot()), parity()); }
  GPU_DEVICE void wait_empty(const Ring<kSlots>& ring) const { mbarrier_wait(ring.empty(slot()), parity() ^ 1); }

  // Marks the slot as empty for this warp. All lanes of the warp call this when they have finished with the slot.
  GPU_DEVICE void release(const Ring<kSlots>& ring) const {
    sync_warp();
    if (thread_index() % 32 == 0) mbarrier_arrive(ring.empty(slot()));
  }
};

}  // namespace fused_attn::gpu::sm90
