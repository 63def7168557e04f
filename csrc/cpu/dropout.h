// Which entries of the scores survive dropout, for a block of keys and 64 queries.
#pragma once
#include "key_blocks.h"
#include "random_words.h"

namespace fused_attn::cpu {
namespace {

// dropout_keep[key][query] = -1 (all bits set) if dropout keeps the entry, otherwise 0, for the keys of a block. Keys
// come in ascending order, so one call of philox_rows serves up to eight keys.
template <class Int>
FA_NOINLINE void make_dropout_keep(const AttentionParams& p, const QueryBlock& queries, const KeyBlock& keys,
                                   Int* dropout_keep) {
  const int64_t stride = round_up(queries.count, kLanes<Int>);
  uint32_t words[4][kBlockQ];
  const DropoutOrigin& origin = p.dropout_origin;
  int64_t group = -1;
  for (int k = 0; k < keys.count; ++k) {
    const int64_t key = keys.index[k] + origin.key;
    if (key / kPhiloxKeys != group) {
      group = key / kPhiloxKeys;
      philox_rows(p.dropout_seed, static_cast<uint32_t>(queries.b + origin.batch),
                  static_cast<uint32_t>(queries.h + origin.head), static_cast<uint32_t>(queries.begin + origin.query),
                  static_cast<uint32_t>(group), queries.count, words);
    }
    const uint32_t* word = words[key % kPhiloxKeys / 2];
    const int shift = key % 2 == 0 ? 16 : 0;  // moves the number of an even key from the low half to the high half
    for (int64_t q = 0; q < stride; ++q)
      dropout_keep[k * stride + q] = -static_cast<Int>(word[q] << shift >= p.dropout_threshold << 16);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
