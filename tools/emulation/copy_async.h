// cp.async: asynchronous copies of 16 bytes from global to shared memory. A thread commits its copies in groups, and
// waits for groups.
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

namespace fused_attn::emulation {

struct Thread;

struct CopyAsync {
  uint32_t destination;
  const char* source;  // null = the destination becomes zeros
  bool is_done;        // the bytes have been copied
};

// The copies of one thread that the thread has not waited for. `open` has the copies since the last commit.
struct CopyAsyncGroups {
  std::vector<CopyAsync> open;
  std::deque<std::vector<CopyAsync>> committed;
};

// The primitives copy_async_16, copy_async_commit and copy_async_wait, for the current thread.
void copy_async_16(uint32_t destination, const void* source, bool is_inside);
void copy_async_commit();
void copy_async_wait(int groups_left);
// Fails if a thread ends with copies that it has not waited for.
void check_no_copies_left(const Thread& thread);

}  // namespace fused_attn::emulation
