// 16-bit floating-point numbers on the host, rounded to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fused_attn::emulation {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;  // the canonical NaN, as the hardware returns
  const uint32_t bits = bits_of(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_f16(float x) {
  const _Float16 half = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline uint16_t to_16_bits(float x, bool is_bf16) { return is_bf16 ? to_bf16(x) : to_f16(x); }

inline float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline float from_f16(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}

inline float from_16_bits(uint16_t bits, bool is_bf16) { return is_bf16 ? from_bf16(bits) : from_f16(bits); }

}  // namespace fused_attn::emulation
