#include "mbarriers.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {
namespace {

constexpr int kMbarrierBytes = 8;
constexpr int kMaxBytesOfPhase = (1 << 20) - 1;

}  // namespace

void Mbarriers::init(uint32_t address, int arrivals) {
  Block& b = block();
  b.shared.at(address, kMbarrierBytes, kMbarrierBytes, "mbarrier_init");
  if (mbarriers_.count(address))
    fail("mbarrier_init: the mbarrier at shared offset %u is already initialised", address - kSharedBase);
  if (arrivals < 1 || arrivals > kMaxBytesOfPhase) fail("mbarrier_init: %d arrivals", arrivals);
  write_shared(address, kMbarrierBytes, "mbarrier_init");
  if (b.options.race_detection) b.races.protect_mbarrier(address - kSharedBase);
  if (mbarriers_.size() == kMaxMbarriers)
    fail("mbarrier_init: more than %d mbarriers; raise kMaxMbarriers", kMaxMbarriers);
  Mbarrier mbarrier;
  mbarrier.expected = mbarrier.pending = arrivals;
  mbarrier.agent = b.agents.mbarrier_loads(int(mbarriers_.size()));
  mbarrier.init_thread = b.current->index;
  mbarrier.init_tick = b.current->epoch().tick;
  mbarrier.arriving.reset(b.agents.count());
  mbarrier.completed.reset(b.agents.count());
  mbarriers_.emplace(address, std::move(mbarrier));
}

void Mbarriers::fence_init() {
  const Epoch now = block().current->epoch();
  for (auto& [address, mbarrier] : mbarriers_)
    if (mbarrier.init_thread == now.agent && !mbarrier.fence_tick) mbarrier.fence_tick = now.tick;
  tick();
}

Mbarriers::Mbarrier& Mbarriers::find(uint32_t address, const char* what) {
  Block& b = block();
  b.shared.at(address, kMbarrierBytes, kMbarrierBytes, what);
  const auto found = mbarriers_.find(address);
  if (found == mbarriers_.end())
    fail("%s: there is no initialised mbarrier at shared offset %u", what, address - kSharedBase);
  Mbarrier& mbarrier = found->second;
  if (b.options.race_detection && b.current->clock.get(kOrdinary, mbarrier.init_thread) < mbarrier.init_tick)
    fail("RACE: %s at shared offset %u is not ordered after the mbarrier_init by thread %d", what,
         address - kSharedBase, mbarrier.init_thread);
  return mbarrier;
}

void Mbarriers::complete_phase_if_due(uint32_t address, Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.missing_bytes) return;
  Block& b = block();
  mbarrier.phase++;
  mbarrier.pending = mbarrier.expected;
  std::swap(mbarrier.completed, mbarrier.arriving);
  mbarrier.arriving.reset(b.agents.count());
  for (Thread& thread : b.threads)
    if (thread.wait.what == Wait::kMbarrier && thread.wait.id == address && mbarrier.phase % 2 != thread.wait.parity)
      b.scheduler.make_ready(thread);
}

void Mbarriers::arrive(uint32_t address, uint32_t expected_bytes) {
  Mbarrier& mbarrier = find(address, "mbarrier_arrive");
  if (mbarrier.pending == 0)
    fail("mbarrier_arrive at shared offset %u: more than the %d arrivals of a phase", address - kSharedBase,
         mbarrier.expected);
  if (block().options.race_detection) {
    mbarrier.arriving.join(block().current->clock);
    tick();
  }
  mbarrier.missing_bytes += expected_bytes;
  if (mbarrier.missing_bytes > kMaxBytesOfPhase)
    fail("mbarrier_arrive_expect at shared offset %u: %lld bytes, more than a phase can count", address - kSharedBase,
         (long long)mbarrier.missing_bytes);
  mbarrier.pending--;
  complete_phase_if_due(address, mbarrier);
}

// Waits until the phase of this parity is complete, and takes over what the threads that arrived know.
void Mbarriers::wait(uint32_t address, uint32_t parity) {
  if (parity > 1) fail("mbarrier_wait: parity %u, expected 0 or 1", parity);
  Mbarrier& mbarrier = find(address, "mbarrier_wait");
  if (mbarrier.phase % 2 == parity) {
    block().scheduler.wait({Wait::kMbarrier, "mbarrier_wait", address, parity});
    if (mbarrier.phase % 2 == parity)
      fail(
          "mbarrier_wait at shared offset %u: the phase after the one waited for completed too before this thread "
          "ran, which on a GPU could wait for ever",
          address - kSharedBase);
  }
  if (block().options.race_detection) block().current->clock.join(mbarrier.completed);
}

int Mbarriers::begin_copy(uint32_t address, uint32_t tick) {
  Mbarrier& mbarrier = find(address, "a TMA load's mbarrier");
  const VectorClock& clock = block().current->clock;
  const bool is_fenced = (mbarrier.fence_tick && clock.get(kOrdinary, mbarrier.init_thread) >= mbarrier.fence_tick) ||
                         clock.get(kFenced, mbarrier.init_thread) >= mbarrier.init_tick;
  if (block().options.race_detection && !is_fenced)
    fail("a TMA load uses the mbarrier at shared offset %u, and no fence_mbarrier_init follows its mbarrier_init",
         address - kSharedBase);
  mbarrier.last_copy = tick;
  return mbarrier.agent;
}

void Mbarriers::complete_copy(uint32_t address, uint32_t bytes, const VectorClock& clock) {
  Mbarrier& mbarrier = mbarriers_.at(address);
  mbarrier.missing_bytes -= bytes;
  if (block().options.race_detection) mbarrier.arriving.join(clock);
  complete_phase_if_due(address, mbarrier);
}

void Mbarriers::check_no_bytes_are_missing() const {
  for (const auto& [address, mbarrier] : mbarriers_)
    if (mbarrier.missing_bytes)
      fail("the block ended with the mbarrier at shared offset %u in the middle of a phase: %s", address - kSharedBase,
           describe(address).c_str());
}

void Mbarriers::check_copies_were_waited_for() const {
  const std::vector<Thread>& threads = block().threads;
  if (!block().options.race_detection) return;  // then, clocks do not tell who has waited
  for (const auto& [address, mbarrier] : mbarriers_) {
    const auto has_waited = [&copies = mbarrier](const Thread& thread) {
      return thread.clock.get(kOrdinary, copies.agent) >= copies.last_copy;
    };
    if (std::none_of(threads.begin(), threads.end(), has_waited))
      fail("the block ended, and no thread has waited for the last TMA load of the mbarrier at shared offset %u",
           address - kSharedBase);
  }
}

std::string Mbarriers::describe(uint32_t address) const {
  const Mbarrier& mbarrier = mbarriers_.at(address);
  return format("%u phases complete, in the next %d of %d arrivals and %lld bytes are missing", mbarrier.phase,
                mbarrier.pending, mbarrier.expected, (long long)mbarrier.missing_bytes);
}

}  // namespace fused_attn::emulation
