// A small vector layer on the vector extensions that GCC and Clang share.
//
// The vector width is the native one of the translation unit. A wider vector, which the compiler would have to lower,
// is ten times slower. Everything is in an anonymous namespace, because this header is compiled once for each
// instruction set: an inline function that several of them share by name could put AVX-512 code into the baseline path.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define FA_INLINE static inline __attribute__((always_inline))
#define FA_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define FA_UNROLL _Pragma("clang loop unroll(full)")
#define FA_UNROLL_TWICE _Pragma("clang loop unroll_count(2)")
#else
// Every loop over an accumulator array must be unrolled. One access by a runtime index puts all accumulators into
// memory.
#define FA_UNROLL _Pragma("GCC unroll 64")
#define FA_UNROLL_TWICE _Pragma("GCC unroll 2")
#endif

namespace fused_attn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif
#endif

// The vector types of one lane type. An UnalignedVec may be loaded from any address, and may alias anything.
template <class T>
struct VecOf;

template <>
struct VecOf<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
  typedef float UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};

template <>
struct VecOf<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVec __attribute__((vector_size(kVectorBytes)));
  typedef double UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::Vec;
template <class T>
using IntVec = typename VecOf<T>::IntVec;
template <class T>
using LaneInt = typename VecOf<T>::Int;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// T cannot be deduced from Vec<T>, so it is named in every call.
template <class T>
FA_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::UnalignedVec*>(p);
}

template <class T>
FA_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::UnalignedVec*>(p) = v;
}

template <class T>
FA_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, and compiles to one broadcast
}

template <class T>
FA_INLINE IntVec<T> broadcast_int(LaneInt<T> x) {
  return x - IntVec<T>{};
}

// max and min return b if a or b is NaN. So a NaN in a is lost, and a NaN in b stays.
template <class T>
FA_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
FA_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

template <class T>
FA_INLINE Vec<T> select(IntVec<T> condition, Vec<T> yes, Vec<T> no) {
  return condition ? yes : no;
}

// `yes` where the condition is -1, and zero where it is 0.
template <class T>
FA_INLINE Vec<T> select_or_zero(IntVec<T> condition, Vec<T> yes) {
  return reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(yes) & condition);
}

template <class T>
FA_INLINE T sum_lanes(Vec<T> v) {
  T total = 0;
  FA_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// Lane i is -1 where bit (first + i) of the word is set.
template <class T>
FA_INLINE IntVec<T> lanes_of_bits(uint64_t word, int first) {
  IntVec<T> bit;
  FA_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = LaneInt<T>{1} << i;
  return (broadcast_int<T>(static_cast<LaneInt<T>>(word >> first)) & bit) != 0;
}

// Whether a lane is above zero; a NaN is not.
template <class T>
FA_INLINE bool any_positive(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_setzero_ps(), _CMP_GT_OQ) != 0;
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_setzero_pd(), _CMP_GT_OQ) != 0;
  }
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(v > 0)) != 0;
#else
  const IntVec<T> above = v > 0;
  LaneInt<T> any = 0;
  FA_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) any |= above[i];
  return any != 0;
#endif
}

// One round of the transpose network: exchanges the blocks of kStep lanes of rows i and i + kStep.
template <class T, int kStep, int... kLane>
FA_INLINE void exchange_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane - kStep : kLane)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane : kLane + kStep)...);
  a = low;
  b = high;
}

// Lane i of the result is the sum of the lanes of rows[i]. The rows are overwritten.
template <class T, int kStep = 1>
FA_INLINE Vec<T> sum_rows(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kStep == kLanes<T>) {
    return rows[0];
  } else {
    FA_UNROLL
    for (int i = 0; i < kLanes<T>; i += 2 * kStep) {
      exchange_blocks<T, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<T>>{});
      rows[i] += rows[i + kStep];
    }
    return sum_rows<T, kStep * 2>(rows);
  }
}

template <class T, int kStep = 1>
FA_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kStep < kLanes<T>) {
    FA_UNROLL
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & kStep) == 0) {
        exchange_blocks<T, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<T>>{});
      }
    }
    transpose<T, kStep * 2>(rows);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
