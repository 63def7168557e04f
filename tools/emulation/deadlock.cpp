// The report of a deadlock: which threads wait, for what, and how much of that has arrived.
#include <map>
#include <vector>

#include "block.h"
#include "errors.h"
#include "global_memory.h"

namespace fused_attn::emulation {
namespace {

// What one thread waits for, and how much of that has arrived.
std::string describe(const Wait& wait, int64_t blocks_to_start) {
  Block& b = block();
  switch (wait.what) {
    case Wait::kNothing: return "nothing";
    case Wait::kWarp:
      return format("%s: %d of 32 lanes of warp %u arrived", wait.name, b.warps.arrived_in_warp(wait.id), wait.id);
    case Wait::kWarpgroup:
      return format("%s: %d of 128 threads of warpgroup %u arrived", wait.name, b.warps.arrived_in_warpgroup(wait.id),
                    wait.id);
    case Wait::kBarrier: return format("%s: %s", wait.name, b.barriers.describe(wait.id).c_str());
    case Wait::kMbarrier:
      return format("%s for parity %u at shared offset %u: %s", wait.name, wait.parity, wait.id - kSharedBase,
                    b.mbarriers.describe(wait.id).c_str());
    case Wait::kRegisters:
      return format("%s: a warpgroup wants %u registers a thread, %s", wait.name, wait.id,
                    b.registers.describe().c_str());
    case Wait::kCounter: {
      const int now = *wait.counter;
      std::string text = format("%s: %s is %d and waited for to become %d", wait.name,
                                describe_counter(wait.counter).c_str(), now, wait.value);
      if (now > wait.value) text += ", which it has passed";
      if (blocks_to_start)
        text += format(
            "; %d blocks run side by side, and %lld later ones, which may be what it waits for, do not start before "
            "one "
            "of them ends",
            b.options.resident_blocks, (long long)blocks_to_start);
      return text;
    }
  }
  return "";
}

// The numbers as text, with ranges: "0-31, 64".
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size(); i++) {
    const size_t first = i;
    while (i + 1 < numbers.size() && numbers[i + 1] == numbers[i] + 1) i++;
    if (!text.empty()) text += ", ";
    text += first == i ? format("%d", numbers[i]) : format("%d-%d", numbers[first], numbers[i]);
  }
  return text;
}

}  // namespace

std::string deadlock_report(int64_t blocks_to_start) {
  Block& b = block();
  std::map<std::string, std::vector<int>> waiting;
  for (const Thread& thread : b.threads)
    if (!thread.is_done) waiting[describe(thread.wait, blocks_to_start)].push_back(thread.index);
  std::string text = format("[block %d, %d, %d] DEADLOCK: no thread can go on", b.index.x, b.index.y, b.index.z);
  for (const auto& [what, threads] : waiting) text += "\n  threads " + ranges(threads) + " wait in " + what;
  return text;
}

}  // namespace fused_attn::emulation
