// Element types in memory, and their conversion to lanes.
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

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// A HalfVec has as many 16-bit elements as a vector has float lanes.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

FA_INLINE Vec<float> widen(HalfVec h, BFloat16*) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16);
}

FA_INLINE Vec<float> widen(HalfVec h, Float16*) {
  // Masked intrinsics with a full mask, because GCC 12 warns about an undefined operand inside the plain ones.
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  const WordVec w = __builtin_convertvector(h, WordVec);
  // Read as a float, the magnitude is 2^-112 times its value, also for denormals. Infinity and NaN need their exponent
  // back.
  const WordVec magnitude = (w & 0x7fffu) << 13;
  const WordVec scaled = reinterpret_cast<WordVec>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  const WordVec special = reinterpret_cast<WordVec>(magnitude >= 0x0f800000u);
  return reinterpret_cast<Vec<float>>((special & (magnitude | 0x7f800000u)) | (~special & scaled) |
                                      ((w & 0x8000u) << 16));
#endif
}

FA_INLINE HalfVec narrow(Vec<float> v, BFloat16*) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfVec>(
      _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));  // this turns denormals into zero, too
#else
  const WordVec w = reinterpret_cast<WordVec>(v);
  const WordVec rounded = w + 0x7fffu + ((w >> 16) & 1u);  // to nearest, ties to even
  const WordVec is_nan = reinterpret_cast<WordVec>(v != v);
  return __builtin_convertvector(((is_nan & (w | 0x00400000u)) | (~is_nan & rounded)) >> 16, HalfVec);
#endif
}

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
  // The two products overflow to infinity what float16 cannot hold. Adding a power of two 2^13 float units above the
  // value (at least the smallest that float16's denormals need) then rounds to the 10 bits that stay.
  const Vec<float> scaled = (reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f) * 0x1p-110f;
  WordVec exponent = (w + w) & 0xff000000u;
  exponent = (exponent < 0x71000000u) ? exponent - exponent + 0x71000000u : exponent;
  const WordVec sum = reinterpret_cast<WordVec>(reinterpret_cast<Vec<float>>((exponent >> 1) + 0x07800000u) + scaled);
  const WordVec rounded = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
  const WordVec is_nan = reinterpret_cast<WordVec>(magnitude > 0x7f800000u);
  return __builtin_convertvector(sign | (is_nan & 0x7e00u) | (~is_nan & rounded), HalfVec);
#endif
}

// Loads the first n < kLanes elements at p; the other lanes are zero. Nothing behind the elements is read. A copy to
// the stack and back costs ten times as much as a load, so instruction sets that have masked loads use them.
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

FA_INLINE HalfVec load_first(const uint16_t* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfVec>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
  HalfVec v = {};
  memcpy(&v, p, n * sizeof(uint16_t));
  return v;
#endif
}

// Loads `n` elements at p as lanes; the other lanes are zero. n may be kLanes<Lane> or more.
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
    return widen(h, static_cast<Storage*>(nullptr));
  }
}

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
    const HalfVec h = narrow(v, static_cast<Storage*>(nullptr));
    memcpy(p, &h, (n >= kFull ? kFull : n) * sizeof(uint16_t));
  }
}

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
