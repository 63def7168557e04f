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

// The product of two numbers that are the same for all lanes.
FA_INLINE uint64_t multiply_wide(uint64_t x, uint32_t m) { return static_cast<uint64_t>(static_cast<uint32_t>(x)) * m; }

// The words of Philox between two rounds: each a WideVec, or a uint64_t that is the same for all lanes.
template <class X0, class X1, class X2, class X3>
struct PhiloxState {
  X0 x0;
  X1 x1;
  X2 x2;
  X3 x3;
};

template <class X0, class X1, class X2, class X3>
PhiloxState(X0, X1, X2, X3) -> PhiloxState<X0, X1, X2, X3>;

// A round of Philox, for round 0, 1, ... of a call. A word of the result is a WideVec only if lanes differ in it.
template <class State>
FA_INLINE auto philox_round(const State& state, uint64_t seed, int round) {
  const uint32_t key0 = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kPhiloxWeyl0;
  const uint32_t key1 = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kPhiloxWeyl1;
  const auto product0 = multiply_wide(state.x0, kPhiloxMultiplier0);
  const auto product1 = multiply_wide(state.x2, kPhiloxMultiplier1);
  return PhiloxState{(product1 >> 32) ^ state.x1 ^ key0, product1, (product0 >> 32) ^ state.x3 ^ key1, product0};
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
    PhiloxState<WideVec, WideVec, WideVec, WideVec> states[kVectors];
    FA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      // Lanes differ in the query alone. So they share four of the six products of the first three rounds.
      const WideVec query = lane + (q_begin + static_cast<uint32_t>(first + v * kWideLanes));
      const PhiloxState counter{static_cast<uint64_t>(group), query, static_cast<uint64_t>(head),
                                static_cast<uint64_t>(batch)};
      const auto third = philox_round(philox_round(philox_round(counter, seed, 0), seed, 1), seed, 2);
      states[v] = {third.x0, third.x1, third.x2, WideVec{} + third.x3};
    }
    for (int round = 3; round < kPhiloxRounds; ++round) {
      FA_UNROLL
      for (int v = 0; v < kVectors; ++v) states[v] = philox_round(states[v], seed, round);
    }
    FA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const WideVec x[4] = {states[v].x0, states[v].x1, states[v].x2, states[v].x3};
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Words low = __builtin_convertvector(x[i], Words);
        memcpy(&words[i][first + v * kWideLanes], &low, sizeof(low));
      }
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
