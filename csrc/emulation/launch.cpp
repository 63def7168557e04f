#include "launch.h"

#include <csignal>

#include "context_switch.h"
#include "errors.h"
#include "global_memory.h"

namespace fused_attn::emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kSignalStackBytes = 64 * 1024;

Block the_block;
Options options_of_session;
Statistics statistics_of_session;

void on_segmentation_fault(int, siginfo_t* info, void*) {
  if (the_block.current == nullptr) abort();
  fail(is_stack_overflow(info->si_addr) ? "the thread's stack overflowed"
                                        : "access to memory past the primitives, or a null pointer. Handles of global "
                                          "and shared memory point nowhere");
}

// Turns invalid accesses of a kernel into errors of the launch.
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

void check_shape(const LaunchShape& shape) {
  if (const char* missing = context_switch_missing()) fail("%s", missing);
  if (shape.threads < 1 || shape.threads > kMaxThreads || shape.threads % kWarpSize)
    fail("launch: %d threads, expected a multiple of 32 up to %d", shape.threads, kMaxThreads);
  if (shape.shared_bytes > kMaxSharedBytes)
    fail("launch: %u bytes of shared memory, more than the %u of a block", shape.shared_bytes, kMaxSharedBytes);
  if (shape.grid.x < 1 || shape.grid.y < 1 || shape.grid.z < 1 || shape.grid.y > 65535 || shape.grid.z > 65535)
    fail("launch: a grid of %d x %d x %d blocks", shape.grid.x, shape.grid.y, shape.grid.z);
}

void start_block(const LaunchShape& shape) {
  Block& b = the_block;
  const int warps = shape.threads / kWarpSize;
  const int warpgroups = (shape.threads + kWarpgroupSize - 1) / kWarpgroupSize;
  b.statistics.blocks++;
  b.agents = {shape.threads, warps, warpgroups};
  b.threads.clear();
  for (int i = 0; i < shape.threads; i++) {
    b.threads.emplace_back(i);
    b.threads[i].clock.reset(b.agents.count());
    b.threads[i].clock.tick(i);
  }
  b.shared.reset(shape.shared_bytes, b.options.poison);
  if (b.options.race_detection) b.races.reset(shape.shared_bytes, b.agents);
  b.bank_conflicts.reset();
  b.warps.reset(warps, warpgroups);
  b.barriers.reset(b.agents.count());
  b.mbarriers.reset();
  b.tma.reset();
  b.wgmma.reset(warpgroups);
  b.registers.reset(shape.threads, b.options.registers_per_thread);
}

void check_block_is_complete() {
  Block& b = the_block;
  while (!b.tma.is_empty()) b.tma.complete_one();
  b.wgmma.check_none_is_in_flight();
  b.mbarriers.check_no_bytes_are_missing();
  b.barriers.check_none_is_open();
  b.registers.check_warpgroups_agree();
  b.bank_conflicts.finish();
}

}  // namespace

Block& block() { return the_block; }
Options& session_options() { return options_of_session; }
Statistics& session_statistics() { return statistics_of_session; }

std::string launch(const LaunchShape& shape, const Options& options, Statistics* statistics,
                   const std::function<void()>& kernel) {
  Block& b = the_block;
  if (b.current) return "launch: from within a kernel";
  b.options = options;
  b.statistics = *statistics;
  b.random.seed(uint32_t(options.seed * 2654435761u + 1));
  b.kernel = kernel;
  b.grid_size = shape.grid;
  std::string error;
  try {
    check_shape(shape);
    forget_accesses();
    const FaultGuard guard;
    const int num_blocks = shape.grid.x * shape.grid.y * shape.grid.z;
    for (b.linear_index = 0; b.linear_index < num_blocks && error.empty(); b.linear_index++) {
      b.index = {b.linear_index % shape.grid.x, b.linear_index / shape.grid.x % shape.grid.y,
                 b.linear_index / shape.grid.x / shape.grid.y};
      start_block(shape);
      error = b.scheduler.run();
      if (error.empty()) check_block_is_complete();
    }
  } catch (const EmulationError& problem) {
    error = problem.what();
  }
  b.kernel = nullptr;
  *statistics = b.statistics;
  return error;
}

}  // namespace fused_attn::emulation
