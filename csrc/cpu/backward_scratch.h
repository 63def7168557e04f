// The memory of backward: the partial sums of several work items, the statistics of rows, and the scratch of a thread.
#pragma once
#include <type_traits>

#include "backward_plan.h"

namespace fused_attn::cpu {
namespace {

// Partial sums of the gradients that several work items add to. After all items, the sums are added up in a fixed
// order. So results depend on the number of chunks, which depends on the number of threads, but results do not depend
// on which thread processes which item.
template <class Lane>
struct BackwardPartials {
  Lane* dquery = nullptr;          // [chunk][batch][head][seqlen_q][row_dquery], if there is more than one chunk
  Lane* drelative_bias = nullptr;  // [chunk][batch][head][row_relative], reversed like RelativeBias
  int64_t row_dquery = 0;          // the number of lanes of a row of dquery
  int64_t row_relative = 0;        // the number of lanes of a row of drelative_bias

  // Takes the memory of the partial sums out of the arena.
  void layout(Arena& arena, const AttentionParams& p, const BackwardPlan& plan) {
    const int64_t heads = plan.chunks * p.batch * p.num_heads;
    row_dquery = round_up(p.head_dim, kLanes<Lane>);
    row_relative = relative_row(p);
    if (plan.chunks > 1 && p.dquery.data != nullptr) dquery = arena.take<Lane>(heads * p.seqlen_q * row_dquery);
    if (p.drelative_bias.data != nullptr) drelative_bias = arena.take<Lane>(heads * row_relative);
  }
};

// The index of a head in the partial sums, whose first dimensions are [chunk][batch][head].
FA_INLINE int64_t head_index(const AttentionParams& p, int64_t chunk, int64_t b, int64_t h) {
  return (chunk * p.batch + b) * p.num_heads + h;
}

// What backward needs of each query besides the rows of query and dout: arrays [batch][head][seqlen_q, padded to
// vectors], or [head][row] for packed sequences, each of which begins at a whole vector. In a single pass, the scratch
// holds these arrays for one block of queries only.
template <class Lane>
struct RowStatistics {
  Lane* lse;         // +inf for rows that see no key or do not exist, so that their probs are zero
  Lane* correction;  // makes up for the rounding of lse: -log of the sum of exp(logits - lse) over the keys
  Lane* delta;       // rowsum(dout * out)
  Lane* dlse;        // the gradient by lse; stored apart from delta, because the difference of both would be rounded

  // Takes the memory of the four arrays, for `rows` queries each, out of the arena.
  void layout(Arena& arena, int64_t rows) {
    lse = arena.take<Lane>(rows);
    correction = arena.take<Lane>(rows);
    delta = arena.take<Lane>(rows);
    dlse = arena.take<Lane>(rows);
  }

  // The entries of all heads of the call.
  static int64_t rows(const AttentionParams& p) {
    if (p.cu_seqlens_q != nullptr) return p.num_heads * first_row(p, p.batch);
    return p.batch * p.num_heads * round_up(p.seqlen_q, kLanes<Lane>);
  }

  // The statistics of head (b, h), from query i on.
  RowStatistics at(const AttentionParams& p, int64_t b, int64_t h, int64_t i) const {
    const int64_t first = p.cu_seqlens_q != nullptr ? h * first_row(p, p.batch) + first_row(p, b)
                                                    : (b * p.num_heads + h) * round_up(p.seqlen_q, kLanes<Lane>);
    const int64_t row = first + i;
    return {lse + row, correction + row, delta + row, dlse + row};
  }

 private:
  // The entry of a head with which packed sequence b begins; that of number `batch` is behind the last one. From one
  // sequence to the next, there are length / n vectors at least, rounded down, and one more, which makes room for the
  // padding. With as many entries for each sequence as for the longest one, 60000 sequences of 2 rows and one of 8192
  // would take 63 GB.
  static int64_t first_row(const AttentionParams& p, int64_t b) {
    constexpr int64_t n = kLanes<Lane>;
    return ((int64_t{p.cu_seqlens_q[b]} - p.cu_seqlens_q[0]) / n + b) * n;
  }
};

// The memory in which one thread processes its work items.
template <class Policy>
struct BackwardScratch {
  using Lane = typename Policy::Lane;
  // The type of the factors that a sum over queries broadcasts: lanes, or bfloat16, of which two neighbours form a
  // lane.
  using Coefficient = std::conditional_t<Policy::kParts == 0, Lane, BFloat16>;

