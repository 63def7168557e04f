// Runs the threads of a block one at a time, each on a stack of its own, until one has to wait.
//
// A block in turn runs until it ends, until none of its threads can go on, or until it yields, and then others run.
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

enum class Progress {
  kNone,   // all threads wait; perhaps for what another block does
  kSome,   // likewise, or the block has yielded, but some have run
  kEnded,  // all threads have ended, or one has failed
};

class Scheduler {
 public:
  // Before the first run.
  void start(int slot);

  Progress run();
  const std::string& error() const { return error_; }  // that ended the block, or an empty text

  // Lets other blocks run; the current thread stays ready.
  void yield();

  // Lets others run until somebody calls make_ready on the current thread.
  void wait(const Wait& wait);
  void make_ready(Thread& thread);

  // Ends the block with this error; the stacks of its threads are abandoned.
  [[noreturn]] void stop(std::string error);

 private:
  static void thread_main();
  Thread* next_thread();  // null: none can run
  void switch_to_next();
  void leave(Progress progress);

  std::deque<int> ready_;
  int num_alive_ = 0;
  void* host_context_ = nullptr;
  Progress progress_ = Progress::kNone;
  std::string error_;
};

// What the threads of the current block wait for, when none can run, while that many blocks have not started.
std::string deadlock_report(int64_t blocks_to_start);

}  // namespace fused_attn::emulation
