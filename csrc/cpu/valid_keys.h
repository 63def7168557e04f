// Lists of the keys that are not padding. They are made once for each call, because all heads share them.
#pragma once
#include "memory.h"
#include "sequence.h"

namespace fused_attn::cpu {
namespace {

// The valid keys of one batch entry.
struct ValidKeys {
  const int32_t* index = nullptr;  // in ascending order; null = all keys are valid
  int64_t count = 0;
};

// The memory that make_valid_keys needs, in bytes; 0 without key padding. One cache line is added, because the second
// array that the function takes from its arena begins at a cache line.
FA_INLINE int64_t valid_keys_bytes(const AttentionParams& p) {
  if (p.key_padding.data == nullptr) return 0;
  return p.batch * static_cast<int64_t>(sizeof(ValidKeys)) + kCacheLine +
         p.batch * p.seqlen_k * static_cast<int64_t>(sizeof(int32_t));
}

// Makes the lists of all batch entries in `memory`, and returns one ValidKeys for each batch entry. Returns null if
// there is no key padding.
inline const ValidKeys* make_valid_keys(const AttentionParams& p, char* memory) {
  if (p.key_padding.data == nullptr) return nullptr;
  Arena arena(memory);
  ValidKeys* valid_keys = arena.take<ValidKeys>(p.batch);
  int32_t* index = arena.take<int32_t>(p.batch * p.seqlen_k);
  for (int64_t b = 0; b < p.batch; ++b, index += p.seqlen_k) {
    const int64_t length = sequence_of(p, b).seqlen_k;
    const uint8_t* is_padding = row_of<const uint8_t>(p.key_padding, b, 0, 0);
    int64_t count = 0;
    for (int64_t j = 0; j < length; ++j) {
      index[count] = static_cast<int32_t>(j);
      count += is_padding[j * p.key_padding.stride_col] == 0;
    }
    valid_keys[b].index = index;
    valid_keys[b].count = count;
  }
  return valid_keys;
}

}  // namespace
}  // namespace fused_attn::cpu
