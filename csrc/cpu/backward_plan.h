// How backward divides its work among threads, and the layout of its scratch memory.
#pragma once
#include <type_traits>

#include "scores.h"

namespace fused_attn::cpu {
namespace {

// How the (batch, kv head) pairs and the keys of a call are divided into work items. An item is one group of pairs and
// one chunk of keys. Pairs that add to the same entries of the gradient of the bias form one group, because one thread
// must add them up in order. Where there are fewer groups than threads, the keys are divided into chunks as well.
struct BackwardPlan {
  bool join_batches;     // a group consists of all batch entries, because they share the gradient of the bias
  bool join_heads;       // a group consists of all kv heads, because they share the gradient of the bias
  int64_t groups;        // the number of groups
  int64_t chunks;        // the number of chunks, at least 1
  int64_t chunk_keys;    // the number of keys of a chunk; the last chunk may have fewer
  int64_t slab_keys;     // the number of keys of a slab; a chunk is processed slab by slab
  bool sums_dquery;      // dquery is summed over the slabs in the scratch, because the output has fewer bits than lanes
  bool visits_all_keys;  // every query sees every key
  bool is_single_pass;   // the second pass visits each row once, so it computes the row statistics itself
  bool is_decode;        // decode_backward.h computes the gradients
};

// Whether each score of a head has an entry of its own in the gradient of the dense bias.
FA_INLINE bool has_entries_of_scores(const TensorView& dbias) { return dbias.stride_row != 0 && dbias.stride_col != 0; }

// Whether the gradient of the dense bias is stored from pairs of dscores, which are rounded to bfloat16 for the product
// that gives dquery. Then no tile of dscores is needed.
template <class Policy>
FA_INLINE bool stores_dbias_pairs(const AttentionParams& p) {
  if (Policy::kPerLane != 2 || p.dbias.data == nullptr || p.dbias_dtype != p.dtype) return false;
  return !(p.softcap > 0) && p.dkey_bias.data == nullptr && p.drelative_bias.data == nullptr;
}

// Whether every query sees every key.
FA_INLINE bool sees_all_keys(const AttentionParams& p) {
  const bool has_masks = has_score_mask(p) || p.key_padding.data != nullptr;
  const bool has_lengths = p.cu_seqlens_q != nullptr || p.key_lengths != nullptr;
  if (has_masks || has_lengths) return false;
  return band_of(p, sequence_of(p, 0)).all_visible(0, p.seqlen_q - 1, 0, p.seqlen_k - 1);
}

// Whether decode_backward.h computes this call, if no head has to be shared among threads. With AVX-512, calls of 64
// heads take 0.5 (4 x 4) and 0.64 (8 x 8) of the time of backward.h (float32, head dim 64), with 8 queries and 1024
// keys 0.93 (float32) and 0.82 (bfloat16).
template <class Policy>
bool has_few_queries(const AttentionParams& p) {
  // A softmax over more keys, dropout, and masks that differ among the heads of a group are left to backward.h.
  const bool own_masks = has_score_mask_of_heads(p) && p.num_heads != p.num_kv_heads;
  if (p.is_part || p.has_dropout || own_masks) return false;
  // The probs and dscores of a head group must not take more memory than its keys and values.
  if (2 * p.num_heads * p.seqlen_q > p.num_kv_heads * (p.head_dim + p.value_dim)) return false;
  // Compares the instructions for one key. backward.h needs a multiply-add for each lane of the row in three products,
  // and as much for the transposition of queries and gradients as for 8 keys. decode_backward.h needs about two
  // instructions for each query and each vector of the row.
  constexpr int64_t n = kLanes<typename Policy::Lane>;
  const int64_t vectors = 2 * (round_up(p.head_dim, n) / n) + round_up(p.value_dim, n) / n;
  // Beside AMX, backward.h is faster, but less exact for few queries: its delta is that of the rounded output.
  int64_t lanes = (2 * p.head_dim + p.value_dim) / (Policy::kUsesAmx ? 1 : Policy::kPerLane);
  // decode_backward.h reads the keys of a head a second time. If they are no longer in the cache, 8 queries and 4096
  // keys (float32, head dim 64) take 1.1 of the time. backward.h converts 16-bit rows, which takes longer.
  const int64_t head_bytes =
      p.seqlen_k * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(typename Policy::Lane));
  if (kSame<typename Policy::Storage, typename Policy::Lane> && head_bytes > kCachedBytes) lanes -= p.head_dim / 2;
  return 2 * p.seqlen_q * vectors * p.seqlen_k <= lanes * (p.seqlen_k + 8);
}

// Chooses the numbers of groups, chunks and slabs for one call.
template <class Policy>
BackwardPlan plan_backward(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  BackwardPlan plan;
  const bool has_dbias = p.dbias.data != nullptr;
  plan.join_batches = has_dbias && p.dbias.stride_batch == 0 && p.batch > 1;
  plan.join_heads = ((has_dbias && p.dbias.stride_head == 0) || p.dkey_bias.data != nullptr) && p.num_heads > 1;
  plan.groups = (plan.join_batches ? 1 : p.batch) * (plan.join_heads ? 1 : p.num_kv_heads);
  // The plan aims at two items for each thread, because the chunks of a causal problem take unequal time. A chunk has
  // at least 128 keys. So the order in which dquery is summed depends on the number of threads. With as many chunks as
  // 16 threads need, one thread took 1.04 to 1.13 of the time for 8 heads with 256 to 1024 queries and keys.
  const int64_t wanted = plan.groups > 0 ? (2 * p.num_threads + plan.groups - 1) / plan.groups : 1;
  const int64_t possible = (p.seqlen_k + 127) / 128;
  // Every chunk has a partial dquery of its own. Without a bound on their size, a large problem would need several
  // times the memory of its tensors.
  constexpr int64_t kPartialBytes = int64_t{256} << 20;
  const int64_t dquery_bytes = p.batch * p.num_heads * p.seqlen_q * p.head_dim * static_cast<int64_t>(sizeof(double));
  const int64_t affordable = dquery_bytes > 0 ? kPartialBytes / dquery_bytes : possible;
  plan.chunks = wanted < possible ? wanted : possible;
  if (plan.chunks > affordable) plan.chunks = affordable;
  // If all keys share an entry of the bias (stride 0), all chunks would add to that entry.
  if (plan.chunks < 1 || (has_dbias && p.dbias.stride_col == 0)) plan.chunks = 1;
  plan.chunk_keys = round_up((p.seqlen_k + plan.chunks - 1) / plan.chunks, 64);
  if (plan.chunk_keys > 0) plan.chunks = (p.seqlen_k + plan.chunk_keys - 1) / plan.chunk_keys;

  // dkey and dvalue of a slab fill 512 KiB, half of the second-level cache of most cores. With 1 MiB, calls of head dim
  // 512 took 0.98 of the time on a Xeon whose cores have 2 MiB.
  constexpr int64_t kSlabBytes = int64_t{512} << 10;
  const int64_t head_row = round_up(p.head_dim, kLanes<Lane>);
  const int64_t key_bytes = (head_row + round_up(p.value_dim, kLanes<Lane>)) * static_cast<int64_t>(sizeof(Lane));
  plan.slab_keys = key_bytes > 0 ? kSlabBytes / key_bytes / 64 * 64 : plan.chunk_keys;
  // The sum of dquery over slabs needs the precision of lanes. If the output has a smaller type, the sum needs scratch
  // memory. In return, slabs save scratch memory: it holds dkey and dvalue of one slab only, not of the whole chunk.
  // The plan uses slabs only if they save at least as much as they need.
  plan.sums_dquery = !kSame<typename Policy::Storage, Lane> && plan.chunks == 1 && p.dquery.data != nullptr;
  const int64_t sums_bytes = group_size_of(p) * p.seqlen_q * head_row * static_cast<int64_t>(sizeof(Lane));
  const bool is_worth_it = !plan.sums_dquery || sums_bytes <= (plan.chunk_keys - plan.slab_keys) * key_bytes;
  if (plan.slab_keys >= plan.chunk_keys || !is_worth_it) {
    plan.slab_keys = plan.chunk_keys;
    plan.sums_dquery = false;
  }
  plan.visits_all_keys = sees_all_keys(p);
  plan.is_single_pass = plan.chunks <= 1 && plan.slab_keys == plan.chunk_keys && p.dsinks.data == nullptr;
  plan.is_decode = has_few_queries<Policy>(p) && (plan.chunks <= 1 || plan.groups >= p.num_threads);
  if (plan.is_decode) {
    plan.chunks = 1;
    plan.chunk_keys = p.seqlen_k;
    plan.is_single_pass = p.dsinks.data == nullptr;
  }
  return plan;
}

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
// vectors]. In a single pass, the scratch holds these arrays for one block of queries only.
template <class Lane>
struct RowStatistics {
  Lane* lse;         // +inf for rows that see no key or do not exist, so that their probs are zero
  Lane* correction;  // makes up for the rounding of lse: -log2 of the sum of exp(scores - lse) over the keys
  Lane* delta;       // rowsum(dout * out)
  Lane* dlse;        // the gradient by lse; stored apart from delta, because the difference of both would be rounded

  // Takes the memory of the four arrays, for `rows` queries each, out of the arena.
  void layout(Arena& arena, int64_t rows) {
    lse = arena.take<Lane>(rows);
    correction = arena.take<Lane>(rows);
    delta = arena.take<Lane>(rows);
    dlse = arena.take<Lane>(rows);
  }

  // Entries of one head: its queries, padded to whole vectors.
  static int64_t rows_of_head(const AttentionParams& p) { return round_up(p.seqlen_q, kLanes<Lane>); }

  // The statistics of head (b, h), from query i on.
  RowStatistics at(const AttentionParams& p, int64_t b, int64_t h, int64_t i) const {
    const int64_t row = (b * p.num_heads + h) * rows_of_head(p) + i;
    return {lse + row, correction + row, delta + row, dlse + row};
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
