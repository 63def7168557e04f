// The types of elements in memory, and their conversion to lanes (float or double) and back.
#pragma once
#include "vec.h"

namespace fused_attn::cpu {
namespace {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Whether two types are the same, as std::is_same.
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// A HalfVec has as many 16-bit elements as a vector has float lanes. So one HalfVec is converted to one Vec<float>.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

// Converts 16-bit elements to float. The pointer is not read: its type selects the conversion.
FA_INLINE Vec<float> widen(HalfVec h, BFloat16*) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16);
}

// Converts a vector of pairs of bfloat16 elements: `even` gets elements 0, 2, 4 and so on, `odd` the others. So one
// load serves two vectors of floats, and no element changes its lane.
FA_INLINE void widen_pairs(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  WordVec pairs;
  memcpy(&pairs, p, sizeof(pairs));
  even = reinterpret_cast<Vec<float>>(pairs << 16);
  odd = reinterpret_cast<Vec<float>>(pairs & 0xffff0000u);
}

// The inverse of the order of widen_pairs: `first` becomes elements 0 to kLanes - 1, and `second` those that follow.
template <int... kLane>
FA_INLINE void interleave(Vec<float>& first, Vec<float>& second, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<float>;
  const Vec<float> even = first, odd = second;
  first = __builtin_shufflevector(even, odd, (kLane % 2 * n + kLane / 2)...);
  second = __builtin_shufflevector(even, odd, (kLane % 2 * n + n / 2 + kLane / 2)...);
}

// Converts float16 to float, exactly, denormals, infinity and NaN included.
FA_INLINE Vec<float> widen(HalfVec h, Float16*) {
  // The intrinsic has a mask, which selects all lanes, because GCC 12 warns about an undefined operand in the intrinsic
  // without one.
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  const WordVec w = __builtin_convertvector(h, WordVec);
  // The bits of a float16 magnitude, shifted and read as a float, give the value times 2^-112, also for denormals. The
  // exponent of infinity and NaN has to be set to that of a float.
  const WordVec magnitude = (w & 0x7fffu) << 13;
  const WordVec scaled = reinterpret_cast<WordVec>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  const WordVec special = reinterpret_cast<WordVec>(magnitude >= 0x0f800000u);
  return reinterpret_cast<Vec<float>>((special & (magnitude | 0x7f800000u)) | (~special & scaled) |
                                      ((w & 0x8000u) << 16));
#endif
}

// Rounds floats to 16-bit elements, to nearest, ties to even. The pointer is not read: its type selects the conversion.
FA_INLINE HalfVec narrow(Vec<float> v, BFloat16*) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfVec>(
      _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));  // this instruction turns denormals into zero
#else
  const WordVec w = reinterpret_cast<WordVec>(v);
  const WordVec rounded = w + 0x7fffu + ((w >> 16) & 1u);  // the last bit that stays decides ties
  const WordVec is_nan = reinterpret_cast<WordVec>(v != v);
  return __builtin_convertvector(((is_nan & (w | 0x00400000u)) | (~is_nan & rounded)) >> 16, HalfVec);
#endif
}

// Rounds floats to float16, to nearest, ties to even, denormals, infinity and NaN included.
FA_INLINE HalfVec narrow(Vec<float> v, Float16*) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfVec>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<HalfVec>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const WordVec w = reinterpret_cast<WordVec>(v);
  const WordVec sign = (w >> 16) & 0x8000u;
  const WordVec magnitude = w & 0x7fffffffu;
  // 2^112 * 2^-110 = 4. The first product becomes infinite if float16 cannot represent the value, and otherwise the
  // second product is four times the value. The sum below rounds the value to the 10
  // bits of a float16 mantissa: it adds a power of two that is so much larger than the value that the 13 lowest bits of
  // the float do not fit any more. For denormals of float16, this power of two has a lower bound.
  const Vec<float> scaled = (reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f) * 0x1p-110f;
  WordVec exponent = (w + w) & 0xff000000u;
  exponent = (exponent < 0x71000000u) ? exponent - exponent + 0x71000000u : exponent;
  const WordVec sum = reinterpret_cast<WordVec>(reinterpret_cast<Vec<float>>((exponent >> 1) + 0x07800000u) + scaled);
  const WordVec rounded = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
  const WordVec is_nan = reinterpret_cast<WordVec>(magnitude > 0x7f800000u);
  return __builtin_convertvector(sign | (is_nan & 0x7e00u) | (~is_nan & rounded), HalfVec);
#endif
}

// Loads n < kLanes elements at p. The other lanes are zero. The function does not read memory behind the n elements,
// which may not exist. Instruction sets with masked loads use those, because a copy to the stack and back takes ten
// times as long.
FA_INLINE Vec<float> load_first(const float* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#elif defined(__AVX2__)
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return reinterpret_cast<Vec<float>>(_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), index)));
#else
  Vec<float> v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

// The same for double.
FA_INLINE Vec<double> load_first(const double* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#elif defined(__AVX2__)
  const __m256i index = _mm256_setr_epi64x(0, 1, 2, 3);
  return reinterpret_cast<Vec<double>>(_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), index)));
#else
  Vec<double> v = {};
  memcpy(&v, p, n * sizeof(double));
  return v;
#endif
}

// The same for 16-bit elements.
FA_INLINE HalfVec load_first(const uint16_t* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfVec>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
  HalfVec v = {};
  memcpy(&v, p, n * sizeof(uint16_t));
  return v;
#endif
}

// Loads the first min(n, kLanes) elements at p and converts them to lanes. The other lanes are zero.
template <class Lane, class Storage>
FA_INLINE Vec<Lane> load_as(const Storage* p, int n = kLanes<Lane>) {
  constexpr int kFull = kLanes<Lane>;
  if constexpr (kSame<Lane, Storage>) {
    return n >= kFull ? load<Lane>(p) : load_first(p, n);
  } else {
    HalfVec h;
    if (n >= kFull) {
      memcpy(&h, p, sizeof(h));
    } else {
      h = load_first(&p->bits, n);
    }
    return widen(h, static_cast<Storage*>(nullptr));  // the pointer selects the conversion
  }
}

// Converts lanes to elements and stores the first min(n, kLanes) of them at p.
template <class Lane, class Storage>
FA_INLINE void store_as(Storage* p, Vec<Lane> v, int n = kLanes<Lane>) {
  constexpr int kFull = kLanes<Lane>;
  if constexpr (kSame<Lane, Storage>) {
    if (n >= kFull) {
      store<Lane>(p, v);
    } else {
      memcpy(p, &v, n * sizeof(Lane));
    }
  } else {
    const HalfVec h = narrow(v, static_cast<Storage*>(nullptr));  // the pointer selects the conversion
    memcpy(p, &h, (n >= kFull ? kFull : n) * sizeof(uint16_t));
  }
}

// Loads one element at p as the type of a lane.
template <class Lane, class Storage>
FA_INLINE Lane load_scalar(const Storage* p) {
  if constexpr (kSame<Lane, Storage>) {
    return *p;
  } else {
    return load_as<Lane>(p, 1)[0];
  }
}

}  // namespace
}  // namespace fused_attn::cpu
