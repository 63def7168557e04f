// What an agent knows of the past of all agents: for each, up to which of its clock ticks.
//
// There are two planes. Ordinary: what happened before. Fenced: what happened before and was then made visible to the async
// proxy (TMA, wgmma) by a proxy fence, which copies the ordinary plane onto the fenced one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fused_attn::emulation {

enum Plane { kOrdinary = 0, kFenced = 1 };

class VectorClock {
 public:
  void reset(int agents) {
    agents_ = agents;
    ticks_.assign(2 * agents, 0);
  }

  uint32_t get(Plane plane, int agent) const { return ticks_[plane * agents_ + agent]; }

  void tick(int agent) { ticks_[agent]++; }

  void learn(int agent, uint32_t tick) {
    for (uint32_t* known : {&ticks_[agent], &ticks_[agents_ + agent]}) *known = std::max(*known, tick);
  }

  void join(const VectorClock& other) {
    const uint32_t* theirs = other.ticks_.data();
    uint32_t* ours = ticks_.data();
    for (size_t i = 0, n = ticks_.size(); i < n; i++) ours[i] = std::max(ours[i], theirs[i]);
  }

  void fence() {
    for (int i = 0; i < agents_; i++) ticks_[agents_ + i] = std::max(ticks_[agents_ + i], ticks_[i]);
  }

 private:
  int agents_ = 0;
  std::vector<uint32_t> ticks_;  // [plane][agent]
};

}  // namespace fused_attn::emulation
