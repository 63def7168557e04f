// Global memory: the buffers that a test has registered, and nothing else.
//
// A kernel gets handles instead of pointers. They point to no address that the processor accepts, so that an access past the
// primitives faults, and are otherwise calculated with as usual.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fused_attn::emulation {

void* register_buffer(const void* memory, size_t bytes, bool is_writable);
void clear_buffers();

template <class T>
T* register_buffer(T* memory, size_t count) {
  return static_cast<T*>(register_buffer(memory, count * sizeof(T), true));
}

// The host's pointer behind a handle, checked. A write is `atomic` if other blocks may add to the same place.
enum class Write { kPlain, kAtomic };
const char* global_read(const void* handle, size_t bytes, size_t alignment, const char* what);
char* global_write(void* handle, size_t bytes, size_t alignment, const char* what, Write kind = Write::kPlain);

// To be called before each launch: no block has accessed anything.
void forget_accesses();

int atomic_fetch_add(int* counter, int value);
void atomic_add(float* sum, float value);

// Order between blocks: what the block knows of others is published with the counter, and acquired with it.
void add_release(int* counter, int value);
void wait_until_equal(const int* counter, int value);

}  // namespace fused_attn::emulation