  KeyScratch<Policy> key;
  RowsToMultiply<Policy> value;  // the values of the block's keys
  RowsToSum<Policy> summed_key;  // the keys in the form that the sum over keys reads, which gives dquery
  Lane* dprobs;                  // value . dout [key of the block][stride], if AMX multiplies
  Lane* key_sums;                // the part of dkey or dvalue [key of the block][padded row], if AMX multiplies
  Lane* query;                   // query^T [lanes of head_dim][stride]
  Lane* dout;                    // dout^T [lanes of value_dim][stride]
  Lane* query_rows;              // [part][query or pair][head_dim, padded]; not used where memory holds lanes
  Lane* dout_rows;               // [part][query or pair of queries][value_dim, padded]
  Coefficient* probs;            // probs^T [part][key of the block][coefficient_stride], after dropout
  Coefficient* dscores;          // dscores^T [part][key of the block][coefficient_stride], of the scores before softcap
  Lane* dscore_pairs;  // dscores^T [part][pair of keys][stride]; the same memory as dscores if factors are lanes
  Lane* dbias;         // dscores^T [key of the block][stride], of the scores after softcap; null = nobody reads them
  Lane* dquery;        // dquery^T [head_dim, padded][stride]
  Lane* dquery_rows;   // [query of the heads of a kv head][head_dim, padded]; the sum over slabs, if plan.sums_dquery
  Lane* dkey;          // [key of the slab, and one spare row that nobody reads][head_dim, padded]
  Lane* dvalue;        // [key of the slab, and one spare row that nobody reads][value_dim, padded]
  Lane* out;           // out^T [lanes of value_dim][stride]; not with AMX
  RowStatistics<Lane> statistics;  // the statistics of one block of queries, in a single pass

  // The stride of probs and dscores in a block of queries. AMX reads 32 of them at once.
  static int64_t coefficient_stride(int64_t stride) { return Policy::kUsesAmx ? round_up(stride, 32) : stride; }

  // The elements of one part of probs or dscores.
  static int64_t coefficient_part(int64_t stride) {
    return round_up(kBlockRows, kLanes<Lane>) * coefficient_stride(stride);
  }

  // The lanes of one part of the rows of a block of queries, which are `row` lanes long.
  static int64_t query_row_part(int64_t stride, int64_t row) {
    return coefficient_stride(stride) / Policy::kFactorsPerLane * factor_stride<Policy>(row);
  }

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, const BackwardPlan& plan) {
    constexpr int n = kLanes<Lane>;
    const int head_dim = static_cast<int>(p.head_dim);
    const int value_dim = static_cast<int>(p.value_dim);
    const int64_t head_row = round_up(head_dim, n);
    const int64_t value_row = round_up(value_dim, n);
    const int64_t stride = largest_stride<Lane>(p);
    const int64_t rows = round_up(kBlockRows, n);
    const int64_t tile = rows * stride;
    const int64_t parts = Policy::kParts > 1 ? Policy::kParts : 1;
    const bool pairs = Policy::kParts > 0;
    const int64_t visits = group_size_of(p) * ((p.seqlen_q + kBlockQ - 1) / kBlockQ);
    key.layout(arena, p, visits);
    value.layout(arena, p, value_dim, visits);
    dprobs = arena.take<Lane>(Policy::kUsesAmx ? tile : 0);
    key_sums = arena.take<Lane>(Policy::kUsesAmx ? rows * (head_row > value_row ? head_row : value_row) : 0);
    if (pairs) summed_key.layout(arena, p, head_dim, visits);
    query = arena.take<Lane>(column_lanes<Policy>(head_dim, stride));
    dout = arena.take<Lane>(column_lanes<Policy>(value_dim, stride));
    query_rows = arena.take<Lane>(parts * query_row_part(stride, head_row));
    dout_rows = arena.take<Lane>(parts * query_row_part(stride, value_row));
    probs = arena.take<Coefficient>(parts * coefficient_part(stride));
    dscores = arena.take<Coefficient>(parts * coefficient_part(stride));
    dscore_pairs = pairs ? arena.take<Lane>(parts * part_lanes<Policy>(stride)) : reinterpret_cast<Lane*>(dscores);
    dbias = nullptr;
    const bool has_gradient =
        p.dbias.data != nullptr || p.dkey_bias.data != nullptr || p.drelative_bias.data != nullptr;
    if (has_gradient && !stores_dbias_pairs<Policy>(p)) {
      dbias = pairs || p.softcap > 0 ? arena.take<Lane>(tile) : reinterpret_cast<Lane*>(dscores);
    }
    dquery = arena.take<Lane>(head_row * stride);
    dquery_rows = arena.take<Lane>(plan.sums_dquery ? group_size_of(p) * p.seqlen_q * head_row : 0);
    dkey = arena.take<Lane>((plan.slab_keys + 1) * head_row);
    dvalue = arena.take<Lane>((plan.slab_keys + 1) * value_row);
    out = arena.take<Lane>(Policy::kUsesAmx ? 0 : column_lanes<Policy>(value_dim, stride));
    statistics.layout(arena, stride);
  }
};

// A matrix of elements T whose rows begin `stride` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

}  // namespace
}  // namespace fused_attn::cpu
