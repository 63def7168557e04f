// Global memory: the buffers that a test has registered, and nothing else.
//
// A kernel gets handles instead of pointers. They point to no address that the processor accepts, so that an access past the
// primitives faults, and are otherwise calculated with as usual.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "race_detector.h"

namespace fused_attn::emulation {

void* register_buffer(const void* memory, size_t bytes, bool is_writable);
void clear_buffers();

template <class T>
T* register_buffer(T* memory, size_t count) {
  return static_cast<T*>(register_buffer(memory, count * sizeof(T), true));
}

// What several blocks may do to the same place without any order: count, and add up floats if the test lets them.
enum class Write { kPlain, kCount, kSum };

// The host's pointer behind a handle, checked. `access` is the current thread's, or that of its bulk store.
const char* global_read(const void* handle, size_t bytes, size_t alignment, const char* what, bool is_async = false);
char* global_write(void* handle, size_t bytes, size_t alignment, const char* what, const Epoch& access,
                   Write kind = Write::kPlain);

// To be called before each launch: no block has accessed anything.
void forget_accesses();

int atomic_fetch_add(int* counter, int value);
void atomic_add(float* sum, float value);

// Order between blocks: what the thread knows of its block and of others is published with the counter, and acquired with it.
void add_release(int* counter, int value);
void wait_until_equal(const int* counter, int value);

// Which counter it is, for reports.
std::string describe_counter(const int* counter);

}  // namespace fused_attn::emulation
