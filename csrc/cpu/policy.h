// How elements of a dtype are placed in the lanes of vectors: one element in each lane, or pairs of bfloat16.
#pragma once
#include "elements.h"

namespace fused_attn::cpu {
namespace {

// A policy: the type of elements in memory, the type of a lane, and the number of elements in a lane (kPerLane). With
// kPerLane = 1, elements are converted to the type of lanes. With kPerLane = 2, a lane of 32 bits holds two bfloat16
// elements as they are. The two are neighbours in the dimension that a product sums over, because one instruction
// multiplies both pairs of elements and adds both products.
template <class StorageType, class LaneType, int kElementsPerLane>
struct ElementPolicy {
  using Storage = StorageType;
  using Lane = LaneType;
  static constexpr int kPerLane = kElementsPerLane;
  static constexpr bool kCoarseExp = sizeof(StorageType) == 2;  // 16-bit results need no exact exponential
  static constexpr bool kConverts = !kSame<StorageType, LaneType> && kElementsPerLane == 1;  // memory holds no lanes
  static constexpr bool kUsesAmx = false;  // whether tiles of AMX multiply blocks of queries and keys
  // The factors of products are pairs of so many bfloat16 parts each. 0: they are lanes.
  static constexpr int kParts = kElementsPerLane == 2 ? 1 : 0;
  static constexpr int kFactorsPerLane = kParts > 0 ? 2 : 1;

  // The number of lanes that n elements occupy.
  static constexpr int lanes_for(int n) { return (n + kPerLane - 1) / kPerLane; }
};

// Pairs of bfloat16 that AMX multiplies.
struct AmxPolicy : ElementPolicy<BFloat16, float, 2> {
  static constexpr bool kUsesAmx = true;
};

// bfloat16 for decode_forward.h. Lanes hold one element, which vectors multiply, and AMX multiplies groups with many
// rows.
struct AmxDecodePolicy : ElementPolicy<BFloat16, float, 1> {
  static constexpr bool kUsesAmx = true;
};

// Floats that AMX multiplies, as sums of bfloat16 parts (float_parts.h). A part of a matrix lies behind the one before
// it.
constexpr int kFloatParts = 3;
struct AmxFloatPolicy : ElementPolicy<float, float, 1> {
  static constexpr bool kUsesAmx = true;
  static constexpr int kParts = kFloatParts;
  static constexpr int kFactorsPerLane = 2;
};

// The policy for the same elements and lanes in which a lane holds one element, and vectors multiply.
template <class Policy>
using LanePolicy = ElementPolicy<typename Policy::Storage, typename Policy::Lane, 1>;

// Returns acc + a * b in each lane. If a lane holds a pair, the products of both elements are added.
template <class Policy>
FA_INLINE Vec<typename Policy::Lane> multiply_add(Vec<typename Policy::Lane> a, Vec<typename Policy::Lane> b,
                                                  Vec<typename Policy::Lane> acc) {
#if defined(__AVX512BF16__)
  if constexpr (Policy::kPerLane == 2) {
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
#endif
  return a * b + acc;
}

// A vector in which every lane is lane number `lane` of a row. The address needs no alignment. A pair is broadcast as
// an integer, because an instruction for floats might change its bits.
template <class Policy>
FA_INLINE Vec<typename Policy::Lane> broadcast_lane(const char* row, int64_t lane) {
  using Lane = typename Policy::Lane;
  if constexpr (Policy::kPerLane == 2) {
    int32_t bits;
    memcpy(&bits, row + lane * 4, 4);
    return reinterpret_cast<Vec<Lane>>(broadcast_int<Lane>(bits));
  } else {
    Lane x;
    memcpy(&x, row + lane * static_cast<int64_t>(sizeof(Lane)), sizeof(Lane));
    return broadcast<Lane>(x);
  }
}

#if defined(__AVX512BF16__)
// Rounds two vectors of float to bfloat16. In each lane of the result, the low half is from `low`, the high half from
// `high`.
FA_INLINE Vec<float> round_to_pairs(Vec<float> low, Vec<float> high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)));
}

// Interleaves two rows of n bfloat16 elements into one row of n pairs: pairs[d] = (low[d], high[d]). If `high` is null,
// zeros take its place. One shuffle instruction with two inputs makes 16 pairs. A version that widened, shifted and
// merged elements took 17 % of the time of forward.
FA_INLINE void interleave_rows(const uint16_t* low, const uint16_t* high, int n, float* pairs) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int d = 0; d < n; d += 32) {
    const __mmask32 valid = n - d >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - d)) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(valid, low + d);
    const __m512i b = high != nullptr ? _mm512_maskz_loadu_epi16(valid, high + d) : _mm512_setzero_si512();
    const __mmask16 valid_first = static_cast<__mmask16>(valid);
    const __mmask16 valid_second = static_cast<__mmask16>(valid >> 16);
    _mm512_mask_storeu_epi32(pairs + d, valid_first, _mm512_permutex2var_epi16(a, first, b));
    _mm512_mask_storeu_epi32(pairs + d + 16, valid_second, _mm512_permutex2var_epi16(a, second, b));
  }
}

// sum + both elements of the pair, in each lane.
FA_INLINE Vec<float> add_pairs(Vec<float> sum, Vec<float> pairs) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);  // pairs (1, 1)
  return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(pairs),
                                                       reinterpret_cast<__m512bh>(ones)));
}

// Multiplies both elements of each pair by the factor of its lane, and rounds the products to bfloat16.
FA_INLINE Vec<float> scale_pairs(Vec<float> pairs, Vec<float> factor) {
  const IntVec<float> bits = reinterpret_cast<IntVec<float>>(pairs);
  const Vec<float> low = reinterpret_cast<Vec<float>>(bits << 16);
  const Vec<float> high = reinterpret_cast<Vec<float>>(bits & ~0xffff);
  return round_to_pairs(low * factor, high * factor);
}
#endif

// Loads lanes [first, first + kLanes) of a row of `dim` elements. Elements from `dim` on are zero, and are not read.
template <class Policy>
FA_INLINE Vec<typename Policy::Lane> load_lanes(const typename Policy::Storage* row, int first, int dim) {
  using Lane = typename Policy::Lane;
  if constexpr (Policy::kPerLane == 2) {
    Vec<Lane> v = {};
    const int elements = dim - 2 * first;
    if (elements >= 2 * kLanes<Lane>) {
      memcpy(&v, row + 2 * first, sizeof(v));
    } else {
#if defined(__AVX512BF16__)
      v = reinterpret_cast<Vec<Lane>>(_mm512_maskz_loadu_epi16((__mmask32{1} << elements) - 1, row + 2 * first));
#endif
    }
    return v;
  } else {
    return load_as<Lane>(row + first, dim - first);
  }
}

// Stores lanes [first, first + kLanes) of a row of `dim` elements. Memory from element `dim` on is not written.
template <class Policy>
FA_INLINE void store_lanes(typename Policy::Storage* row, int first, int dim, Vec<typename Policy::Lane> v) {
  using Lane = typename Policy::Lane;
  if constexpr (Policy::kPerLane == 2) {
    const int elements = dim - 2 * first;
    if (elements >= 2 * kLanes<Lane>) {
      memcpy(row + 2 * first, &v, sizeof(v));
    } else {
#if defined(__AVX512BF16__)
      _mm512_mask_storeu_epi16(row + 2 * first, (__mmask32{1} << elements) - 1, reinterpret_cast<__m512i>(v));
#endif
    }
  } else {
    store_as<Lane>(row + first, v, dim - first);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
