// Runs the threads of a block one at a time, each on a stack of its own, until one has to wait.
//
// The turn of a block lasts until the block ends, until none of its threads can go on, or until it yields. Then other
// blocks run.
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
  int value = 0;  // the value that the counter has to reach
};

enum class Progress {
  kNone,   // no thread has run: all wait, perhaps for another block
  kSome,   // some threads have run, and now all wait, or the block has yielded
  kEnded,  // all threads have ended, or one has failed
};

class Scheduler {
 public:
  // Call this before the first run.
  void start(int slot);

  Progress run();
  const std::string& error() const { return error_; }  // that ended the block, or an empty text

  // Lets other blocks run. The current thread stays ready.
  void yield();

  // Lets other threads run, until somebody calls make_ready on the current one.
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

// Says what the threads of the current block wait for, when none can run and blocks_to_start blocks have not started.
std::string deadlock_report(int64_t blocks_to_start);

}  // namespace fused_attn::emulation
