// The emulation as seen from Python (tests/cuda/emulator.py): what a library of kernels exports besides its own functions.
#include "global_memory.h"
#include "launch.h"

using namespace fused_attn::emulation;

extern "C" {

// Holds for all launches from now on; statistics start at zero.
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
