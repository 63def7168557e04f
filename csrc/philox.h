// Philox4x32-10 (Salmon et al., 2011), the counter-based generator behind dropout, for host and device code.
//
// The random word of an entry depends on the seed and on its position alone, never on tile sizes, threads or backend:
//   key = (seed low, seed high), counter = (j >> 2, i, head, batch), and word j & 3 of the result decides.
#pragma once
#include <cstdint>

#include "mask.h"  // FUSED_ATTN_HOST_DEVICE

namespace fused_attn {
namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

FUSED_ATTN_HOST_DEVICE PhiloxWords philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

// The word that decides about key j for query i.
FUSED_ATTN_HOST_DEVICE uint32_t philox_word(uint64_t seed, int64_t batch, int64_t head, int64_t i, int64_t j) {
  const PhiloxWords r = philox4x32(seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                                   static_cast<uint32_t>(head), static_cast<uint32_t>(batch));
  return r.word[j & 3];
}

}  // namespace
}  // namespace fused_attn
