#include "context_switch.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "errors.h"

#if defined(__x86_64__)
// Saves the registers that a function must preserve under the System V ABI, and no others: the caller expects the other
// ones to change.
asm(R"(
.text
.globl fused_attn_switch_context
.hidden fused_attn_switch_context
.type fused_attn_switch_context, @function
fused_attn_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_attn_switch_context, .-fused_attn_switch_context
.section .note.GNU-stack, "", @progbits
.text
)");
extern "C" void fused_attn_switch_context(void** from, void* to);
#endif

namespace fused_attn::emulation {
namespace {

// Larger than any frame, so that no function writes below the guard without touching it.
constexpr size_t kGuardBytes = 64 * 1024;
constexpr int kSavedRegisters = 6;

// The stacks begin at all offsets modulo this number of bytes. If all began at the same one, the tops of all stacks,
// which the threads use most, would fall into few sets of the CPU's caches.
constexpr size_t kSpreadBytes = 64 * 1024;
constexpr size_t kSpreadStep = 13 * 64;  // whole cache lines; an odd number of them reaches every set

std::vector<std::vector<char*>> stacks;  // [slot][thread]: the lowest address, where the guard begins

}  // namespace

#if defined(__x86_64__)
const char* context_switch_missing() { return nullptr; }
void switch_context(void** from, void* to) { fused_attn_switch_context(from, to); }
#else
const char* context_switch_missing() {
  return "the CUDA emulation switches between threads with x86-64 instructions; this is another architecture";
}
void switch_context(void**, void*) { abort(); }
#endif

void* prepare_stack(char* top, void (*entry)()) {
  void** pointer = reinterpret_cast<void**>(uintptr_t(top) & ~uintptr_t(63));
  *--pointer = nullptr;  // the address to which `entry` would return; this word also aligns the frame of `entry`
  *--pointer = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--pointer = nullptr;
  return pointer;
}

char* stack_top(int slot, int thread) {
  if (slot >= int(stacks.size())) stacks.resize(slot + 1);
  while (thread >= int(stacks[slot].size())) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes + kSpreadBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
      fail("launch: no memory for the stacks of so many threads; fewer resident_blocks need less");
    stacks[slot].push_back(static_cast<char*>(memory));
  }
  return stacks[slot][thread] + kGuardBytes + kStackBytes + thread * kSpreadStep % kSpreadBytes;
}

bool is_stack_overflow(const void* address) {
  for (const auto& slot : stacks)
    for (const char* stack : slot)
      if (address >= stack && address < stack + kGuardBytes) return true;
  return false;
}

}  // namespace fused_attn::emulation
