// The shared memory of a block, with checks of bounds, alignment and races.
//
// Kernels use 32-bit addresses, and the handle that shared_memory() returns. The handle is an address that the
// processor rejects, so no kernel can dereference it.
#pragma once
#include <cstdint>
#include <vector>

#include "race_detector.h"

namespace fused_attn::emulation {

constexpr uint32_t kSharedBase = 1024;                     // address of the first byte; CUDA reserves lower addresses
constexpr uint32_t kMaxSharedBytes = 227 * 1024;           // the most that a block may have on sm_90
constexpr uintptr_t kSharedHandle = uintptr_t(0x5) << 60;  // what shared_memory() returns
constexpr uint32_t kPoison = 0xffedffed;                   // a NaN if read as float, two float16 or two bfloat16

class SharedMemory {
 public:
  void reset(uint32_t bytes, bool poison);

  // The host's pointer to `bytes` bytes. Fails if they are out of bounds or misaligned.
  char* at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
  // Fills the bytes with NaN, so that a thread that reads them before the copy has arrived gets NaN.
  void fill_with_poison(uint32_t address, uint32_t bytes);

 private:
  uint32_t bytes_ = 0;
  std::vector<char> memory_;
};

// Checks an access of the current thread for bounds and races, and returns the host's pointer.
char* read_shared(uint32_t address, uint32_t bytes, const char* what);
char* write_shared(uint32_t address, uint32_t bytes, const char* what);

// The primitives load_shared and store_shared, for the current thread. They also count bank conflicts.
void load_shared(uint32_t address, void* value, uint32_t bytes);
void store_shared(uint32_t address, const void* value, uint32_t bytes);

// Returns where TMA and wgmma put the byte at an address of a tile without a swizzle. The swizzle permutes 16-byte
// chunks within spans of 128, 64 or 32 bytes. `span` is the size of a span, and 0 means no swizzle. Bits 7 to 9 of the
// address choose the permutation.
inline uint32_t swizzle(uint32_t address, int span) {
  const uint32_t chunks = span / 16;  // 8, 4, 2, or 0 for none
  return chunks ? address ^ (((address >> 7) % chunks) << 4) : address;
}

}  // namespace fused_attn::emulation
