// The row statistics, which backward computes for every query before it loops over keys: lse with its correction, dlse,
// and delta = rowsum(dout * out).
#pragma once
#include "backward_scratch.h"

namespace fused_attn::cpu {
namespace {

// Computes delta of a block of queries, from out and the transposed dout in s.dout. The sum has the order in which
// backward_tile sums value . dout^T. If a query sees only one key and there is no dropout, both are the same number,
// and their difference must be exactly zero.
template <class Policy>
void compute_delta(const AttentionParams& p, const Sequence& seq, const QueryBlock& queries,
                   const BackwardScratch<Policy>& s, typename Policy::Lane* delta) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int nq = queries.count;
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t stride = round_up(nq, n);
  const Storage* out = rows_of<const Storage>(p.out, seq, queries);
  if constexpr (Policy::kUsesAmx) {
    const char* rows[kBlockQ];
    for (int q = 0; q < nq; ++q) rows[q] = reinterpret_cast<const char*>(out + q * p.out.stride_row);
    multiply_rows_by_columns<Policy>(rows, nq, value_dim, s.dout, stride, s.value.copies, s.dprobs);
    for (int64_t q = 0; q < stride; ++q) delta[q] = s.dprobs[q * stride + q];
    return;
  }
  pack_columns<Policy>(out, p.out.stride_row, nq, value_dim, s.out);
  const int depth = Policy::lanes_for(value_dim);
  for (int q = 0; q < nq; q += n) {
    Vec<Lane> total = {};
    for (int begin = 0; begin < depth; begin += kLongestSum) {  // as dot_tile
      const int end = depth - begin > kLongestSum ? begin + kLongestSum : depth;
      Vec<Lane> sum = {};
      for (int d = begin; d < end; ++d) {
        sum = multiply_add<Policy>(load<Lane>(s.out + d * stride + q), load<Lane>(s.dout + d * stride + q), sum);
      }
      total += sum;
    }
    store<Lane>(delta + q, total);
  }
}

// Computes the statistics `rows` of a block of queries, with corrections of zero. Expects the transposed dout of the
// block in s.dout. Returns whether some lse is so large that its rounding would make probs inexact, so that correct_lse
// has to follow.
template <class Policy>
FA_NOINLINE bool load_row_statistics(const AttentionParams& p, const Sequence& seq, const QueryBlock& queries,
                                     const BackwardScratch<Policy>& s,
                                     const RowStatistics<typename Policy::Lane>& rows) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  // The largest lse that is exact enough. An lse of 16 has a rounding error of 1e-6 in float, and probs get a relative
  // error of the same size. If the tensors have 16 bits, such an accuracy is not needed.
  const Lane exact_lse = kSame<Storage, Lane> ? Lane(16) : Lane(1024);
  const Lane infinity = FloatTraits<Lane>::kInfinity;
  const int nq = queries.count;
  const Lane* lse_rows = rows_of<const Lane>(p.lse, seq, queries);
  const Lane* dlse_rows = p.dlse.data != nullptr ? rows_of<const Lane>(p.dlse, seq, queries) : nullptr;

  compute_delta<Policy>(p, seq, queries, s, rows.delta);
  const int64_t stride = round_up(nq, n);
  bool inexact = false;
  for (int q = 0; q < stride; ++q) {
    const Lane lse = q < nq ? lse_rows[q * p.lse.stride_row] : -infinity;
    const bool empty = lse == -infinity;
    rows.lse[q] = empty ? infinity : lse;
    rows.correction[q] = 0;
    rows.dlse[q] = empty || dlse_rows == nullptr ? 0 : dlse_rows[q * p.dlse.stride_row];
    if (empty) rows.delta[q] = 0;
    inexact |= !empty && (lse > exact_lse || lse < -exact_lse);
  }
  return inexact;
}

// logit - lse. sum_tile and backward_tile both call this function, so that the correction of lse is measured with the
// same rounding errors that it has to correct. Callers add the correction before they multiply by log2(e): a product
// and then a sum would become one multiply-add in one of the callers alone, which does not round the product.
template <class Policy>
FA_INLINE Vec<typename Policy::Lane> above_lse(Vec<typename Policy::Lane> score, typename Policy::Lane to_logits,
                                               Vec<typename Policy::Lane> lse) {
  return score * to_logits - lse;
}

// The sum of exp(logit - lse) of one vector of queries over the keys so far: exp(largest) * sum. The largest difference
// is kept apart, because an lse of 1e9 may be so far from the logits that the sum would overflow or be zero.
template <class Lane>
struct ProbSum {
  Vec<Lane> largest = broadcast<Lane>(FloatTraits<Lane>::kLowest);
  Vec<Lane> sum = {};
};

