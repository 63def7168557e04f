// Which entries of the scores survive dropout, for a block of keys and 64 queries.
#pragma once
#include "../common/philox.h"
#include "key_blocks.h"

namespace fused_attn::cpu {
namespace {

// philox() of philox.h for 64 queries at once: words[k][q] is the random word of query q_begin + q and key 4 * group +
// k. The function consists of plain loops, because compilers vectorise the multiplication of 32 bits to 64 bits well,
// while the vector extensions cannot express it.
FA_NOINLINE void philox_rows(uint64_t seed, uint32_t batch, uint32_t head, uint32_t q_begin, uint32_t group,
                             uint32_t (&words)[4][kBlockQ]) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int q = 0; q < kBlockQ; ++q) {
    words[0][q] = group;
    words[1][q] = q_begin + static_cast<uint32_t>(q);
    words[2][q] = head;
    words[3][q] = batch;
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int q = 0; q < kBlockQ; ++q) {
      const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * words[0][q];
      const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * words[2][q];
      words[0][q] = static_cast<uint32_t>(product1 >> 32) ^ words[1][q] ^ k0;
      words[1][q] = static_cast<uint32_t>(product1);
      words[2][q] = static_cast<uint32_t>(product0 >> 32) ^ words[3][q] ^ k1;
      words[3][q] = static_cast<uint32_t>(product0);
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
}

// dropout_keep[key][query] = -1 (all bits set) if dropout keeps the entry, otherwise 0, for the keys of a block. Keys
// come in ascending order, so one call of philox_rows serves up to four keys.
template <class Int>
FA_NOINLINE void make_dropout_keep(const AttentionParams& p, int64_t b, int64_t h, int64_t q_begin, int nq,
                                   const KeyBlock& keys, Int* dropout_keep) {
  const int64_t stride = round_up(nq, kLanes<Int>);
  uint32_t words[4][kBlockQ];
  const DropoutOrigin& origin = p.dropout_origin;
  int64_t group = -1;
  for (int k = 0; k < keys.count; ++k) {
    const int64_t key = keys.index[k] + origin.key;
    if (key >> 2 != group) {
      group = key >> 2;
      philox_rows(p.dropout_seed, static_cast<uint32_t>(b + origin.batch), static_cast<uint32_t>(h + origin.head),
                  static_cast<uint32_t>(q_begin + origin.query), static_cast<uint32_t>(group), words);
    }
    const uint32_t* word = words[key & 3];
    for (int64_t q = 0; q < stride; ++q)
      dropout_keep[k * stride + q] = -static_cast<Int>(word[q] >= p.dropout_threshold);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
