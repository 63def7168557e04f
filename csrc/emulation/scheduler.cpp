#include "scheduler.h"

#include <utility>

#include "block.h"
#include "context_switch.h"
#include "errors.h"

namespace fused_attn::emulation {

std::string Scheduler::run() {
  Block& b = block();
  ready_.clear();
  error_.clear();
  num_alive_ = int(b.threads.size());
  for (Thread& thread : b.threads) {
    thread.stack_pointer = prepare_stack(stack_top(thread.index), thread_main);
    make_ready(thread);
  }
  b.current = &next_thread();
  switch_context(&host_context_, b.current->stack_pointer);
  b.current = nullptr;
  return error_;
}

void Scheduler::thread_main() {
  Block& b = block();
  b.kernel();
  Thread& thread = *b.current;
  check_no_copies_left(thread);
  check_no_bulk_stores_left(thread);
  thread.is_done = true;
  if (--b.scheduler.num_alive_ == 0) b.scheduler.stop("");
  b.scheduler.switch_to_next();
  __builtin_unreachable();
}

void Scheduler::stop(std::string error) {
  error_ = std::move(error);
  void* abandoned;
  switch_context(&abandoned, host_context_);
  __builtin_unreachable();
}

void Scheduler::make_ready(Thread& thread) {
  if (thread.is_ready || thread.is_done) return;
  thread.is_ready = true;
  thread.wait = Wait{};
  ready_.push_back(thread.index);
}

void Scheduler::wait(const Wait& wait) {
  block().current->wait = wait;
  switch_to_next();
}

void Scheduler::switch_to_next() {
  Block& b = block();
  Thread& from = *b.current;
  Thread& to = next_thread();
  if (&to == &from) return;
  b.statistics.switches++;
  b.current = &to;
  switch_context(&from.stack_pointer, to.stack_pointer);
}

Thread& Scheduler::next_thread() {
  Block& b = block();
  const bool is_random = b.options.seed != 0;
  for (;;) {
    if (is_random && !b.tma.is_empty() && b.random() % 64 == 0) b.tma.complete_one();
    if (!ready_.empty()) {
      if (is_random) std::swap(ready_.front(), ready_[b.random() % ready_.size()]);
      Thread& thread = b.threads[ready_.front()];
      ready_.pop_front();
      thread.is_ready = false;
      return thread;
    }
    if (b.tma.is_empty()) stop(deadlock_report());
    b.tma.complete_one();
  }
}

}  // namespace fused_attn::emulation
