// Floats as sums of three bfloat16 numbers, so that AMX can multiply them.
//
// A float has 24 bits of precision, and a bfloat16 number has 8. So the upper half of a float, the upper half of what
// remains, and the rest are three parts whose sum is the float, exactly. A product of two floats is the sum of nine
// products of parts, of which AMX computes the six largest ones (multiply_tiles). The other three are about 2^-24 of
// the whole, as much as the rounding of one product of floats. The field calls this method BF16x3.
//
// AMX takes numbers below 2^-126 for zero, products included. So the last parts of tiny floats are lost.
#pragma once
#include "policy.h"

#if defined(__AMX_BF16__)

namespace fused_attn::cpu {
namespace {

// What a vector of floats consists of. The upper halves of remainder[i] are part i.
struct Parts {
  Vec<float> remainder[kFloatParts];

  // An infinite float has no parts: its second one is NaN.
  explicit Parts(Vec<float> x) {
    FA_UNROLL
    for (int i = 0; i < kFloatParts; ++i) {
      remainder[i] = x;
      x -= reinterpret_cast<Vec<float>>(reinterpret_cast<IntVec<float>>(x) & ~0xffff);
    }
  }
};

// The upper halves of two vectors, as pairs: lane i of the result has that of low[i] below that of high[i].
FA_INLINE Vec<float> pair_upper_halves(Vec<float> low, Vec<float> high) {
  const WordVec shifted = reinterpret_cast<WordVec>(low) >> 16;
  return reinterpret_cast<Vec<float>>(
      _mm512_mask_blend_epi16(0xaaaaaaaa, reinterpret_cast<__m512i>(shifted), reinterpret_cast<__m512i>(high)));
}

// The lanes of x that are NaN or infinite, as bits.
FA_INLINE unsigned infinite_lanes(Vec<float> x) {
  constexpr int kClasses = 0x01 | 0x08 | 0x10 | 0x80;  // quiet NaN, +inf, -inf, signaling NaN
  return _mm512_fpclass_ps_mask(reinterpret_cast<__m512>(x), kClasses);
}

// Whether parts can stand for `count` rows of `dim` floats: all are finite, and the largest one is not so tiny that its
// products with numbers of usual size lose parts.
FA_NOINLINE bool have_parts(const float* rows, int64_t stride_row, int count, int dim) {
  constexpr float kSmallest = 0x1p-80F;
  Vec<float> largest = {};
  unsigned infinite = 0;
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < dim; d += kLanes<float>) {
      const Vec<float> x = load_as<float>(rows + i * stride_row + d, dim - d);
      infinite |= infinite_lanes(x);
      largest = max<float>(x, max<float>(-x, largest));
    }
  }
  const float size = max_lanes<float>(largest);
  return infinite == 0 && (size == 0 || size >= kSmallest);
}

// Stores the parts of a pair of neighbours in the dimension that a product sums over. Those of part i go to
// pairs[i * next_part].
FA_INLINE void store_pairs_of_parts(Vec<float> low, Vec<float> high, int64_t next_part, float* pairs) {
  const Parts a(low), b(high);
  FA_UNROLL
  for (int i = 0; i < kFloatParts; ++i)
    store<float>(pairs + i * next_part, pair_upper_halves(a.remainder[i], b.remainder[i]));
}

// Stores the parts of x, one element after the other. Those of part i begin at target[i * next_part].
FA_INLINE void store_parts(Vec<float> x, int64_t next_part, BFloat16* target) {
  const Parts parts(x);
  FA_UNROLL
  for (int i = 0; i < kFloatParts; ++i) {
    const HalfVec part = __builtin_convertvector(reinterpret_cast<WordVec>(parts.remainder[i]) >> 16, HalfVec);
    memcpy(static_cast<void*>(target + i * next_part), &part, sizeof(part));
  }
}

// Multiplies pairs, which store_pairs_of_parts has stored, by the factor of their lane.
FA_INLINE void scale_pairs_of_parts(Vec<float> factor, int64_t next_part, float* pairs) {
  Vec<float> low = {}, high = {};
  FA_UNROLL
  for (int i = kFloatParts - 1; i >= 0; --i) {
    const IntVec<float> bits = reinterpret_cast<IntVec<float>>(load<float>(pairs + i * next_part));
    low += reinterpret_cast<Vec<float>>(bits << 16);
    high += reinterpret_cast<Vec<float>>(bits & ~0xffff);
  }
  store_pairs_of_parts(low * factor, high * factor, next_part, pairs);
}

// Loads elements [first, first + 32) of a row of `dim` floats, as pairs of each part. Elements i and i + 16 form a
// pair: rows that are multiplied have the same order, so any order will do, and this one takes the fewest instructions.
// Elements from `dim` on are zero, and are not read.
FA_INLINE void load_parts(const float* row, int first, int dim, Vec<float> (&pairs)[kFloatParts]) {
  constexpr int n = kLanes<float>;
  const int left = dim - first;
  const bool is_whole = left >= 2 * n;
  const Parts a(is_whole ? load<float>(row + first) : load_as<float>(row + first, left));
  const Parts b(is_whole ? load<float>(row + first + n)
                         : (left > n ? load_as<float>(row + first + n, left - n) : Vec<float>{}));
  FA_UNROLL
  for (int i = 0; i < kFloatParts; ++i) pairs[i] = pair_upper_halves(a.remainder[i], b.remainder[i]);
}

// Interleaves two rows of `dim` floats to pairs of each part: pairs[i * next_part + d] is part i of (low[d], high[d]).
// The pairs are padded to whole vectors with zeros. If `high` is null, zeros take its place.
FA_INLINE void interleave_parts(const float* low, const float* high, int dim, int64_t next_part, float* pairs) {
  for (int d = 0; d < dim; d += kLanes<float>) {
    const Vec<float> second = high != nullptr ? load_as<float>(high + d, dim - d) : Vec<float>{};
    store_pairs_of_parts(load_as<float>(low + d, dim - d), second, next_part, pairs + d);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
#endif