// Adds the keys of a tile to sums[v + c], for kColumns vectors of queries from vector v on. correct_lse derives its
// corrections from these sums.
template <class Policy, int kColumns>
FA_NOINLINE void sum_tile(const ScoreInputs<Policy>& in, int k, int v, bool partial, const typename Policy::Lane* lse,
                          ProbSum<typename Policy::Lane>* sums) {
  using Lane = typename Policy::Lane;
  Vec<Lane> acc[kTileKeys][kColumns];
  compute_scores<Policy, kColumns, /*kPlain=*/false>(in, k, v, partial, /*derivative=*/nullptr, acc);
  const Lane to_logits = in.to_logits();
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> row_lse = load<Lane>(lse + (v + c) * kLanes<Lane>);
    const Vec<Lane> before = sums[v + c].largest;
    Vec<Lane> largest = before;
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      acc[r][c] = above_lse<Policy>(acc[r][c], to_logits, row_lse);
      largest = max<Lane>(acc[r][c], largest);
    }
    Vec<Lane> sum = sums[v + c].sum * exp2<Lane>((before - largest) * Lane(kLog2E));
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) sum += prob_of<Policy>((acc[r][c] - largest) * Lane(kLog2E));
    sums[v + c] = {largest, sum};
  }
}

// Computes the corrections of lse for a block of queries. The rounding error of lse grows with its size: an lse of 1e3
// has an error that changes probs by 6e-5, and an lse of -1e9, as a large negative bias makes it, changes probs several
// times over. So this function sums exp(logit - lse) over all keys of each row. Without rounding, the sum would be 1.
// The correction, which is added to the logits, divides probs by this sum. It also makes up for scores that
// forward has multiplied in another order, as AMX does. Returns false if a sum is NaN.
template <class Policy>
FA_NOINLINE bool correct_lse(const AttentionParams& p, const Sequence& seq,
                             const RelativeBias<typename Policy::Lane>& relative, const ValidKeys* valid_keys,
                             const QueryBlock& queries, const BackwardScratch<Policy>& s,
                             const RowStatistics<typename Policy::Lane>& rows) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int nq = queries.count;
  const int vectors = (nq + n - 1) / n;
  ProbSum<Lane> sums[kBlockVectors<Lane>];

  pack_columns<Policy>(rows_of<const Storage>(p.query, seq, queries), p.query.stride_row, nq,
                       static_cast<int>(p.head_dim), s.query);
  ScoreInputs<Policy> in = score_inputs<Policy>(p, relative, queries);
  in.query = s.query;
  KeyBlock& keys = *s.key.keys;
  KeyStream stream(p, seq, valid_keys, queries, 0, seq.seqlen_k, kKeyStep<Policy>);
  while (stream.next(keys)) {
    prepare_keys<Policy>(p, seq, queries, s.key, in);
    for (int k = 0; k < keys.count; k += kTileKeys) {
      bool partial;
      const VectorRange range = tile_range<Lane>(keys, k, stream.valid_queries(), vectors, partial);
      for (int panel = 0; panel * kTileVectors < vectors; ++panel) {
        const VectorRange part = clip_to_panel(range, panel);
        if (part.begin >= part.end) continue;
        with_columns(part.end - part.begin, [&](auto columns) {
          sum_tile<Policy, decltype(columns)::value>(in, k, part.begin, partial, rows.lse, sums);
        });
      }
    }
  }
  bool is_number = true;
  for (int q = 0; q < nq; ++q) {
    const Lane keys_largest = sums[q / n].largest[q % n];
    const Lane sink = sink_of<Lane>(p, queries.h) - rows.lse[q];
    const Lane largest = sink > keys_largest ? sink : keys_largest;
    const Lane sum = sums[q / n].sum[q % n] * natural_exp(keys_largest - largest) + natural_exp(sink - largest);
    if (sum > 0) rows.correction[q] = -largest - natural_log(sum);
    is_number &= sum == sum;
  }
  return is_number;
}

// Computes the statistics `rows` of a block of queries. Leaves the transposed dout of these queries in s.dout. Returns
// false if floats are multiplied in parts, and dout has none (float_parts.h), or a result is NaN.
template <class Policy>
bool measure_rows(const AttentionParams& p, const Sequence& seq, const RelativeBias<typename Policy::Lane>& relative,
                  const ValidKeys* valid_keys, const QueryBlock& queries, const BackwardScratch<Policy>& s,
                  const RowStatistics<typename Policy::Lane>& rows) {
  const auto* const dout = rows_of<const typename Policy::Storage>(p.dout, seq, queries);
  const int nq = queries.count;
  const int value_dim = static_cast<int>(p.value_dim);
#if defined(__AMX_BF16__)
  if constexpr (Policy::kParts > 1) {
    if (!have_parts(dout, p.dout.stride_row, nq, value_dim)) return false;
  }
#endif
  pack_columns<Policy>(dout, p.dout.stride_row, nq, value_dim, s.dout);
  const bool inexact = load_row_statistics<Policy>(p, seq, queries, s, rows);
  // The sum over the keys of a part says nothing about the rounding of lse, which is that of all keys.
  bool is_number = true;
  if (inexact && !p.is_part) is_number = correct_lse<Policy>(p, seq, relative, valid_keys, queries, s, rows);
  for (int q = 0; q < nq; ++q) is_number &= rows.delta[q] == rows.delta[q];
  return Policy::kParts <= 1 || is_number;
}

}  // namespace
}  // namespace fused_attn::cpu
