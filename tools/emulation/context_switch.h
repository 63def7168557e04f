// Switches between the stacks on which emulated threads run. Each thread of a kernel is a coroutine of one thread of
// the host.
#pragma once
#include <cstddef>

namespace fused_attn::emulation {

// Returns why this machine cannot emulate kernels, or null if it can.
const char* context_switch_missing();

// Saves the registers and the stack pointer in `from`, and continues where an earlier call has saved `to`.
void switch_context(void** from, void* to);

// Prepares a fresh stack, so that the first switch to the result calls `entry`, which must not return.
void* prepare_stack(char* top, void (*entry)());

// Returns the top of the stack of thread `thread` in block slot `slot` (a slot is reused by later blocks). A stack has
// kStackBytes bytes. Below it lies a guard that cannot be accessed, so that an overflow faults.
constexpr size_t kStackBytes = 256 * 1024;
char* stack_top(int slot, int thread);
// Whether a faulting address lies in the guard of a stack.
bool is_stack_overflow(const void* address);

}  // namespace fused_attn::emulation
