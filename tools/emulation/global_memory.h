// Global memory: the buffers that a test has registered, and nothing else.
//
// A kernel gets handles instead of pointers, and computes with them as with pointers. A handle is an address that the
// processor rejects. So an access that does not go through a primitive faults, and the test reports it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "race_detector.h"

namespace fused_attn::emulation {

// Makes host memory accessible to kernels, and returns its handle. clear_buffers forgets all buffers.
void* register_buffer(const void* memory, size_t bytes, bool is_writable);
void clear_buffers();

template <class T>
T* register_buffer(T* memory, size_t count) {
  return static_cast<T*>(register_buffer(memory, count * sizeof(T), /*is_writable=*/true));
}

// The kinds of writes. Blocks may write to the same place without any order in two cases: atomic counters (kCount), and
// sums of floats if the test allows any order (kSum).
enum class Write { kPlain, kCount, kSum };

// Check an access, and return the host's pointer for the handle. The access is one of the current thread, or, if
// is_async or access.is_async is set, one of a bulk copy that this thread has issued. `what` names the primitive in
// reports.
const char* global_read(const void* handle, size_t bytes, size_t alignment, const char* what, bool is_async = false);
char* global_write(void* handle, size_t bytes, size_t alignment, const char* what, const Epoch& access,
                   Write kind = Write::kPlain);

// Fails if the address is no multiple of `alignment`. The functions above have checked that, too.
void check_global_alignment(const void* handle, size_t alignment, const char* what);

// Forgets which accesses have been made. launch calls this, because launches on one stream are ordered.
void forget_accesses();

// The primitives of the same names.
int atomic_fetch_add(int* counter, int value);
void atomic_add(float* sum, float value);

// Order between blocks. add_release adds to the counter, and stores with the counter what the thread's vector clock
// knows of all blocks. A thread for which wait_until_equal has returned knows the same from then on.
void add_release(int* counter, int value);
void wait_until_equal(const int* counter, int value);

// Describes a counter for a report.
std::string describe_counter(const int* counter);

}  // namespace fused_attn::emulation
