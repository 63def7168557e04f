#include "barriers.h"

#include <utility>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {
namespace {

Thread* lanes_of(int warp) { return &block().threads[warp * kWarpSize]; }

}  // namespace

void Barriers::reset(int agents) {
  agents_ = agents;
  for (Barrier& barrier : barriers_) {
    barrier = Barrier{};
    barrier.clock.reset(agents);
  }
}

// The last lane of a warp to arrive does the work for the whole warp: it adds 32 to the count of the barrier, and joins
// the vector clocks of the 32 threads into the clock of the barrier. The last warp to arrive at the barrier wakes the
// warps that wait. The clock of the barrier is then joined into the clocks of their threads, because all accesses
// before the barrier come before all accesses after it.
void Barriers::arrive(int id, int threads, bool is_sync, const char* name) {
  Block& b = block();
  if (threads <= 0 || threads % kWarpSize || threads > int(b.threads.size()))
    fail("%s: %d threads at barrier %d; expected a multiple of 32 up to the block's %d", name, threads, id,
         int(b.threads.size()));
  int operands[2] = {id, threads};
  void** lanes = b.warps.meet_in_warp(name, operands);
  if (lanes == nullptr) return;
  for (int i = 0; i < kWarpSize; i++)
    if (static_cast<int*>(lanes[i])[0] != id || static_cast<int*>(lanes[i])[1] != threads)
      fail("DIVERGENCE: %s: lanes of one warp name different barriers or numbers of threads", name);

  Barrier& barrier = barriers_[id];
  if (barrier.arrived && barrier.expected != threads)
    fail("%s: %d threads at barrier %d, at which others expect %d", name, threads, id, barrier.expected);
  barrier.expected = threads;
  b.statistics.barriers++;
  const int warp = b.current->warp;
  if (b.options.race_detection) {
    for (int i = 0; i < kWarpSize; i++) {
      Thread& lane = lanes_of(warp)[i];
      barrier.clock.join(lane.clock);
      if (!is_sync) lane.clock.tick(lane.index);
    }
  }
  barrier.arrived += kWarpSize;
  if (is_sync) barrier.waiting_warps.push_back(warp);

  if (barrier.arrived < barrier.expected) {
    if (!is_sync) {
      b.warps.release_warp();
      return;
    }
    const Wait wait = {Wait::kBarrier, name, uint32_t(id)};
    for (int i = 0; i < kWarpSize; i++) lanes_of(warp)[i].wait = wait;
    b.scheduler.wait(wait);
    return;
  }

  for (int waiting : std::exchange(barrier.waiting_warps, {})) {
    for (int i = 0; i < kWarpSize; i++) {
      Thread& lane = lanes_of(waiting)[i];
      if (b.options.race_detection) {  // the barrier knows all that the lane knew when it arrived
        lane.clock = barrier.clock;
        lane.clock.tick(lane.index);
      }
      if (&lane != b.current) b.scheduler.make_ready(lane);
    }
  }
  if (!is_sync) b.warps.release_warp();
  barrier.arrived = 0;
  barrier.clock.reset(agents_);
}

void Barriers::check_none_is_open() const {
  for (int id = 0; id < kNumBarriers; id++)
    if (barriers_[id].arrived) fail("the block ended with barrier %s", describe(id).c_str());
}

std::string Barriers::describe(int id) const {
  return format("%d: %d of %d threads arrived", id, barriers_[id].arrived, barriers_[id].expected);
}

void sync_warp() {
  Block& b = block();
  if (b.warps.meet_in_warp("sync_warp", nullptr) == nullptr) return;
  if (b.options.race_detection) {
    Thread* lanes = lanes_of(b.current->warp);
    VectorClock all = lanes[0].clock;
    for (int i = 1; i < kWarpSize; i++) all.join(lanes[i].clock);
    for (int i = 0; i < kWarpSize; i++) {
      lanes[i].clock = all;
      lanes[i].clock.tick(lanes[i].index);
    }
  }
  b.warps.release_warp();
}

}  // namespace fused_attn::emulation
