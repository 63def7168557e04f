// Operations that a whole warp or warpgroup executes together. The last thread to arrive carries them out for all.
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

  // The last thread to arrive gets the operands of all threads of the group, in order. It must then release the others,
  // or give them something else to wait for. The others get null once somebody has woken them. `name` names the
  // operation: it is an error if threads of one group meet in different operations.
  void** meet_in_warp(const char* name, void* operand);
  void** meet_in_warpgroup(const char* name, void* operand);
  void release_warp();
  void release_warpgroup();

 private:
  struct Meeting {
    int num_arrived = 0;
    const char* name = "";
    void* operands[kWarpgroupSize];
  };
  std::vector<Meeting> warps_, warpgroups_;
};

}  // namespace fused_attn::emulation
