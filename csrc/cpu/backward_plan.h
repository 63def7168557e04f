// How backward cuts its work, and the memory that it works in.
#pragma once
#include <type_traits>

#include "scores.h"

namespace fused_attn::cpu {
namespace {

// Heads whose bias gradient is summed into the same slice form one group. One thread visits them in order. If there are
// too few groups for the threads, the keys are cut into chunks as well.
struct BackwardPlan {
  bool join_batches;  // a group holds all batch entries
  bool join_heads;    // a group holds all kv heads
  int64_t groups;
  int64_t chunks;
  int64_t chunk_keys;
  int64_t slab_keys;
  bool sums_dquery;     // dquery is summed over the slabs in the scratch, because the output cannot hold lanes
  bool is_single_pass;  // each row is visited once, and nobody needs its statistics later
};

template <class Policy>
BackwardPlan plan_backward(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  BackwardPlan plan;
  const bool has_dbias = p.dbias.data != nullptr;
  plan.join_batches = has_dbias && p.dbias.stride_batch == 0 && p.batch > 1;
  plan.join_heads = has_dbias && p.dbias.stride_head == 0 && p.num_heads > 1;
  plan.groups = (plan.join_batches ? 1 : p.batch) * (plan.join_heads ? 1 : p.num_kv_heads);
  // There should be twice as many items as threads, so that the uneven chunks of a causal problem balance. A chunk has
  // at least 128 keys.
  const int64_t wanted = plan.groups > 0 ? (2 * p.num_threads + plan.groups - 1) / plan.groups : 1;
  const int64_t possible = (p.seqlen_k + 127) / 128;
  // Every chunk has a dquery of its own. Without a bound, a large problem would need several times its own memory.
  constexpr int64_t kPartialBytes = int64_t{256} << 20;
  const int64_t dquery_bytes = p.batch * p.num_heads * p.seqlen_q * p.head_dim * static_cast<int64_t>(sizeof(double));
  const int64_t affordable = dquery_bytes > 0 ? kPartialBytes / dquery_bytes : possible;
  plan.chunks = wanted < possible ? wanted : possible;
  if (plan.chunks > affordable) plan.chunks = affordable;
  if (plan.chunks < 1 || (has_dbias && p.dbias.stride_col == 0)) plan.chunks = 1;
  plan.chunk_keys = round_up((p.seqlen_k + plan.chunks - 1) / plan.chunks, 64);
  if (plan.chunk_keys > 0) plan.chunks = (p.seqlen_k + plan.chunk_keys - 1) / plan.chunk_keys;

  // dkey and dvalue of a slab take half of the second-level cache that most cores have.
  constexpr int64_t kSlabBytes = int64_t{512} << 10;
  const int64_t head_row = round_up(p.head_dim, kLanes<Lane>);
  const int64_t key_bytes = (head_row + round_up(p.value_dim, kLanes<Lane>)) * static_cast<int64_t>(sizeof(Lane));
  plan.slab_keys = key_bytes > 0 ? kSlabBytes / key_bytes / 64 * 64 : plan.chunk_keys;
  // Sums over slabs need dquery in lanes. If the output has another type, this costs scratch: never more than slabs
  // save.
  plan.sums_dquery = !kSame<typename Policy::Storage, Lane> && plan.chunks == 1 && p.dquery.data != nullptr;
  const int64_t sums_bytes = p.num_heads / p.num_kv_heads * p.seqlen_q * head_row * static_cast<int64_t>(sizeof(Lane));
  const bool is_worth_it = !plan.sums_dquery || sums_bytes <= (plan.chunk_keys - plan.slab_keys) * key_bytes;
  if (plan.slab_keys >= plan.chunk_keys || !is_worth_it) {
    plan.slab_keys = plan.chunk_keys;
    plan.sums_dquery = false;
  }
  plan.is_single_pass = plan.chunks <= 1 && plan.slab_keys == plan.chunk_keys && p.dsinks.data == nullptr;
  return plan;
}

// Partial sums. A second pass adds them up in a fixed order. Results depend on the number of chunks, and so on the
// number of threads, but never on which thread did what.
template <class Lane>
struct BackwardPartials {
  Lane* dquery = nullptr;          // [chunk][batch][head][seqlen_q][row_dquery], if there is more than one chunk
  Lane* drelative_bias = nullptr;  // [chunk][batch][head][relative_row], reversed like RelativeBias
  int64_t row_dquery = 0;
  int64_t row_relative = 0;

  void layout(Arena& arena, const AttentionParams& p, const BackwardPlan& plan) {
    const int64_t heads = plan.chunks * p.batch * p.num_heads;
    row_dquery = round_up(p.head_dim, kLanes<Lane>);
    row_relative = relative_row(p);
    if (plan.chunks > 1 && p.dquery.data != nullptr) dquery = arena.take<Lane>(heads * p.seqlen_q * row_dquery);
    if (p.drelative_bias.data != nullptr) drelative_bias = arena.take<Lane>(heads * row_relative);
  }
};

FA_INLINE int64_t head_index(const AttentionParams& p, int64_t chunk, int64_t b, int64_t h) {
  return (chunk * p.batch + b) * p.num_heads + h;
}

// What the tiles need of the rows: [batch][head][seqlen_q, padded to vectors]. An item's scratch has them for one
// block.
template <class Lane>
struct RowStatistics {
  Lane* lse;         // +inf for rows that are empty or do not exist: their probs are then zero
  Lane* correction;  // -log2 of the sum that exp(scores - lse) really gives
  Lane* delta;       // rowsum(dout * out)
  Lane* dlse;        // the gradient by the lse; delta - dlse would be rounded, so both are stored

