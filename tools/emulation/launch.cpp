#include "launch.h"

#include <algorithm>
#include <csignal>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "context_switch.h"
#include "errors.h"
#include "global_memory.h"

namespace fused_attn::emulation {

Block* current_block = nullptr;

namespace {

constexpr size_t kSignalStackBytes = 64 * 1024;

std::vector<Block*> running;
std::vector<std::unique_ptr<Block>> slots;  // a Block for each block that can run at a time; later blocks reuse them
Options options_of_session;
Statistics statistics_of_session;

// Reports a fault in a kernel as a fault of the launch. A fault elsewhere aborts the process.
void on_segmentation_fault(int, siginfo_t* info, void*) {
  if (current_block == nullptr || current_block->current == nullptr) abort();
  fail(is_stack_overflow(info->si_addr) ? "the thread's stack overflowed"
                                        : "access to memory past the primitives, or a null pointer. Handles of global "
                                          "and shared memory point nowhere");
}

// While this object exists, invalid memory accesses of a kernel become faults of the launch. The signal handler runs on
// a stack of its own, because the kernel's stack may have overflowed.
class FaultGuard {
 public:
  FaultGuard() {
    static char stack[kSignalStackBytes];
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof(stack);
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_segmentation_fault;
    // The handler never returns, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultGuard() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

// Fails if a GPU would not accept the launch.
void check_shape(const LaunchShape& shape) {
  if (const char* missing = context_switch_missing()) fail("%s", missing);
  if (shape.threads < 1 || shape.threads > kMaxThreads || shape.threads % kWarpSize)
    fail("launch: %d threads, expected a multiple of 32 up to %d", shape.threads, kMaxThreads);
  if (shape.shared_bytes > kMaxSharedBytes)
    fail("launch: %u bytes of shared memory, more than the %u of a block", shape.shared_bytes, kMaxSharedBytes);
  if (shape.grid.x < 1 || shape.grid.y < 1 || shape.grid.z < 1 || shape.grid.y > 65535 || shape.grid.z > 65535)
    fail("launch: a grid of %d x %d x %d blocks", shape.grid.x, shape.grid.y, shape.grid.z);
}

// Resets *current_block to block number `index` of the grid, with all threads ready to run on the stacks of `slot`.
void start_block(const LaunchShape& shape, const Options& options, const std::function<void()>& kernel, int index,
                 int slot) {
  Block& b = *current_block;
  const int warps = shape.threads / kWarpSize;
  const int warpgroups = (shape.threads + kWarpgroupSize - 1) / kWarpgroupSize;
  b.options = options;
  b.statistics = Statistics{};
  b.statistics.blocks = 1;
  b.kernel = kernel;
  b.random.seed(uint32_t(options.seed * 2654435761u + index));
  b.grid_size = shape.grid;
  b.linear_index = index;
  b.index = {index % shape.grid.x, index / shape.grid.x % shape.grid.y, index / shape.grid.x / shape.grid.y};
  b.agents = {shape.threads, warps, warpgroups};
  b.threads.clear();
  for (int i = 0; i < shape.threads; i++) {
    b.threads.emplace_back(i);
    b.threads[i].clock.reset(b.agents.count());
    b.threads[i].clock.tick(i);
  }
  b.shared.reset(shape.shared_bytes, options.poison);
  if (options.race_detection) b.races.reset(shape.shared_bytes, b.agents);
  b.bank_conflicts.reset();
  b.warps.reset(warps, warpgroups);
  b.barriers.reset(b.agents.count());
  b.mbarriers.reset();
  b.tma.reset();
  b.wgmma.reset(warpgroups);
  b.registers.reset(shape.threads, options.registers_per_thread);
  b.scheduler.start(slot);
}

// Must be called when all threads of a block have ended. Completes the loads of the block. Fails if a product is still
// in flight, if an mbarrier still expects bytes, if nobody has waited for a load, or if threads wait at a barrier for
// others that have ended.
void check_block_is_complete() {
  Block& b = *current_block;
  while (!b.tma.is_empty()) b.tma.complete_one();
  b.wgmma.check_none_is_in_flight();
  b.mbarriers.check_no_bytes_are_missing();
  b.mbarriers.check_copies_were_waited_for();
  b.barriers.check_none_is_open();
  b.registers.check_warpgroups_agree();
  b.bank_conflicts.finish();
}

// Adds the statistics of a block to `sum`. All fields are uint64_t, so the function adds them as arrays. For
// most_registers, the result is the maximum instead of the sum.
void add(Statistics* sum, const Statistics& of_block) {
  constexpr size_t kFields = sizeof(Statistics) / sizeof(uint64_t);
  const uint64_t most_registers = std::max(sum->most_registers, of_block.most_registers);
  uint64_t fields[kFields], more[kFields];
  memcpy(fields, sum, sizeof(fields));
  memcpy(more, &of_block, sizeof(more));
  for (size_t i = 0; i < kFields; i++) fields[i] += more[i];
  memcpy(sum, fields, sizeof(fields));
  sum->most_registers = most_registers;
}

// Lets each running block run until it cannot go on, and removes blocks that have ended. Returns whether any thread
// ran.
bool run_a_turn(Statistics* statistics) {
  bool has_any_run = false;
  for (size_t i = 0; i < running.size();) {
    current_block = running[i];
    const Progress progress = current_block->scheduler.run();
    has_any_run |= progress != Progress::kNone;
    if (progress != Progress::kEnded) {
      i++;
      continue;
    }
    if (!current_block->scheduler.error().empty()) throw EmulationError(current_block->scheduler.error());
    check_block_is_complete();
    add(statistics, current_block->statistics);
    running.erase(running.begin() + i);
  }
  return has_any_run;
}

// Starts blocks in order, so that at most resident_blocks run at a time, and returns when all have ended. If no thread
// of any block can run, the function throws an error that describes the deadlock.
void run_blocks(const LaunchShape& shape, const Options& options, Statistics* statistics,
                const std::function<void()>& kernel) {
  const int64_t num_blocks = int64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  slots.resize(std::max<size_t>(slots.size(), options.resident_blocks));
  for (int64_t next = 0; next < num_blocks || !running.empty();) {
    for (int slot = 0; slot < options.resident_blocks && next < num_blocks; slot++) {
      if (!slots[slot]) slots[slot] = std::make_unique<Block>();
      if (std::count(running.begin(), running.end(), slots[slot].get())) continue;
      current_block = slots[slot].get();
      start_block(shape, options, kernel, int(next++), slot);
      running.push_back(current_block);
    }
    if (run_a_turn(statistics)) continue;
    std::string report;
    for (Block* stuck : running) {
      current_block = stuck;
      report += (report.empty() ? "" : "\n") + deadlock_report(num_blocks - next);
    }
    throw EmulationError(report);
  }
}

}  // namespace

const std::vector<Block*>& running_blocks() { return running; }
Options& session_options() { return options_of_session; }
Statistics& session_statistics() { return statistics_of_session; }

std::string check_shared_limit(const void* kernel, int shared_bytes, int most_shared_bytes) {
  static std::map<const void*, int> limits;  // of all kernels that have been launched
  if (shared_bytes > most_shared_bytes)
    return "launch: " + std::to_string(shared_bytes) + " bytes of shared memory, with a limit of " +
           std::to_string(most_shared_bytes);
  const int first = limits.emplace(kernel, most_shared_bytes).first->second;
  if (first == most_shared_bytes) return "";
  return "launch: a limit of " + std::to_string(most_shared_bytes) +
         " bytes of shared memory, where an earlier launch of the same kernel had set " + std::to_string(first);
}

std::string launch(const LaunchShape& shape, const Options& options, Statistics* statistics,
                   const std::function<void()>& kernel) {
  if (!running.empty()) return "launch: from within a kernel";
  statistics->launches++;
  std::string error;
  try {
    check_shape(shape);
    forget_accesses();
    const FaultGuard guard;
    run_blocks(shape, options, statistics, kernel);
  } catch (const EmulationError& problem) {
    error = problem.what();
  }
  for (Block* block : running) block->current = nullptr;
  running.clear();
  current_block = nullptr;
  return error;
}

}  // namespace fused_attn::emulation
