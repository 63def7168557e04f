// Random words for 64 neighbouring positions at once: the vectors of Philox (philox.h).
#pragma once
#include "../common/philox.h"
#include "tiles.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fused_attn::cpu {
namespace {

// A vector of numbers of 32 bits, each in the low half of a lane of 64 bits. The high halves may hold anything.
typedef uint64_t WideVec __attribute__((vector_size(kVectorBytes)));
constexpr int kWideLanes = kVectorBytes / static_cast<int>(sizeof(uint64_t));

// The product of each number and m, in all 64 bits of its lane.
FA_INLINE WideVec multiply_wide(WideVec x, uint32_t m) {
#if defined(__AVX512F__)
  // The intrinsic has a mask, which selects all lanes, because GCC 12 warns about the one without.
  return reinterpret_cast<WideVec>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), _mm512_set1_epi64(static_cast<int64_t>(m))));
#elif defined(__AVX2__)
  return reinterpret_cast<WideVec>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(static_cast<int64_t>(m))));
#elif defined(__SSE2__)
  return reinterpret_cast<WideVec>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(static_cast<int64_t>(m))));
#elif defined(__aarch64__)
  return reinterpret_cast<WideVec>(vmull_n_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(x)), m));
#else
  return (x & 0xffffffffu) * m;
#endif
}

// philox() of philox.h for `count` queries at once, rounded up to whole vectors: words[w][q] is word w of query
// q_begin + q for the keys of a group. A product of 32 bits needs 64, so the numbers keep lanes of 64 bits. Packed to
// 32 bits after each product, a forward pass with dropout took 1.43 times as long (bfloat16, AMX, head dim 64).
FA_NOINLINE void philox_rows(uint64_t seed, uint32_t batch, uint32_t head, uint32_t q_begin, uint32_t group, int count,
                             uint32_t (&words)[4][kBlockQ]) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes / 2)));
  constexpr int kVectors = kVectorRegisters == 32 ? 4 : 2;  // so many that no product waits for the one before it
  static_assert(kBlockQ % (kVectors * kWideLanes) == 0);
  WideVec lane;
  for (int i = 0; i < kWideLanes; ++i) lane[i] = static_cast<uint64_t>(i);
  for (int first = 0; first < count; first += kVectors * kWideLanes) {
    WideVec x[4][kVectors];
    FA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t query = q_begin + static_cast<uint32_t>(first + v * kWideLanes);
      x[0][v] = WideVec{} + group;
      x[1][v] = lane + query;
      x[2][v] = WideVec{} + head;
      x[3][v] = WideVec{} + batch;
    }
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      FA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const WideVec product0 = multiply_wide(x[0][v], kPhiloxMultiplier0);
        const WideVec product1 = multiply_wide(x[2][v], kPhiloxMultiplier1);
        x[0][v] = (product1 >> 32) ^ x[1][v] ^ k0;
        x[1][v] = product1;
        x[2][v] = (product0 >> 32) ^ x[3][v] ^ k1;
        x[3][v] = product0;
      }
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    FA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Words low = __builtin_convertvector(x[i][v], Words);
        memcpy(&words[i][first + v * kWideLanes], &low, sizeof(low));
      }
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
