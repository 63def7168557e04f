// The entry of every forward: blocks of queries, or few queries against many keys.
#pragma once
#include "decode.h"
#include "query_blocks.h"

namespace fused_attn::cpu {
namespace {

// The largest number of queries. At head dim 64 and 128, in float32 and bfloat16, 6 queries take 0.6-0.8 of the time of
// query_blocks.h, and 8 queries take as long.
constexpr int64_t kDecodeQueries = 6;

// Whether decode.h is the faster way. It is not used where an lse is wanted, because then a backward pass may follow.
// Backward computes the scores as query_blocks.h does. Other scores would differ by rounding, and dquery would multiply
// the difference by the mean of the keys.
template <class Policy>
bool is_decoding(const AttentionParams& p) {
  if (p.seqlen_q > kDecodeQueries || p.has_dropout || p.lse.data != nullptr) return false;
  // Instructions for each key. decode.h takes, for each row, a load and a multiply-add for each vector, and some for
  // the sum over its lanes. query_blocks.h takes a multiply-add, and a quarter of a load, for each element.
  constexpr int64_t n = kLanes<typename Policy::Lane>;
  const int64_t vectors =
      round_up(Policy::lanes_for(static_cast<int>(p.head_dim)), n) / n + round_up(p.value_dim, n) / n;
  return 4 * p.seqlen_q * (vectors + 4) <= 3 * (p.head_dim + p.value_dim);
}

template <class Policy>
void forward_with_policy(const AttentionParams& p) {
  if (is_decoding<Policy>(p)) {
    forward_split_keys<Policy>(p);
  } else {
    forward_by_query_blocks<Policy>(p);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
