// Element types in memory, their conversion to lanes, and the layouts that the kernels read.
#pragma once
#include "exp2.h"
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

// As many 16-bit elements as there are float lanes.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

FA_INLINE Vec<float> widen(HalfVec h, BFloat16*) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16);
}

FA_INLINE Vec<float> widen(HalfVec h, Float16*) {
  // The masked intrinsics with a full mask: GCC 12 warns about an undefined operand inside the plain ones.
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  const WordVec w = __builtin_convertvector(h, WordVec);
  // Read as a float the magnitude is 2^-112 of its value, denormals included; infinity and NaN need their exponent back.
  const WordVec magnitude = (w & 0x7fffu) << 13;
  const WordVec scaled = reinterpret_cast<WordVec>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  const WordVec special = reinterpret_cast<WordVec>(magnitude >= 0x0f800000u);
  return reinterpret_cast<Vec<float>>((special & (magnitude | 0x7f800000u)) | (~special & scaled) |
                                      ((w & 0x8000u) << 16));
#endif
}

FA_INLINE HalfVec narrow(Vec<float> v, BFloat16*) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfVec>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));  // and denormals to zero
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

// The first n < kLanes elements at p, the rest zero; nothing behind them is read. A copy to the stack and back costs ten
// times a load, so instruction sets that have masked loads use them.
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

// `n` elements at p as lanes, the rest zero; n may be kLanes<Lane> or more.
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

// How the elements of one dtype meet the multiply-add units.
// kPerLane = 1: a lane holds one number. kPerLane = 2: a 32-bit lane holds two bfloat16 neighbours of the dimension that is
// summed over, and one instruction multiplies and adds both.
template <class StorageType, class LaneType, int kElementsPerLane>
struct ElementPolicy {
  using Storage = StorageType;
  using Lane = LaneType;
  static constexpr int kPerLane = kElementsPerLane;
  static constexpr bool kCoarseExp = sizeof(StorageType) == 2;
  static constexpr bool kConverts = !kSame<StorageType, LaneType> && kElementsPerLane == 1;

  // Lanes that hold n elements.
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

// One lane of a row at any address, in every lane. Pairs go through integers: as a float their bits are no number.
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
// Rounds two vectors to bfloat16 and pairs them: `low` in the low half of each lane.
FA_INLINE Vec<float> round_to_pairs(Vec<float> low, Vec<float> high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)));
}

// Two rows of `n` bfloat16 as one row of n pairs: the first row in the low halves. A null row counts as zeros. A shuffle
// across both inputs: widening, shifting and merging instead took 17 % of the forward pass.
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

// Loads kLanes lanes of a row from lane `first` on; zero beyond `dim` elements.
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

// Stores what load_lanes loads; elements from `dim` on are left alone.
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

// Transposes `count` <= kBlock rows of `dim` elements into columns[lane][kBlock].
// Rows from `count` up to the next full vector are zero.
template <class Policy, int kBlock>
FA_NOINLINE void pack_columns(const typename Policy::Storage* rows, int64_t stride_row, int count, int dim,
                              typename Policy::Lane* columns) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const int depth = Policy::lanes_for(dim);
  for (int q = 0; q < count; q += n) {
    for (int d = 0; d < depth; d += n) {
      Vec<Lane> block[n];
      if (q + n <= count) {
        FA_UNROLL
        for (int i = 0; i < n; ++i) block[i] = load_lanes<Policy>(rows + (q + i) * stride_row, d, dim);
      } else {
        FA_UNROLL
        for (int i = 0; i < n; ++i) {
          block[i] = q + i < count ? load_lanes<Policy>(rows + (q + i) * stride_row, d, dim) : Vec<Lane>{};
        }
      }
      transpose<Lane>(block);
      Lane* target = columns + static_cast<int64_t>(d) * kBlock + q;
      FA_UNROLL
      for (int i = 0; i < n; ++i) {
        if (d + i < depth) store<Lane>(target + i * kBlock, block[i]);
      }
    }
  }
}

// Transposes back: writes `count` rows of `dim` elements, or adds to them (lanes of single elements only). column(d, q) are
// elements d of the rows from q on, for any d below dim rounded up to a vector. Elements that share a lane are rounded and
// paired first: that leaves half as much to transpose.
template <class Policy, class Column>
FA_INLINE void unpack_columns(const Column& column, int count, int dim, bool add, typename Policy::Storage* rows,
                              int64_t stride_row) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  for (int q = 0; q < count; q += n) {
    for (int d = 0; d < Policy::lanes_for(dim); d += n) {
      Vec<Lane> block[n];
      FA_UNROLL
      for (int i = 0; i < n; ++i) {
        if constexpr (Policy::kPerLane == 1) {
          block[i] = column(d + i, q);
        } else {
#if defined(__AVX512BF16__)
          const int first = 2 * (d + i);
          block[i] = first < dim ? round_to_pairs(column(first, q), column(first + 1, q)) : Vec<Lane>{};
#endif
        }
      }
      transpose<Lane>(block);
      FA_UNROLL
      for (int i = 0; i < n; ++i) {
        if (q + i >= count) continue;
        typename Policy::Storage* row = rows + (q + i) * stride_row;
        if constexpr (Policy::kPerLane == 1) {
          if (add) block[i] += load_lanes<Policy>(row, d, dim);
        }
        store_lanes<Policy>(row, d, dim, block[i]);
      }
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
