// Operations that a whole warp or warpgroup executes together: all threads wait for the last one, which carries the
// operation out for all.
#pragma once
#include <vector>

namespace fused_attn::emulation {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;

class Warps {
 public:
  void reset(int warps, int warpgroups);
  int arrived_in_warp(int warp) const { return warps_[warp].num_arrived; }
  int arrived_in_warpgroup(int warpgroup) const { return warpgroups_[warpgroup].num_arrived; }

  // Each thread of the warp (warpgroup) calls this with its operand, and waits for the others. The last thread to
  // arrive gets the operands of all threads, in the order of the threads. That thread must then release the other
  // threads, or give them something else to wait for. The other threads get null when they have been released. `name`
  // is the name of the operation. It is a fault if threads of one group meet in different operations.
  void** meet_in_warp(const char* name, void* operand);
  void** meet_in_warpgroup(const char* name, void* operand);
  // Wakes the other threads of the current thread's warp (warpgroup).
  void release_warp();
  void release_warpgroup();

 private:
  // The threads of a warp or warpgroup that have arrived so far.
  struct Meeting {
    int num_arrived = 0;
    const char* name = "";
    void* operands[kWarpgroupSize];
  };
  std::vector<Meeting> warps_, warpgroups_;
};

}  // namespace fused_attn::emulation
