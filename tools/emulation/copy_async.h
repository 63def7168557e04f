// cp.async: copies of 16 bytes from global to shared memory. Each thread waits for groups of its own copies.
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

namespace fused_attn::emulation {

struct Thread;

struct CopyAsync {
  uint32_t destination;
  const char* source;  // null: zeros
  bool is_done;
};

struct CopyAsyncGroups {
  std::vector<CopyAsync> open;
  std::deque<std::vector<CopyAsync>> committed;
};

void copy_async_16(uint32_t destination, const void* source, bool is_inside);
void copy_async_commit();
void copy_async_wait(int groups_left);
void check_no_copies_left(const Thread& thread);

}  // namespace fused_attn::emulation