  void layout(Arena& arena, int64_t rows) {
    lse = arena.take<Lane>(rows);
    correction = arena.take<Lane>(rows);
    delta = arena.take<Lane>(rows);
    dlse = arena.take<Lane>(rows);
  }

  static int64_t rows_of_head(const AttentionParams& p) { return round_up(p.seqlen_q, kLanes<Lane>); }

  // The statistics of the queries from `i` on.
  RowStatistics at(const AttentionParams& p, int64_t b, int64_t h, int64_t i) const {
    const int64_t row = (b * p.num_heads + h) * rows_of_head(p) + i;
    return {lse + row, correction + row, delta + row, dlse + row};
  }
};

template <class Policy>
struct BackwardScratch {
  using Lane = typename Policy::Lane;
  // The type of what a product over queries broadcasts: whole lanes, or bfloat16, of which two neighbours form a lane.
  using Coefficient = std::conditional_t<Policy::kPerLane == 1, Lane, BFloat16>;

  KeyScratch<Policy> key;
  const char** value_rows;
  Lane* value_lanes;
  SummedRows<Policy> summed_key;
  Lane* query;           // columns [head lanes][kBlockQ]
  Lane* dout;            // columns [value lanes][kBlockQ]
  Lane* query_rows;      // [query (pair)][head_dim, padded]; unused where memory already holds such rows
  Lane* dout_rows;       // [query (pair)][value_dim, padded]
  Coefficient* probs;    // probs^T [key of the block][kBlockQ], after dropout
  Coefficient* dscores;  // dscores^T [key of the block][kBlockQ], of the scores before softcap
  Lane* dscore_pairs;    // dscores^T in pairs of keys [pair][kBlockQ]; dscores itself when lanes hold single elements
  Lane* dbias;           // dscores^T [key of the block][kBlockQ], of the scores after softcap
  Lane* dquery;          // dquery^T [head_dim, padded][kBlockQ]
  Lane*
      dquery_rows;  // [query of the item's heads][head_dim, padded], where dquery is summed if memory cannot hold lanes
  Lane* dkey;       // [key of the slab, and one row that absorbs the padding of a tile][head_dim, padded]
  Lane* dvalue;     // [key of the slab + 1][value_dim, padded]
  Lane* out;        // columns [value lanes][kBlockQ]
  RowStatistics<Lane> statistics;  // the statistics of the block, in a single pass

  void layout(Arena& arena, const AttentionParams& p, const BackwardPlan& plan) {
    constexpr int n = kLanes<Lane>;
    const int head_dim = static_cast<int>(p.head_dim);
    const int value_dim = static_cast<int>(p.value_dim);
    const int64_t head_row = round_up(head_dim, n);
    const int64_t value_row = round_up(value_dim, n);
    const int64_t rows = KeyScratch<Policy>::kRows;
    const int64_t tile = round_up(rows, n) * kBlockQ;
    const bool pairs = Policy::kPerLane == 2;
    key.layout(arena, p);
    value_rows = arena.take<const char*>(rows);
    value_lanes = arena.take<Lane>(Policy::kConverts || value_dim % Policy::kPerLane != 0 ? rows * value_row : 0);
    if (pairs) {
      summed_key.layout(arena, p, head_dim, p.num_heads / p.num_kv_heads * ((p.seqlen_q + kBlockQ - 1) / kBlockQ));
    }
    query = arena.take<Lane>(round_up(Policy::lanes_for(head_dim), n) * kBlockQ);
    dout = arena.take<Lane>(round_up(Policy::lanes_for(value_dim), n) * kBlockQ);
    query_rows = arena.take<Lane>(kBlockQ * head_row);
    dout_rows = arena.take<Lane>(kBlockQ * value_row);
    probs = arena.take<Coefficient>(tile);
    dscores = arena.take<Coefficient>(tile);
    dscore_pairs = pairs ? arena.take<Lane>(tile / 2) : reinterpret_cast<Lane*>(dscores);
    dbias = nullptr;
    if (p.dbias.data != nullptr || p.drelative_bias.data != nullptr) {
      dbias = pairs || p.softcap > 0 ? arena.take<Lane>(tile) : reinterpret_cast<Lane*>(dscores);
    }
    dquery = arena.take<Lane>(head_row * kBlockQ);
    dquery_rows = arena.take<Lane>(plan.sums_dquery ? p.num_heads / p.num_kv_heads * p.seqlen_q * head_row : 0);
    dkey = arena.take<Lane>((plan.slab_keys + 1) * head_row);
    dvalue = arena.take<Lane>((plan.slab_keys + 1) * value_row);
    out = arena.take<Lane>(round_up(Policy::lanes_for(value_dim), n) * kBlockQ);
    statistics.layout(arena, kBlockQ);
  }
};

// Rows that lie `stride` elements of T apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

}  // namespace
}  // namespace fused_attn::cpu
