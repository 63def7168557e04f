// Philox4x32-7 (Salmon et al., 2011), the counter-based generator behind dropout, for host and device code. Of all
// numbers of rounds that pass all tests of BigCrush, seven is the smallest (table 2 of the paper).
//
// The random number of an entry of the scores depends on the seed and on the position of the entry alone, not on tile
// sizes, threads or backend. So every backend drops the same entries. For query i and key j, the key of Philox is (low
// half of the seed, high half), and its counter is (j / 8, i, head, batch). One call yields four words, and so a random
// number of 16 bits for each of eight neighbouring keys. The number of the entry is a half of word j % 8 / 2: the low
// half if j is even, the high half if j is odd.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace fused_attn {
namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

// One call makes numbers for so many neighbouring keys.
constexpr int kPhiloxKeys = 8;

struct PhiloxWords {
  uint32_t word[4];
};

// The words of one query for the keys 8 * group ... 8 * group + 7.
FUSED_ATTN_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint32_t group, uint32_t query, uint32_t head,
                                          uint32_t batch) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t x0 = group, x1 = query, x2 = head, x3 = batch;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * x0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{x0, x1, x2, x3}};
}

}  // namespace
}  // namespace fused_attn
