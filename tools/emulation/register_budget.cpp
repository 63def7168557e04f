#include "register_budget.h"

#include <algorithm>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {
namespace {

constexpr int kGranularity = 8;
constexpr int kMost = 256;  // setmaxnreg accepts 256, though an instruction can name only 255 registers
constexpr int kFewest = 24;

}  // namespace

void RegisterBudget::reset(int threads, int per_thread) {
  if (per_thread == 0)
    per_thread = std::min(kMost, kRegistersOfMultiprocessor / threads / kGranularity * kGranularity);
  else
    per_thread = (per_thread + kGranularity - 1) / kGranularity * kGranularity;
  if (per_thread * threads > kRegistersOfMultiprocessor)
    fail("launch: %d threads of %d registers are more than the %d of a multiprocessor", threads, per_thread,
         kRegistersOfMultiprocessor);
  of_warp_.assign(threads / kWarpSize, per_thread);
  waiting_.clear();
  free_ = 0;
}

// The last lane of a warp to arrive does the work for the whole warp. It gives registers back at once, or it adds a
// request for more and waits until the request is granted.
void RegisterBudget::change(int per_thread, bool is_increase) {
  Block& b = block();
  const char* name = is_increase ? "increase_registers" : "decrease_registers";
  if (per_thread % kGranularity || per_thread < kFewest || per_thread > kMost)
    fail("%s: %d registers; expected a multiple of %d from %d to %d", name, per_thread, kGranularity, kFewest, kMost);
  if (b.warps.meet_in_warp(name, nullptr) == nullptr) return;
  const int warp = b.current->warp;
  if (is_increase ? per_thread < of_warp_[warp] : per_thread > of_warp_[warp])
    fail("%s: to %d, from %d registers", name, per_thread, of_warp_[warp]);
  if (!is_increase) {
    free_ += (of_warp_[warp] - per_thread) * kWarpSize;
    of_warp_[warp] = per_thread;
    b.warps.release_warp();
    grant_waiting();
    return;
  }
  waiting_.push_back({warp, per_thread});
  const Wait wait = {Wait::kRegisters, name, uint32_t(per_thread)};
  for (int i = 0; i < kWarpSize; i++) b.threads[warp * kWarpSize + i].wait = wait;
  grant_waiting();
  if (of_warp_[warp] != per_thread) b.scheduler.wait(wait);
}

void RegisterBudget::grant_waiting() {
  Block& b = block();
  while (!waiting_.empty()) {
    const Request& request = waiting_.front();
    const int wanted = (request.per_thread - of_warp_[request.warp]) * kWarpSize;
    if (wanted > free_) return;
    free_ -= wanted;
    of_warp_[request.warp] = request.per_thread;
    b.statistics.most_registers = std::max(b.statistics.most_registers, uint64_t(request.per_thread));
    for (int i = 0; i < kWarpSize; i++) {
      Thread& lane = b.threads[request.warp * kWarpSize + i];
      if (&lane != b.current) b.scheduler.make_ready(lane);
    }
    waiting_.pop_front();
  }
}

void RegisterBudget::check_warpgroups_agree() const {
  for (size_t warp = 0; warp < of_warp_.size(); warp++) {
    const size_t first = warp / kWarpsPerWarpgroup * kWarpsPerWarpgroup;
    if (of_warp_[warp] != of_warp_[first])
      fail("the block ended with %d registers a thread in warp %zu and %d in warp %zu of the same warpgroup",
           of_warp_[warp], warp, of_warp_[first], first);
  }
}

std::string RegisterBudget::describe() const {
  return format("%d registers of the block are free, and each warp that waits needs 32 times the difference", free_);
}

}  // namespace fused_attn::emulation
