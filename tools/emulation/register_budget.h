// The registers of a block (setmaxnreg). decrease_registers gives registers of a warp back to the block, and
// increase_registers waits until the block has enough free ones.
#pragma once
#include <deque>
#include <string>
#include <vector>

namespace fused_attn::emulation {

constexpr int kRegistersOfMultiprocessor = 64 * 1024;

class RegisterBudget {
 public:
  // Starts a block whose threads have per_thread registers each. 0 means as many as one block on a multiprocessor can
  // have.
  void reset(int threads, int per_thread);
  // The primitives increase_registers and decrease_registers, for the current thread's warp.
  void change(int per_thread, bool is_increase);
  // Fails if warps of one warpgroup end with different numbers of registers.
  void check_warpgroups_agree() const;
  std::string describe() const;

 private:
  // Serves requests in order, as far as the free registers suffice.
  void grant_waiting();

  struct Request {
    int warp;
    int per_thread;
  };
  int free_ = 0;              // registers that no warp has
  std::vector<int> of_warp_;  // registers of each thread of a warp
  std::deque<Request> waiting_;
};

}  // namespace fused_attn::emulation
