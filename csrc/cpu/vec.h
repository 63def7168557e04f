// Types and functions for SIMD vectors, based on the vector extensions that GCC and Clang share.
//
// A vector is as wide as a register of the instruction set that the file is compiled for. The compiler splits a wider
// vector into parts, which is ten times slower. Everything is in an anonymous namespace, because this header is
// compiled once for each instruction set. If inline functions had external linkage, the linker would keep one copy for
// all instruction sets, which could be AVX-512 code that the processor cannot run.
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
// Every loop over an array of accumulators must be unrolled. If one element is accessed by an index that is not known
// at compile time, the compiler keeps the whole array in memory instead of registers.
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

// The vector types for lanes of type T: Vec, and IntVec with integers of the same size, which comparisons return. An
// UnalignedVec may be loaded from any address, whatever the type of the memory there.
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

// The number of lanes of a vector.
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Loads a vector from an address without alignment. In all functions of this file, a call must name T, as in
// load<float>(p), because the compiler cannot deduce T from Vec<T>.
template <class T>
FA_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::UnalignedVec*>(p);
}

// Stores a vector at an address without alignment.
template <class T>
FA_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::UnalignedVec*>(p) = v;
}

// The vector in which every lane is x.
template <class T>
FA_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, NaN and -0 included, and compiles to one broadcast instruction
}

// The vector of integers in which every lane is x.
template <class T>
FA_INLINE IntVec<T> broadcast_int(LaneInt<T> x) {
  return x - IntVec<T>{};
}

// max and min of each lane. If a or b is NaN, the result is b. So a NaN in `a` is ignored, and a NaN in `b` is
// returned.
template <class T>
FA_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
FA_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// `yes` in lanes where the condition is -1, and `no` where it is 0.
template <class T>
FA_INLINE Vec<T> select(IntVec<T> condition, Vec<T> yes, Vec<T> no) {
  return condition ? yes : no;
}

// `yes` in lanes where the condition is -1, and zero where it is 0.
template <class T>
FA_INLINE Vec<T> select_or_zero(IntVec<T> condition, Vec<T> yes) {
  return reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(yes) & condition);
}

// Lane i of the result is lane i + kStep of v, counted in a circle.
template <class T, int kStep, int... kLane>
FA_INLINE Vec<T> rotate(Vec<T> v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane + kStep) % kLanes<T>)...);
}

// The sum of all lanes.
template <class T, int kStep = kLanes<T> / 2>
FA_INLINE T sum_lanes(Vec<T> v) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return sum_lanes<T, kStep / 2>(v + rotate<T, kStep>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  }
}

// The largest lane. No lane may be NaN.
template <class T, int kStep = kLanes<T> / 2>
FA_INLINE T max_lanes(Vec<T> v) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return max_lanes<T, kStep / 2>(max<T>(v, rotate<T, kStep>(v, std::make_integer_sequence<int, kLanes<T>>{})));
  }
}

// The condition for select whose lane i is -1 if bit (first + i) of the word is set, otherwise 0.
template <class T>
FA_INLINE IntVec<T> lanes_of_bits(uint64_t word, int first) {
  IntVec<T> bit;
  FA_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = LaneInt<T>{1} << i;
  return (broadcast_int<T>(static_cast<LaneInt<T>>(word >> first)) & bit) != 0;
}

// Whether some lane is larger than zero. NaN is not larger than zero.
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

// One step of a transposition, for the rows a = rows[i] and b = rows[i + kStep]: in each group of 2 kStep lanes,
// exchanges the upper kStep lanes of `a` with the lower kStep lanes of `b`.
template <class T, int kStep, int... kLane>
FA_INLINE void exchange_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane - kStep : kLane)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane : kLane + kStep)...);
  a = low;
  b = high;
}

// The vector whose lane i is the sum of the lanes of rows[i]. Overwrites the rows. Callers leave kStep at 1: the
// function calls itself with larger steps.
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

// Transposes a matrix of kLanes x kLanes numbers in registers: lane j of row i becomes lane i of row j. Callers leave
// kStep at 1: the function calls itself with larger steps.
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
