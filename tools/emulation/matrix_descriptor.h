// A matrix descriptor: 64 bits that tell wgmma where a 16-bit matrix lies in shared memory. PTX ISA, "Matrix
// descriptor":
//
//   bits 0-13: start address / 16     bits 16-29: leading byte offset / 16     bits 32-45: stride byte offset / 16
//   bits 49-51: base offset           bits 62-63: swizzle (0 none, 1: 128, 2: 64, 3: 32 bytes)
#pragma once
#include <cstdint>

#include "errors.h"
#include "shared_memory.h"

namespace fused_attn::emulation {

struct MatrixDescriptor {
  uint32_t start, leading, stride, base_offset;
  int swizzle_bytes;

  explicit MatrixDescriptor(uint64_t bits)
      : start(field(bits, 0) << 4),
        leading(field(bits, 16) << 4),
        stride(field(bits, 32) << 4),
        base_offset(uint32_t(bits >> 49) & 7) {
    constexpr int kSpans[4] = {0, 128, 64, 32};
    swizzle_bytes = kSpans[bits >> 62];
  }

  // Fails if the hardware, or this emulation, does not accept the descriptor.
  void check(const char* what) const {
    if (base_offset) fail("%s: a descriptor with a base offset is not emulated", what);
    const int repeat = 8 * swizzle_bytes;  // eight rows
    if (swizzle_bytes && start % repeat >= uint32_t(swizzle_bytes))
      fail("%s: a descriptor starts at shared address %u, within the %d bytes after which its swizzle repeats", what,
           start, repeat);
    if (swizzle_bytes && stride % repeat)
      fail("%s: a descriptor's stride of %u bytes is no multiple of the %d that its swizzle takes", what, stride,
           repeat);
  }

  // The shared address of element (mn, k) of an operand. `k` is the dimension that the product sums over. `mn` counts
  // the rows of a, or the columns of b. If is_mn_major, elements along mn are contiguous; otherwise elements along k
  // are.
  uint32_t address(uint32_t mn, uint32_t k, bool is_mn_major) const {
    const uint32_t span = swizzle_bytes;
    if (!is_mn_major && span == 0) return start + mn % 8 * 16 + mn / 8 * stride + k % 8 * 2 + k / 8 * leading;
    if (!is_mn_major) return swizzle(start + mn % 8 * span + mn / 8 * stride + k * 2, span);
    if (span == 0) return start + mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    const uint32_t width = span / 2;
    return swizzle(start + mn % width * 2 + mn / width * leading + k % 8 * span + k / 8 * stride, span);
  }

  // Calls f(address, mn, k) for each 16 contiguous bytes of the operand. They hold 8 elements, of which (mn, k) is the
  // first.
  template <class F>
  void for_each_chunk(int mn_size, bool is_mn_major, const F& f) const {
    for (int mn = 0; mn < mn_size; mn += is_mn_major ? 8 : 1)
      for (int k = 0; k < 16; k += is_mn_major ? 1 : 8) f(address(mn, k, is_mn_major), mn, k);
  }

 private:
  // 14 bits of the descriptor.
  static uint32_t field(uint64_t bits, int at) { return uint32_t(bits >> at) & 0x3fff; }
};

}  // namespace fused_attn::emulation
