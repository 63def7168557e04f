// All state of an emulated block of threads. Each member stands for one idea, and has a file of its own.
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

// An emulated thread, with its stack and what the race detector knows about it.
struct Thread {
  explicit Thread(int index)
      : index(index), warp(index / kWarpSize), lane(index % kWarpSize), warpgroup(index / kWarpgroupSize) {}

  int index, warp, lane, warpgroup;

  void* stack_pointer = nullptr;
  bool is_done = false;
  bool is_ready = false;  // is in the queue of threads that can run
  Wait wait;              // what the thread waits for

  VectorClock clock;             // which accesses of other agents come before what this thread does now
  CopyAsyncGroups copies;        // its cp.async that have not been waited for
  BulkGroups bulk_stores;        // its bulk stores that have not been waited for
  const void* polled = nullptr;  // the global address that the thread read last
  uint32_t polls = 0;            // how often in a row it has read this address

  // Identifies an access that this thread makes now.
  Epoch epoch() const { return {uint16_t(index), /*is_async=*/false, clock.get(kOrdinary, index)}; }
  // A function for RaceDetector: up to which tick this thread knows of an agent.
  auto known() const {
    return [this](Plane plane, int agent) { return clock.get(plane, agent); };
  }
};

// A running block of threads.
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

// block(): the block whose thread runs now. running_blocks(): all blocks that have started and not ended.
extern Block* current_block;
inline Block& block() { return *current_block; }
const std::vector<Block*>& running_blocks();

// Ends a tick of the current thread's clock: accesses from now on are newer than those before. Call this after another
// agent has received a copy of the clock.
inline void tick() { block().current->clock.tick(block().current->index); }

}  // namespace fused_attn::emulation
