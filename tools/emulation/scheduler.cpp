#include "scheduler.h"

#include <utility>

#include "block.h"
#include "context_switch.h"
#include "errors.h"

namespace fused_attn::emulation {

void Scheduler::start(int slot) {
  num_ready_ = 0;
  error_.clear();
  std::vector<Thread>& threads = block().threads;
  num_alive_ = int(threads.size());
  for (Thread& thread : threads) {
    thread.stack_pointer = prepare_stack(stack_top(slot, thread.index), thread_main);
    make_ready(thread);
  }
}

Progress Scheduler::run() {
  Block& b = block();
  b.current = next_thread();
  if (b.current == nullptr) return Progress::kNone;
  switch_context(&host_context_, b.current->stack_pointer);
  b.current = nullptr;
  return progress_;
}

void Scheduler::leave(Progress progress) {
  progress_ = progress;
  switch_context(&block().current->stack_pointer, host_context_);
}

void Scheduler::yield() {
  make_ready(*block().current);
  leave(Progress::kSome);
}

void Scheduler::thread_main() {
  Block& b = block();
  b.kernel();
  Thread& thread = *b.current;
  check_no_copies_left(thread);
  check_no_bulk_stores_left(thread);
  thread.is_done = true;
  if (--b.scheduler.num_alive_ == 0) b.scheduler.leave(Progress::kEnded);
  b.scheduler.switch_to_next();
  __builtin_unreachable();
}

void Scheduler::stop(std::string error) {
  error_ = std::move(error);
  leave(Progress::kEnded);
  __builtin_unreachable();
}

void Scheduler::make_ready(Thread& thread) {
  if (thread.is_ready || thread.is_done) return;
  thread.is_ready = true;
  thread.wait = Wait{};
  ready(num_ready_++) = thread.index;
}

void Scheduler::wait(const Wait& wait) {
  block().current->wait = wait;
  switch_to_next();
}

void Scheduler::switch_to_next() {
  constexpr int kSwitchesPerTurn = 256;  // with a random order, the average number of thread switches in a turn
  Block& b = block();
  Thread& from = *b.current;
  if (b.options.seed && b.random() % kSwitchesPerTurn == 0) return leave(Progress::kSome);
  Thread* to = next_thread();
  if (to == nullptr) return leave(Progress::kSome);
  if (to == &from) return;
  b.statistics.switches++;
  b.current = to;
  switch_context(&from.stack_pointer, to->stack_pointer);
}

// Returns the next thread to run. With seed 0, this is the first thread in the queue, and TMA operations complete when
// no thread can run. With another seed, it is a random thread, and TMA operations also complete at random times.
Thread* Scheduler::next_thread() {
  Block& b = block();
  const bool is_random = b.options.seed != 0;
  for (;;) {
    if (is_random && !b.tma.is_empty() && b.random() % 64 == 0) b.tma.complete_one();
    if (num_ready_) {
      if (is_random) std::swap(ready(0), ready(b.random() % num_ready_));
      Thread& thread = b.threads[ready(0)];
      first_ready_++;
      num_ready_--;
      thread.is_ready = false;
      return &thread;
    }
    if (b.tma.is_empty()) return nullptr;
    b.tma.complete_one();
  }
}

}  // namespace fused_attn::emulation
