// The functions that each library of emulated kernels exports to Python (tests/cuda/emulator.py), besides its own.
#include "global_memory.h"
#include "launch.h"

using namespace fused_attn::emulation;

extern "C" {

// Sets the options of all launches from now on, sets statistics to zero, and forgets all buffers.
void emulation_start(const Options* options) {
  session_options() = *options;
  session_statistics() = Statistics{};
  clear_buffers();
}

// Makes memory accessible to kernels, and returns the handle that they get for it.
void* emulation_register_buffer(const void* memory, uint64_t bytes, int32_t is_writable) {
  return register_buffer(memory, bytes, is_writable);
}

Statistics emulation_statistics() { return session_statistics(); }
}
