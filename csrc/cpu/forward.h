// Chooses between the two forward kernels: forward_blocks.h for many queries, decode_forward.h for few queries and many
// keys. The sequences of a packed call may have few queries and many, and then both kernels run.
#pragma once
#include <algorithm>
#include <vector>

#include "decode_forward.h"
#include "forward_blocks.h"

namespace fused_attn::cpu {
namespace {

// The largest number of queries for which decode_forward.h is used, where the number of instructions does not forbid
// it. 28 is the largest number that has been measured.
constexpr int64_t kDecodeQueries = 32;

// The same where AMX multiplies in forward_blocks.h, and the band shows at least kFewKeys. On a Xeon, decode_forward.h
// with tiles took 0.66 to 1.04 of the time of forward_blocks.h with 6 queries (64 to 4096 keys, head dims 64 and 128),
// 0.92 to 1.04 with 8, and as long with 12. With groups of 4 heads, it took 0.6 to 0.86 with 8, and 0.9 to 1.3 with 16.
// With 8 keys, 6 queries took 0.48 to 0.87.
constexpr int64_t kDecodeQueriesBesideAmx = 8;
constexpr int64_t kFewKeys = 64;

// With more queries than kQueriesForAnyBand, decode_forward.h is used only if the band shows at least kWideBand keys.
// With fewer keys, the preparations of decode_forward.h for each query take longer than the products: 13 queries that
// see 13 to 29 keys took 1.34 to 1.66 of the time of forward_blocks.h, and 1.1 with 77 keys (float32, head dim 128,
// AVX-512).
constexpr int64_t kQueriesForAnyBand = 8;
constexpr int64_t kWideBand = 128;

// How many keys of the longest sequence the band shows to some query.
inline int64_t keys_in_band(const AttentionParams& p) {
  const int64_t from_end = p.band_from_end ? p.seqlen_k - p.seqlen_q : 0;
  const Sequence longest = {0, 0, p.seqlen_q, p.seqlen_k, p.band_offset + from_end};
  const Band band = band_of(p, longest);
  const int64_t begin = std::max<int64_t>(band.first_key(0), 0);
  const int64_t end = std::min(band.last_key(p.seqlen_q - 1) + 1, p.seqlen_k);
  return end - begin;
}

// Whether decode_forward.h computes this call. decode_forward.h must be faster, and backward must not follow, as it may
// if the caller wants lse of keys that are not paged. Backward computes the scores in the same order as
// forward_blocks.h. The scores of decode_forward.h would differ from those by rounding, and this difference, multiplied
// by the mean of the keys, would be an error of dquery.
template <class Policy, class BlockPolicy>
bool is_decoding(const AttentionParams& p) {
  if (p.seqlen_q > kDecodeQueries || p.has_dropout) return false;
  // With num_splits, the bits of a sequence depend on no other one. But p.seqlen_k has room for the longest one.
  const int64_t keys = p.num_splits > 0 ? kWideBand : keys_in_band(p);
  if (BlockPolicy::kUsesAmx && BlockPolicy::kParts == 1 && p.seqlen_q > kDecodeQueriesBesideAmx && keys >= kFewKeys)
    return false;
  if (p.lse.data != nullptr && p.page_size == 0) return false;
  if (p.seqlen_q > kQueriesForAnyBand && keys < kWideBand) return false;
  // Compares the instructions for one key. For each query, decode_forward.h needs those of each vector of the row, and
  // the instructions of about 3 vectors for the sum over lanes and the softmax. forward_blocks.h needs a multiply-add
  // for each element of the row and each vector of queries, and some more for each element, whatever the number of
  // queries. So decode_forward.h can be faster again with one query more than fill the vectors. The factors fit the
  // times of 1 to 28 queries with 512 keys, head dims 32 to 256 and all dtypes, and of head dim 512 in float32 and
  // bfloat16. Where the two sides are equal, decode_forward.h took 0.88 to 1.04 of the time of forward_blocks.h with
  // AVX-512, and less with AVX2.
  constexpr int64_t n = kLanes<typename Policy::Lane>;
  const int64_t vectors =
      round_up(Policy::lanes_for(static_cast<int>(p.head_dim)), n) / n + round_up(p.value_dim, n) / n;
  const int64_t query_vectors = round_up(p.seqlen_q, n) / n;
  return 5 * p.seqlen_q * (vectors + 3) <= (p.head_dim + p.value_dim) * (3 * query_vectors + 2);
}

// Computes a packed call: decode_forward.h the sequences that it suits, and forward_blocks.h the others. The kernel of
// a sequence follows from its own numbers of queries and keys. So its bits depend on no other sequence.
template <class Policy, class BlockPolicy>
void forward_packed(const AttentionParams& p) {
  struct Part {
    AttentionParams params;
    std::vector<int32_t> ends;
  };
  Part few{p, {p.cu_seqlens_q, p.cu_seqlens_q + p.batch}}, many = few;  // at first, each sequence ends where it begins
  few.params.seqlen_q = many.params.seqlen_q = 0;
  AttentionParams alone = p;
  for (int64_t b = 0; b < p.batch; ++b) {
    alone.seqlen_q = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    alone.seqlen_k = sequence_of(p, b).seqlen_k;
    Part& own = is_decoding<Policy, BlockPolicy>(alone) ? few : many;
    own.ends[b] = p.cu_seqlens_q[b + 1];
    own.params.seqlen_q = std::max(own.params.seqlen_q, alone.seqlen_q);
  }
  few.params.query_ends = few.ends.data();
  many.params.query_ends = many.ends.data();
  if (few.params.seqlen_q > 0) decode_forward<Policy>(few.params);
  if (many.params.seqlen_q > 0) forward_blocks<BlockPolicy>(many.params);
}

// Computes out and lse of one call. decode_forward.h runs with Policy, and forward_blocks.h with BlockPolicy.
template <class Policy, class BlockPolicy = Policy>
void forward_with_policy(const AttentionParams& p) {
  // The columns of a relative bias count from the longest sequence that the caller has named.
  if (p.cu_seqlens_q != nullptr && p.relative_bias.data == nullptr) return forward_packed<Policy, BlockPolicy>(p);
  if (is_decoding<Policy, BlockPolicy>(p)) {
    decode_forward<Policy>(p);
  } else {
    forward_blocks<BlockPolicy>(p);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
