// The emulation as Python sees it (tests/cuda/emulator.py): the functions that each library of kernels exports besides
// its own.
#include "global_memory.h"
#include "launch.h"

using namespace fused_attn::emulation;

extern "C" {

// Sets the options of all launches from now on. Statistics start at zero.
void emulation_start(const Options* options) {
  session_options() = *options;
  session_statistics() = Statistics{};
  clear_buffers();
}

// The handle that kernels get for `bytes` bytes of memory.
void* emulation_register_buffer(const void* memory, uint64_t bytes, int32_t is_writable) {
  return register_buffer(memory, bytes, is_writable);
}

Statistics emulation_statistics() { return session_statistics(); }
}
