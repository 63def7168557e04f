// The registers of a block. decrease_registers gives some back, increase_registers waits until there are enough.
#pragma once
#include <deque>
#include <string>
#include <vector>

namespace fused_attn::emulation {

constexpr int kRegistersOfMultiprocessor = 64 * 1024;

class RegisterBudget {
 public:
  // per_thread: registers of a thread at the launch; 0 = as many as one block on a multiprocessor can have.
  void reset(int threads, int per_thread);
  void change(int per_thread, bool is_increase);
  void check_warpgroups_agree() const;
  std::string describe() const;

 private:
  void grant_waiting();

  struct Request {
    int warp;
    int per_thread;
  };
  int free_ = 0;
  std::vector<int> of_warp_;  // a thread
  std::deque<Request> waiting_;
};

}  // namespace fused_attn::emulation
