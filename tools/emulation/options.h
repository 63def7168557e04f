// What a test can choose about an emulated launch (Options), and what it learns from the launch (Statistics).
// tests/cuda/emulator.py declares the same structs with ctypes, so the order of fields counts.
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
  int32_t poison = true;        // fills shared memory, destinations of copies and accumulators in flight with NaN
  int32_t strict_wgmma = true;  // after wgmma_wait, a warp knows only that its own part of the products is complete
  int32_t count_bank_conflicts = false;
  int32_t resident_blocks = 2;       // blocks that run side by side, as on as many multiprocessors
  int32_t ordered_sums = true;       // additions of floats by several blocks to one place need a fixed order
  int32_t registers_per_thread = 0;  // at the launch; 0 = all that one block on a multiprocessor can have
};

struct Statistics {
  uint64_t launches = 0;
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
  uint64_t shared_accesses = 0;    // instructions of warps whose bank conflicts were counted
  uint64_t shared_wavefronts = 0;  // cycles that these instructions take
  uint64_t ideal_wavefronts = 0;   // cycles that they would take without conflicts
};

}  // namespace fused_attn::emulation
