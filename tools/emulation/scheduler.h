// Runs the threads of a block one at a time, each on a stack of its own. A thread runs until it has to wait.
//
// The turn of a block lasts until the block ends, until none of its threads can run, or until it yields. Then other
// blocks have their turns.
#pragma once
#include <array>
#include <cstdint>
#include <string>

namespace fused_attn::emulation {

struct Thread;

constexpr int kMaxThreads = 1024;  // of a block

// What a thread waits for, for reports and to find the threads to wake.
struct Wait {
  enum What { kNothing, kWarp, kWarpgroup, kBarrier, kMbarrier, kRegisters, kCounter };
  What what = kNothing;
  const char* name = "";         // name of the primitive
  uint32_t id = 0;               // number of the warp, warpgroup or barrier; address of the mbarrier; registers wanted
  uint32_t parity = 0;           // parity of the mbarrier
  const int* counter = nullptr;  // host address of the counter in global memory
  int value = 0;                 // the value that the counter has to reach
};

enum class Progress {
  kNone,   // no thread has run: all wait, perhaps for another block
  kSome,   // some threads have run, and now all wait, or the block has yielded
  kEnded,  // all threads have ended, or one has failed
};

class Scheduler {
 public:
  // Makes all threads of the current block ready. Each block that runs has a slot, a number that later blocks reuse,
  // and the threads run on the stacks of this slot.
  void start(int slot);

  // Gives the block a turn, and returns what became of the block in this turn.
  Progress run();
  // The error that ended the block, or an empty text.
  const std::string& error() const { return error_; }

  // Ends the turn of the block. The current thread stays ready.
  void yield();

  // wait: the current thread waits until another thread passes it to make_ready. Other threads run in the meantime.
  void wait(const Wait& wait);
  void make_ready(Thread& thread);

  // Ends the block with this error. The stacks of its threads are abandoned, without destructors.
  [[noreturn]] void stop(std::string error);

 private:
  static void thread_main();      // runs the kernel in a thread
  Thread* next_thread();          // takes a thread from the ready ones; null if none can run
  void switch_to_next();          // continues with another thread, or ends the turn
  void leave(Progress progress);  // ends the turn: returns to run()

  // The queue of the threads that can run, in a ring. Each thread is in the queue at most once.
  std::array<int, kMaxThreads> ready_;
  uint32_t first_ready_ = 0, num_ready_ = 0;
  int& ready(uint32_t i) { return ready_[(first_ready_ + i) % kMaxThreads]; }

  int num_alive_ = 0;
  void* host_context_ = nullptr;  // stack pointer of run()
  Progress progress_ = Progress::kNone;
  std::string error_;
};

// The text that says what the threads of the current block wait for, when none can run. blocks_to_start blocks of the
// grid have not started yet.
std::string deadlock_report(int64_t blocks_to_start);

}  // namespace fused_attn::emulation
