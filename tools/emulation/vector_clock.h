// What an agent knows of the past of all agents: for each agent, a number of ticks of its clock.
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

// The same for global memory, where the fence is fence_async_proxy_global. Most kernels learn little, so only what is
// known is stored, and clocks share it. About another block, a thread knows how many of the block's releases it has
// acquired. About the bulk stores of a warp of its own block (own_bulk_stores), it knows how many of them are complete.
class GlobalClock {
 public:
  using Ticks = std::map<std::pair<Plane, int>, uint32_t>;

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
  bool covers(const Ticks& other) const {
    for (const auto& [key, tick] : other)
      if (get(key.first, key.second) < tick) return false;
    return true;
  }

  std::shared_ptr<const Ticks> ticks_;  // null: none
};

class VectorClock {
 public:
  GlobalClock global;

  void reset(int agents) {
    agents_ = agents;
    ticks_.assign(2 * agents, 0);
    global = GlobalClock{};
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
