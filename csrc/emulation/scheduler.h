// Runs the threads of a block one at a time, each on a stack of its own, until one has to wait.
#pragma once
#include <cstdint>
#include <deque>
#include <string>

namespace fused_attn::emulation {

struct Thread;

struct Wait {
  enum What { kNothing, kWarp, kWarpgroup, kBarrier, kMbarrier, kRegisters, kCounter };
  What what = kNothing;
  const char* name = "";  // of the operation
  uint32_t id = 0;        // warp, warpgroup, barrier, address of the mbarrier, registers wanted
  uint32_t parity = 0;    // of the mbarrier
  const int* counter = nullptr;
  int value = 0;  // that the counter is to have
};

class Scheduler {
 public:
  // Runs the block's threads to their end. Returns the error that ended them, or an empty text.
  std::string run();

  // Lets others run until somebody calls make_ready on the current thread.
  void wait(const Wait& wait);
  void make_ready(Thread& thread);

  // Ends the block with this error; the stacks of its threads are abandoned.
  [[noreturn]] void stop(std::string error);

 private:
  static void thread_main();
  Thread& next_thread();
  void switch_to_next();

  std::deque<int> ready_;
  int num_alive_ = 0;
  void* host_context_ = nullptr;
  std::string error_;
};

// What all threads wait for, when none can run.
std::string deadlock_report();

}  // namespace fused_attn::emulation
