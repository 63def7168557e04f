// How the elements of one dtype share lanes: one element in each, or pairs of bfloat16.
#pragma once
#include "elements.h"

namespace fused_attn::cpu {
namespace {

// How the elements of one dtype reach the multiply-add units. With kPerLane = 1, a lane holds one number. With kPerLane
// = 2, a 32-bit lane holds two bfloat16 numbers, which are neighbours in the dimension that is summed over: one
// instruction multiplies and adds both.
template <class StorageType, class LaneType, int kElementsPerLane>
struct ElementPolicy {
  using Storage = StorageType;
  using Lane = LaneType;
  static constexpr int kPerLane = kElementsPerLane;
  static constexpr bool kCoarseExp = sizeof(StorageType) == 2;
  static constexpr bool kConverts = !kSame<StorageType, LaneType> && kElementsPerLane == 1;

  // How many lanes hold n elements.
  static constexpr int lanes_for(int n) { return (n + kPerLane - 1) / kPerLane; }
};

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

// Broadcasts one lane of a row, which may lie at any address. Pairs go through integers, because their bits are no
// float.
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
// Rounds two vectors to bfloat16 and pairs them. `low` goes into the low half of each lane.
FA_INLINE Vec<float> round_to_pairs(Vec<float> low, Vec<float> high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)));
}

// Interleaves two rows of `n` bfloat16 to one row of n pairs. The first row goes into the low halves; a null row counts
// as zeros. One shuffle reads both inputs. Widening, shifting and merging instead took 17 % of the forward pass.
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

// sum + low + high of each pair.
FA_INLINE Vec<float> add_pairs(Vec<float> sum, Vec<float> pairs) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(pairs),
                                                       reinterpret_cast<__m512bh>(ones)));
}

// The pairs with both numbers multiplied by the lane's factor.
FA_INLINE Vec<float> scale_pairs(Vec<float> pairs, Vec<float> factor) {
  const IntVec<float> bits = reinterpret_cast<IntVec<float>>(pairs);
  const Vec<float> low = reinterpret_cast<Vec<float>>(bits << 16);
  const Vec<float> high = reinterpret_cast<Vec<float>>(bits & ~0xffff);
  return round_to_pairs(low * factor, high * factor);
}
#endif

// Loads kLanes lanes of a row from lane `first` on. They are zero beyond `dim` elements.
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

// Stores the lanes that load_lanes loads. Elements from `dim` on stay as they are.
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
