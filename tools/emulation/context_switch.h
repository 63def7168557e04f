// Switching between the stacks on which emulated threads run.
#pragma once
#include <cstddef>

namespace fused_attn::emulation {

// Why this machine cannot emulate kernels, or null.
const char* context_switch_missing();

// Saves the current stack pointer in `from`, and goes on where `to` was saved.
void switch_context(void** from, void* to);

// A stack on which the first switch calls `entry`, which must not return.
void* prepare_stack(char* top, void (*entry)());

// Returns the top of the stack of a thread of the block that runs in this slot. A stack has kStackBytes bytes, and
// below it lies a guard that cannot be accessed. Stacks are reused from launch to launch.
constexpr size_t kStackBytes = 256 * 1024;
char* stack_top(int slot, int thread);
bool is_stack_overflow(const void* address);

}  // namespace fused_attn::emulation
