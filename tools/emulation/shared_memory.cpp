#include "shared_memory.h"

#include <cstring>

#include "block.h"
#include "errors.h"

namespace fused_attn::emulation {

void SharedMemory::reset(uint32_t bytes, bool poison) {
  bytes_ = bytes;
  memory_.assign((bytes + 15) / 16 * 16, 0);
  if (poison) fill_with_poison(kSharedBase, uint32_t(memory_.size()));
}

char* SharedMemory::at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address < kSharedBase || address + bytes > kSharedBase + bytes_)
    fail("%s: bytes %lld to %lld of shared memory, which has %u", what, (long long)address - kSharedBase,
         (long long)address + bytes - 1 - kSharedBase, bytes_);
  if (address % alignment) fail("%s: shared address %u is not a multiple of %u", what, address, alignment);
  return memory_.data() + (address - kSharedBase);
}

void SharedMemory::fill_with_poison(uint32_t address, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) memcpy(memory_.data() + (address - kSharedBase) + i, &kPoison, 4);
}

char* read_shared(uint32_t address, uint32_t bytes, const char* what) {
  Block& b = block();
  char* p = b.shared.at(address, bytes, bytes, what);
  if (b.options.race_detection)
    b.races.read(address - kSharedBase, bytes, b.current->epoch(), b.current->known(), what);
  return p;
}

char* write_shared(uint32_t address, uint32_t bytes, const char* what) {
  Block& b = block();
  char* p = b.shared.at(address, bytes, bytes, what);
  if (b.options.race_detection)
    b.races.write(address - kSharedBase, bytes, b.current->epoch(), b.current->known(), what);
  return p;
}

// load_shared and store_shared are not inlined, so that their return address tells which place of the kernel calls
// them.
__attribute__((noinline)) void load_shared(uint32_t address, void* value, uint32_t bytes) {
  memcpy(value, read_shared(address, bytes, "load_shared"), bytes);
  Block& b = block();
  if (b.options.count_bank_conflicts) b.bank_conflicts.add_lane(__builtin_return_address(0), address, bytes);
}

__attribute__((noinline)) void store_shared(uint32_t address, const void* value, uint32_t bytes) {
  memcpy(write_shared(address, bytes, "store_shared"), value, bytes);
  Block& b = block();
  if (b.options.count_bank_conflicts) b.bank_conflicts.add_lane(__builtin_return_address(0), address, bytes);
}

}  // namespace fused_attn::emulation
