// Global memory: the buffers that a test has registered, and nothing else.
//
// A kernel gets handles instead of pointers, and calculates with them as usual. A handle is no address that the
// processor accepts, so an access past the primitives faults.
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

// The kinds of writes. Several blocks may write to the same place without any order in two cases: to count, and to add
// floats if the test allows that.
enum class Write { kPlain, kCount, kSum };

// Checks an access, and returns the host's pointer that belongs to the handle. `access` is the access of the current
// thread, or of its bulk store.
const char* global_read(const void* handle, size_t bytes, size_t alignment, const char* what, bool is_async = false);
char* global_write(void* handle, size_t bytes, size_t alignment, const char* what, const Epoch& access,
                   Write kind = Write::kPlain);

// Forgets all accesses. Call this before each launch.
void forget_accesses();

int atomic_fetch_add(int* counter, int value);
void atomic_add(float* sum, float value);

// Order between blocks. add_release publishes, with the counter, what the thread knows of all blocks. wait_until_equal
// acquires this knowledge.
void add_release(int* counter, int value);
void wait_until_equal(const int* counter, int value);

// Names a counter in reports.
std::string describe_counter(const int* counter);

}  // namespace fused_attn::emulation
