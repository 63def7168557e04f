// The shared memory of a block: bounds, alignment, and who may access it when.
//
// Kernels see 32-bit addresses, and the handle that shared_memory() returns. Nobody can dereference the handle: it is
// no address that the processor accepts.
#pragma once
#include <cstdint>
#include <vector>

#include "race_detector.h"

namespace fused_attn::emulation {

constexpr uint32_t kSharedBase = 1024;                     // the address of the first byte; lower ones are the system's
constexpr uint32_t kMaxSharedBytes = 227 * 1024;           // that a block may have on sm_90
constexpr uintptr_t kSharedHandle = uintptr_t(0x5) << 60;  // what shared_memory() returns
constexpr uint32_t kPoison = 0xffedffed;                   // a NaN, as float and as two 16-bit numbers of either kind

class SharedMemory {
 public:
  void reset(uint32_t bytes, bool poison);

  // Checked pointer to `bytes` bytes.
  char* at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
  void fill_with_poison(uint32_t address, uint32_t bytes);

 private:
  uint32_t bytes_ = 0;
  std::vector<char> memory_;
};

// Checks an access by the current thread for races. Returns the pointer.
char* read_shared(uint32_t address, uint32_t bytes, const char* what);
char* write_shared(uint32_t address, uint32_t bytes, const char* what);

// Loads and stores of the current thread, which also count bank conflicts.
void load_shared(uint32_t address, void* value, uint32_t bytes);
void store_shared(uint32_t address, const void* value, uint32_t bytes);

// The swizzle of TMA and wgmma: 16-byte chunks are permuted within spans of 128, 64 or 32 bytes. The higher bits of the
// address decide how.
inline uint32_t swizzle(uint32_t address, int span) {
  const uint32_t chunks = span / 16;  // 8, 4, 2, or 0 for none
  return chunks ? address ^ (((address >> 7) % chunks) << 4) : address;
}

}  // namespace fused_attn::emulation
