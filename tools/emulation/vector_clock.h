// Vector clocks: what an agent knows of the past of all agents. For each agent, a clock holds the number of its ticks
// that come before now. Whoever waits for another agent takes over what that agent knew (join).
//
// There are two planes. The ordinary plane is what happened before. The fenced plane is what happened before and was
// then made visible to the async proxy (TMA, wgmma). A proxy fence copies the ordinary plane onto the fenced one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace fused_attn::emulation {

enum Plane { kOrdinary = 0, kFenced = 1 };

// What a thread knows about global memory, in the same two planes. The fence is fence_async_proxy_global here. A clock
// has one number for each source:
//
//   another block                                     how many releases of that block the thread has acquired
//   the bulk stores of a warp of the thread's block   how many of these stores are complete (own_bulk_stores)
//
// Most of these numbers are 0. So the clock is a map without zeros, and clocks with equal contents share one map.
class GlobalClock {
 public:
  using Ticks = std::map<std::pair<Plane, int>, uint32_t>;

  // The source that stands for the bulk stores of an agent. It is negative, so it is not the number of a block.
  static int own_bulk_stores(int agent) { return -1 - agent; }

  uint32_t get(Plane plane, int source) const {
    if (ticks_ == nullptr) return 0;
    const auto found = ticks_->find({plane, source});
    return found == ticks_->end() ? 0 : found->second;
  }

  void learn(const Ticks& more) {
    Ticks all = ticks();
    for (const auto& [source, tick] : more) all[source] = std::max(all[source], tick);
    ticks_ = std::make_shared<const Ticks>(std::move(all));
  }

  void join(const GlobalClock& other) {
    if (other.ticks_ == ticks_ || covers(other.ticks())) return;
    if (other.covers(ticks()))
      ticks_ = other.ticks_;
    else
      learn(other.ticks());
  }

  void fence() {
    Ticks fenced;
    for (const auto& [key, tick] : ticks())
      if (key.first == kOrdinary) fenced[{kFenced, key.second}] = tick;
    learn(fenced);
  }

  const Ticks& ticks() const {
    static const Ticks none;
    return ticks_ ? *ticks_ : none;
  }

 private:
  // Whether this clock has no smaller number than `other` for any source.
  bool covers(const Ticks& other) const {
    for (const auto& [key, tick] : other)
      if (get(key.first, key.second) < tick) return false;
    return true;
  }

  std::shared_ptr<const Ticks> ticks_;  // null: none
};

// What an agent knows of the agents of its block, and of global memory.
class VectorClock {
 public:
  GlobalClock global;

  void reset(int agents) {
    agents_ = agents;
    ticks_.assign(2 * agents, 0);
    global = GlobalClock{};
  }

  uint32_t get(Plane plane, int agent) const { return ticks_[plane * agents_ + agent]; }

  // Begins the next tick of the clock's own agent.
  void tick(int agent) { ticks_[agent]++; }

  // Learns that an agent of the async proxy has reached a tick. No fence is needed between two accesses of the async
  // proxy, so the tick goes into both planes.
  void learn(int agent, uint32_t tick) {
    for (uint32_t* known : {&ticks_[agent], &ticks_[agents_ + agent]}) *known = std::max(*known, tick);
  }

  void join(const VectorClock& other) {
    const uint32_t* theirs = other.ticks_.data();
    uint32_t* ours = ticks_.data();
    for (size_t i = 0, n = ticks_.size(); i < n; i++) ours[i] = std::max(ours[i], theirs[i]);
    global.join(other.global);
  }

  void fence() {
    for (int i = 0; i < agents_; i++) ticks_[agents_ + i] = std::max(ticks_[agents_ + i], ticks_[i]);
  }

 private:
  int agents_ = 0;
  std::vector<uint32_t> ticks_;  // [plane][agent]
};

}  // namespace fused_attn::emulation
