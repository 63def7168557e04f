// What a test may choose about an emulated launch, and what the test gets to know. This is plain data that crosses to
// Python.
#pragma once
#include <cstdint>

namespace fused_attn::emulation {

enum Timing : int32_t {
  kTimingBySeed = 0,  // late for seed 0; otherwise each copy and each wgmma is early or late at random
  kEarly = 1,         // asynchronous work is complete when it is issued
  kLate = 2,          // asynchronous work completes when somebody waits for it, or when nothing else can run
};

struct Options {
  uint64_t seed = 0;  // 0: threads run first in, first out; otherwise the seed draws their order
  int32_t timing = kTimingBySeed;
  int32_t race_detection = true;
  int32_t poison = true;  // NaN in shared memory at the start, in what is being copied to, in accumulators in flight
  int32_t strict_wgmma = true;  // a wait for wgmma tells a warp about itself only, not about its warpgroup
  int32_t count_bank_conflicts = false;
  int32_t resident_blocks = 2;       // so many blocks run side by side, as on so many multiprocessors
  int32_t ordered_sums = true;       // blocks may add floats to the same place in a fixed order only
  int32_t registers_per_thread = 0;  // at the launch; 0: all that a multiprocessor has for one block
};

struct Statistics {
  uint64_t blocks = 0;
  uint64_t switches = 0;         // from one thread to another
  uint64_t warp_operations = 0;  // shuffles, ldmatrix, mma.sync, ...
  uint64_t barriers = 0;         // arrivals of warps at named barriers and sync_threads
  uint64_t mma = 0;
  uint64_t wgmma = 0;
  uint64_t async_copies = 0;  // cp.async, 16 bytes each
  uint64_t tma_loads = 0;
  uint64_t tma_stores = 0;         // and reductions
  uint64_t most_registers = 0;     // of a thread, after increase_registers
  uint64_t shared_accesses = 0;    // the instructions of warps of which bank conflicts were counted
  uint64_t shared_wavefronts = 0;  // the cycles that they take
  uint64_t ideal_wavefronts = 0;   // the same without conflicts
};

}  // namespace fused_attn::emulation
