// All state of a thread block that is being emulated, with one member for each idea.
#pragma once
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "bank_conflicts.h"
#include "barriers.h"
#include "copy_async.h"
#include "mbarriers.h"
#include "options.h"
#include "race_detector.h"
#include "register_budget.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "tma.h"
#include "vector_clock.h"
#include "warps.h"
#include "wgmma.h"

namespace fused_attn::emulation {

struct Index {
  int x = 0, y = 0, z = 0;
};

struct Thread {
  explicit Thread(int index)
      : index(index), warp(index / kWarpSize), lane(index % kWarpSize), warpgroup(index / kWarpgroupSize) {}

  int index, warp, lane, warpgroup;

  void* stack_pointer = nullptr;
  bool is_done = false;
  bool is_ready = false;
  Wait wait;

  VectorClock clock;
  CopyAsyncGroups copies;
  BulkGroups bulk_stores;
  const void* polled = nullptr;  // the global address that the thread read last
  uint32_t polls = 0;            // how often in a row it has read this address

  Epoch epoch() const { return {uint16_t(index), false, clock.get(kOrdinary, index)}; }
  auto known() const {
    return [this](Plane plane, int agent) { return clock.get(plane, agent); };
  }
};

struct Block {
  Options options;
  Statistics statistics;
  Index grid_size, index;
  int linear_index = 0;
  Agents agents;
  std::function<void()> kernel;
  std::mt19937 random;

  std::vector<Thread> threads;
  Thread* current = nullptr;  // null outside of the kernel

  Scheduler scheduler;
  SharedMemory shared;
  RaceDetector races;
  BankConflicts bank_conflicts;
  Warps warps;
  Barriers barriers;
  Mbarriers mbarriers;
  TmaQueue tma;
  WgmmaPipelines wgmma;
  RegisterBudget registers;

  // Whether asynchronous work that is issued now completes as late as possible. The seed decides.
  bool completes_late() {
    if (options.timing != kTimingBySeed) return options.timing == kLate;
    return options.seed == 0 || random() % 2;
  }
};

// The block that runs now, and all blocks that have started and not ended.
Block& block();
const std::vector<Block*>& running_blocks();

// Ends a tick of the current thread: what the thread does from now on is newer than what it did so far. Call this after
// the thread has published its clock.
inline void tick() { block().current->clock.tick(block().current->index); }

}  // namespace fused_attn::emulation
