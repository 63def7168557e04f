// The backward kernel. First the statistics of every row: delta = rowsum(dO * out), and what its lse must be corrected by
// (where each row is visited only once, when it is visited). A work item is a group of (batch, kv head) pairs and a chunk
// of keys. It goes through its keys in slabs, whose dK and dV stay in the cache, and for each slab through the query blocks
// of its heads and the slab's blocks of live keys:
//
//   P^T[key][query]   = exp(S - lse)                      S as in forward (scores.h)
//   dS^T[key][query]  = P * (V[key] . dO^T - delta + dlse)
//   dV[key][:]       += P^T[key] . dO                     lanes = value dim
//   dK[key][:]       += dS^T[key] . Q                     lanes = head dim
//   dQ^T[d][query]   += K^T[d] . dS^T                     (outer_block)
//
// dK and dV are summed in the item's scratch, dQ is added up over the slabs. Nothing is shared between items but dQ, of
// which each chunk writes its own partial sum: the results do not depend on the order of the items, and no atomics are
// needed.
#pragma once
#include "forward.h"
#include "kernels.h"
#include "parallel.h"
#include "scores.h"

namespace fused_attn::cpu {
namespace {

// How the work is cut. Heads whose bias gradient is summed into the same slice form one group, which one thread visits in
// order; when there are too few groups to occupy the threads, the keys are cut into chunks as well.
struct BackwardPlan {
  bool join_batches;  // a group holds all batch entries
  bool join_heads;    // a group holds all kv heads
  int64_t groups;
  int64_t chunks;
  int64_t chunk_keys;
  int64_t slab_keys;
  bool sums_dquery;     // over the slabs in scratch: memory cannot hold lanes
  bool is_single_pass;  // each row is visited once, and nobody needs its statistics later
};

template <class P>
BackwardPlan plan_backward(const AttentionParams& p) {
  using Lane = typename P::Lane;
  BackwardPlan plan;
  const bool has_dbias = p.dbias.data != nullptr;
  plan.join_batches = has_dbias && p.dbias.stride_batch == 0 && p.batch > 1;
  plan.join_heads = has_dbias && p.dbias.stride_head == 0 && p.num_heads > 1;
  plan.groups = (plan.join_batches ? 1 : p.batch) * (plan.join_heads ? 1 : p.num_kv_heads);
  // Twice as many items as threads, so that the uneven chunks of a causal problem balance; at least 128 keys a chunk.
  const int64_t wanted = plan.groups > 0 ? (2 * p.num_threads + plan.groups - 1) / plan.groups : 1;
  const int64_t possible = (p.seqlen_k + 127) / 128;
  // Every chunk has a dq of its own, so that without a bound a large problem would need several times its own memory.
  constexpr int64_t kPartialBytes = int64_t{256} << 20;
  const int64_t dquery_bytes = p.batch * p.num_heads * p.seqlen_q * p.head_dim * static_cast<int64_t>(sizeof(double));
  const int64_t affordable = dquery_bytes > 0 ? kPartialBytes / dquery_bytes : possible;
  plan.chunks = wanted < possible ? wanted : possible;
  if (plan.chunks > affordable) plan.chunks = affordable;
  if (plan.chunks < 1 || (has_dbias && p.dbias.stride_col == 0)) plan.chunks = 1;
  plan.chunk_keys = round_up((p.seqlen_k + plan.chunks - 1) / plan.chunks, 64);
  if (plan.chunk_keys > 0) plan.chunks = (p.seqlen_k + plan.chunk_keys - 1) / plan.chunk_keys;

  // dK and dV of a slab take half of the second-level cache of most cores.
  constexpr int64_t kSlabBytes = int64_t{512} << 10;
  const int64_t head_row = round_up(p.head_dim, kLanes<Lane>);
  const int64_t key_bytes = (head_row + round_up(p.value_dim, kLanes<Lane>)) * static_cast<int64_t>(sizeof(Lane));
  plan.slab_keys = key_bytes > 0 ? kSlabBytes / key_bytes / 64 * 64 : plan.chunk_keys;
  // Sums over slabs need dQ in lanes. Where memory holds another type that costs scratch: never more than slabs save.
  plan.sums_dquery = !kSame<typename P::Storage, Lane> && plan.chunks == 1 && p.dquery.data != nullptr;
  const int64_t sums_bytes = p.num_heads / p.num_kv_heads * p.seqlen_q * head_row * static_cast<int64_t>(sizeof(Lane));
  const bool is_worth_it = !plan.sums_dquery || sums_bytes <= (plan.chunk_keys - plan.slab_keys) * key_bytes;
  if (plan.slab_keys >= plan.chunk_keys || !is_worth_it) {
    plan.slab_keys = plan.chunk_keys;
    plan.sums_dquery = false;
  }
  plan.is_single_pass = plan.chunks <= 1 && plan.slab_keys == plan.chunk_keys && p.dsinks.data == nullptr;
  return plan;
}

// Partial sums that more than one item adds to; a second pass sums them in a fixed order. Results depend on the number of
// threads through the number of chunks, but never on which thread did what.
template <class Lane>
struct BackwardPartials {
  Lane* dquery = nullptr;          // [chunk][batch][head][seqlen_q][row_dquery], when there is more than one chunk
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

// What the tiles need of the rows: [batch][head][seqlen_q, padded to vectors], or of one block in an item's scratch.
template <class Lane>
struct RowStatistics {
  Lane* lse;         // +inf, which makes P zero, for rows that see nothing or do not exist
  Lane* correction;  // -log2 of the sum that exp(S - lse) really gives
  Lane* delta;       // rowsum(dO * out)
  Lane* dlse;        // not taken from delta: that difference would round what the sum of both keeps

  void layout(Arena& arena, int64_t rows) {
    lse = arena.take<Lane>(rows);
    correction = arena.take<Lane>(rows);
    delta = arena.take<Lane>(rows);
    dlse = arena.take<Lane>(rows);
  }

  static int64_t rows_of_head(const AttentionParams& p) { return round_up(p.seqlen_q, kLanes<Lane>); }

  // Those of the queries from `i` on.
  RowStatistics at(const AttentionParams& p, int64_t b, int64_t h, int64_t i) const {
    const int64_t row = (b * p.num_heads + h) * rows_of_head(p) + i;
    return {lse + row, correction + row, delta + row, dlse + row};
  }
};

template <class P>
struct BackwardScratch {
  using Lane = typename P::Lane;
  // What a product over queries broadcasts: whole lanes, or bfloat16 whose neighbours form a lane.
  using Weight = std::conditional_t<P::kPerLane == 1, Lane, BFloat16>;

  KeyScratch<P> key;
  const char** value_rows;
  Lane* value_lanes;
  SummedRows<P> summed_key;
  Lane* query;         // columns [head lanes][kBlockQ]
  Lane* dout;          // columns [value lanes][kBlockQ]
  Lane* query_rows;    // [query (pair)][head_dim, padded]; unused where memory already holds such rows
  Lane* dout_rows;     // [query (pair)][value_dim, padded]
  Weight* weights;     // P^T [key of the block][kBlockQ], after dropout
  Weight* dscores;     // dS^T [key of the block][kBlockQ], of the scores before softcap
  Lane* dscore_pairs;  // dS^T in pairs of keys [pair][kBlockQ]; dscores itself when lanes hold single elements
  Lane* dbias;         // dS^T [key of the block][kBlockQ], of the scores after softcap
  Lane* dquery;        // dQ^T [head_dim, padded][kBlockQ]
  Lane* dquery_rows;   // [query of the item's heads][head_dim, padded], where dQ is summed if memory cannot hold lanes
  Lane* dkey;          // [key of the slab, and one row that absorbs the padding of a tile][head_dim, padded]
  Lane* dvalue;        // [key of the slab + 1][value_dim, padded]
  Lane* out;           // columns [value lanes][kBlockQ]
  RowStatistics<Lane> statistics;  // of the block, in a single pass

  void layout(Arena& arena, const AttentionParams& p, const BackwardPlan& plan) {
    constexpr int n = kLanes<Lane>;
    const int head_dim = static_cast<int>(p.head_dim);
    const int value_dim = static_cast<int>(p.value_dim);
    const int64_t head_row = round_up(head_dim, n);
    const int64_t value_row = round_up(value_dim, n);
    const int64_t rows = KeyScratch<P>::kRows;
    const int64_t tile = round_up(rows, n) * kBlockQ;
    const bool pairs = P::kPerLane == 2;
    key.layout(arena, p);
    value_rows = arena.take<const char*>(rows);
    value_lanes = arena.take<Lane>(P::kConverts || value_dim % P::kPerLane != 0 ? rows * value_row : 0);
    if (pairs) {
      summed_key.layout(arena, p, head_dim, p.num_heads / p.num_kv_heads * ((p.seqlen_q + kBlockQ - 1) / kBlockQ));
    }
    query = arena.take<Lane>(round_up(P::lanes_for(head_dim), n) * kBlockQ);
    dout = arena.take<Lane>(round_up(P::lanes_for(value_dim), n) * kBlockQ);
    query_rows = arena.take<Lane>(kBlockQ * head_row);
    dout_rows = arena.take<Lane>(kBlockQ * value_row);
    weights = arena.take<Weight>(tile);
    dscores = arena.take<Weight>(tile);
    dscore_pairs = pairs ? arena.take<Lane>(tile / 2) : reinterpret_cast<Lane*>(dscores);
    dbias = nullptr;
    if (p.dbias.data != nullptr || p.drelative_bias.data != nullptr) {
      dbias = pairs || p.softcap > 0 ? arena.take<Lane>(tile) : reinterpret_cast<Lane*>(dscores);
    }
    dquery = arena.take<Lane>(head_row * kBlockQ);
    dquery_rows = arena.take<Lane>(plan.sums_dquery ? p.num_heads / p.num_kv_heads * p.seqlen_q * head_row : 0);
    dkey = arena.take<Lane>((plan.slab_keys + 1) * head_row);
    dvalue = arena.take<Lane>((plan.slab_keys + 1) * value_row);
    out = arena.take<Lane>(round_up(P::lanes_for(value_dim), n) * kBlockQ);
    statistics.layout(arena, kBlockQ);
  }
};

// Rows `stride` elements of T apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// Rows of `dim` elements for a product over queries: rows of lanes, or of query pairs.
template <class P>
FA_NOINLINE Rows<const typename P::Lane> find_query_rows(const typename P::Storage* base, int64_t stride_row, int nq,
                                                         int dim, typename P::Lane* scratch) {
  using Lane = typename P::Lane;
  constexpr int n = kLanes<Lane>;
  const int64_t row = round_up(dim, n);
  if constexpr (P::kPerLane == 2) {
#if defined(__AVX512BF16__)
    const auto source = [&](int q) { return reinterpret_cast<const uint16_t*>(base + q * stride_row); };
    for (int q = 0; q < nq; q += 2) {
      float* pairs = scratch + q / 2 * row;
      interleave_rows(source(q), q + 1 < nq ? source(q + 1) : nullptr, dim, pairs);
      for (int64_t d = dim; d < row; ++d) pairs[d] = 0;
    }
#endif
    return {scratch, row};
  } else {
    if constexpr (!P::kConverts) {
      if (dim % n == 0) return {base, stride_row};
    }
    for (int q = 0; q < nq; ++q) {
      for (int d = 0; d < dim; d += n) {
        store<Lane>(scratch + q * row + d, load_lanes<P>(base + q * stride_row, d, dim));
      }
    }
    return {scratch, row};
  }
}

// Sets the statistics of a block, whose dO lies packed in the scratch, but for the corrections, which stay zero. Returns
// whether some lse is too large to be exact enough for P.
template <class P>
FA_NOINLINE bool load_row_statistics(const AttentionParams& p, const Sequence& seq, int64_t b, int64_t h,
                                     int64_t q_begin, int nq, const BackwardScratch<P>& s,
                                     const RowStatistics<typename P::Lane>& rows) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  constexpr int n = kLanes<Lane>;
  // An lse of 16 is rounded by half of 2e-6, and P with it; half types have no use for that accuracy.
  const Lane exact_lse = kSame<Storage, Lane> ? Lane(16) : Lane(1024);
  const Lane infinity = FloatTraits<Lane>::kInfinity;
  const int64_t row = seq.q_offset + q_begin;
  const int value_dim = static_cast<int>(p.value_dim);
  const Lane* lse_rows = row_of<const Lane>(p.lse, b, h, row);
  const Lane* dlse_rows = p.dlse.data != nullptr ? row_of<const Lane>(p.dlse, b, h, row) : nullptr;

  // delta is summed in the order of V . dO^T: where a row sees one key and nothing is dropped, the two must cancel exactly.
  pack_columns<P, kBlockQ>(row_of<const Storage>(p.out, b, h, row), p.out.stride_row, nq, value_dim, s.out);
  for (int q = 0; q < nq; q += n) {
    Vec<Lane> delta = {};
    for (int d = 0; d < P::lanes_for(value_dim); ++d) {
      delta = multiply_add<P>(load<Lane>(s.out + d * kBlockQ + q), load<Lane>(s.dout + d * kBlockQ + q), delta);
    }
    store<Lane>(rows.delta + q, delta);
  }
  bool inexact = false;
  for (int q = 0; q < round_up(nq, n); ++q) {
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

// exp(S - lse) as an exponent of 2. Whatever a large lse makes of its rounding, `correction` has been measured with it.
template <class P>
FA_INLINE Vec<typename P::Lane> lse_exponent(Vec<typename P::Lane> score, typename P::Lane to_logits,
                                             Vec<typename P::Lane> lse) {
  return (score * to_logits - lse) * typename P::Lane(kLog2E);
}

// P and dS of one tile of keys.
template <class P, int kColumns, bool kPlain>
FA_NOINLINE void backward_tile(const ScoreInputs<P>& in, int k, int v, bool partial, bool dropout,
                               const BackwardScratch<P>& s, const RowStatistics<typename P::Lane>& rows,
                               int value_depth, typename P::Lane dropout_scale) {
  using Lane = typename P::Lane;
  constexpr int n = kLanes<Lane>;
  const int64_t offset = k * kBlockQ + v * n;
  alignas(kVectorBytes) Lane derivative[kPlain ? 1 : kTileKeys * kColumns * n];
  alignas(kVectorBytes) Lane probabilities[kTileKeys * kColumns * n];
  const auto kept = [&](int r, int c, Vec<Lane> x) {
    if (kPlain || !dropout) return x;
    return keep_where<Lane>(*reinterpret_cast<const IntVec<Lane>*>(s.key.keep + offset + r * kBlockQ + c * n), x);
  };

  Vec<Lane> acc[kTileKeys][kColumns];
  compute_scores<P, kColumns, kPlain>(in, k, v, partial, derivative, acc);
  const Lane to_logits = in.to_logits();
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> lse = load<Lane>(rows.lse + (v + c) * n);
    const Vec<Lane> correction = load<Lane>(rows.correction + (v + c) * n);
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      Vec<Lane> x = probability<P>(lse_exponent<P>(acc[r][c], to_logits, lse) + correction);
      // Where the lse is NaN, a hidden key must still get none of it.
      if (!kPlain) x = select<Lane>(acc[r][c] == -FloatTraits<Lane>::kInfinity, Vec<Lane>{}, x);
      store<Lane>(probabilities + (r * kColumns + c) * n, x);
      store_as<Lane>(s.weights + offset + r * kBlockQ + c * n, kept(r, c, x));
    }
  }

  dot_tile<P, kTileKeys, kColumns>(s.value_rows + k, s.dout + v * n, kBlockQ, value_depth, acc);
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> delta = load<Lane>(rows.delta + (v + c) * n);
    const Vec<Lane> dlse = load<Lane>(rows.dlse + (v + c) * n);
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      const Vec<Lane> probability = load<Lane>(probabilities + (r * kColumns + c) * n);
      Vec<Lane> x = acc[r][c];
      if (!kPlain && dropout) x = kept(r, c, x * dropout_scale);
      x = probability * (x - delta + dlse);
      if constexpr (!kPlain) {
        x = select<Lane>(probability == 0, Vec<Lane>{}, x);  // 0 * NaN of a row that the query does not see
        if (s.dbias != nullptr) store<Lane>(s.dbias + offset + r * kBlockQ + c * n, x);
        if (in.softcap > 0) x *= load<Lane>(derivative + (r * kColumns + c) * n);
      }
      acc[r][c] = x;
      if constexpr (P::kPerLane == 1) store<Lane>(s.dscore_pairs + offset + r * kBlockQ + c * n, x);
    }
#if defined(__AVX512BF16__)
    if constexpr (P::kPerLane == 2) {
      FA_UNROLL
      for (int r = 0; r < kTileKeys; r += 2) {
        store_as<Lane>(s.dscores + offset + r * kBlockQ + c * n, acc[r][c]);
        store_as<Lane>(s.dscores + offset + (r + 1) * kBlockQ + c * n, acc[r + 1][c]);
        store<Lane>(s.dscore_pairs + (k + r) / 2 * kBlockQ + (v + c) * n, round_to_pairs(acc[r][c], acc[r + 1][c]));
      }
    }
#endif
  }
}

// targets[r][d] += sum over queries of weights[r][q] * rows[q][d], for the kTileKeys rows of a tile.
template <class P, int kColumns>
FA_NOINLINE void query_product(const char* const* weights, const typename P::Lane* rows, int64_t stride, int depth,
                               typename P::Lane* const* targets, int d) {
  using Lane = typename P::Lane;
  constexpr int n = kLanes<Lane>;
  Vec<Lane> acc[kTileKeys][kColumns];
  dot_tile<P, kTileKeys, kColumns>(weights, rows + d, stride, depth, acc);
  FA_UNROLL
  for (int r = 0; r < kTileKeys; ++r) {
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      Lane* p = targets[r] + d + c * n;
      store<Lane>(p, load<Lane>(p) + acc[r][c]);
    }
  }
}

// The products over the queries [range.begin, range.end) of one tile: the rows of dK or dV of its keys.
template <class P>
FA_INLINE void accumulate_keys(const KeyBlock& keys, int k, int64_t slab_begin, int64_t absorbing_row,
                               VectorRange range, int nq, const typename BackwardScratch<P>::Weight* weights,
                               Rows<const typename P::Lane> rows, int dim, typename P::Lane* target) {
  using Lane = typename P::Lane;
  constexpr int n = kLanes<Lane>;
  const int q_begin = range.begin * n;
  const int q_end = range.end * n < nq ? range.end * n : nq;
  const int depth = P::lanes_for(q_end - q_begin);
  const int64_t row = round_up(dim, n);
  const char* weight_rows[kTileKeys];
  Lane* targets[kTileKeys];
  for (int r = 0; r < kTileKeys; ++r) {
    weight_rows[r] = reinterpret_cast<const char*>(weights + (k + r) * kBlockQ + q_begin);
    targets[r] = target + (k + r < keys.count ? keys.index[k + r] - slab_begin : absorbing_row) * row;
  }
  const Lane* source = rows.data + q_begin / P::kPerLane * rows.stride;
  for (int d = 0; d < row; d += kTileVectors * n) {
    const int columns = static_cast<int>((row - d) / n);
    with_columns(columns < kTileVectors ? columns : kTileVectors, [&](auto count) {
      query_product<P, decltype(count)::value>(weight_rows, source, rows.stride, depth, targets, d);
    });
  }
}

// Adds the block's dS (tile[key][query]) to the gradient of the bias, which is summed over the dimensions of stride 0.
template <class Lane>
FA_NOINLINE void accumulate_dbias(const TensorView& view, int64_t b, int64_t h, int64_t q_begin, int nq,
                                  const KeyBlock& keys, const Lane* tile) {
  constexpr int n = kLanes<Lane>;
  Lane* base = row_of<Lane>(view, b, h, q_begin);
  if (view.stride_col == 0) {
    Vec<Lane> total = {};
    for (int q = 0; q < nq; q += n) {
      Vec<Lane> sum = {};
      for (int k = 0; k < keys.count; ++k) sum += load<Lane>(tile + k * kBlockQ + q);
      total += sum;  // lanes beyond nq hold zeros
      for (int i = 0; view.stride_row != 0 && i < n && q + i < nq; ++i) base[(q + i) * view.stride_row] += sum[i];
    }
    if (view.stride_row == 0) *base += sum_lanes<Lane>(total);
  } else if (view.stride_row == 0) {
    for (int k = 0; k < keys.count; ++k) {
      Vec<Lane> sum = {};
      for (int q = 0; q < nq; q += n) sum += load<Lane>(tile + k * kBlockQ + q);
      base[keys.index[k] * view.stride_col] += sum_lanes<Lane>(sum);
    }
  } else if (view.stride_col == 1 && keys.contiguous) {
    base += keys.index[0];
    for (int q = 0; q < nq; q += n) {
      for (int k = 0; k < keys.count; k += n) {
        Vec<Lane> block[n];
        FA_UNROLL
        for (int i = 0; i < n; ++i) block[i] = load<Lane>(tile + (k + i) * kBlockQ + q);
        transpose<Lane>(block);
        const int count = keys.count - k;
        if (q + n <= nq && count >= n) {
          FA_UNROLL
          for (int i = 0; i < n; ++i) {
            Lane* p = base + (q + i) * view.stride_row + k;
            store<Lane>(p, load<Lane>(p) + block[i]);
          }
        } else {
          FA_UNROLL
          for (int i = 0; i < n; ++i) {
            Lane* p = base + (q + i) * view.stride_row + k;
            if (q + i < nq) store_as<Lane>(p, load_as<Lane>(p, count) + block[i], count);
          }
        }
      }
    }
  } else {
    for (int k = 0; k < keys.count; ++k) {
      Lane* column = base + keys.index[k] * view.stride_col;
      for (int q = 0; q < nq; ++q) column[q * view.stride_row] += tile[k * kBlockQ + q];
    }
  }
}

// Adds the block's dS to the gradient of the reversed relative bias: key j meets 64 neighbouring entries.
template <class Lane>
FA_NOINLINE void accumulate_drelative(const KeyBlock& keys, int vectors, const Lane* tile, Lane* relative) {
  constexpr int n = kLanes<Lane>;
  for (int k = 0; k < keys.count; ++k) {
    for (int v = 0; v < vectors; ++v) {
      Lane* p = relative - keys.index[k] + v * n;
      store<Lane>(p, load<Lane>(p) + load<Lane>(tile + k * kBlockQ + v * n));
    }
  }
}

// Zeros what no tile range covers, where whole rows of the tile will be read.
template <class Lane>
FA_INLINE void clear_outside(Lane* tile, int k, VectorRange range, int vectors) {
  constexpr int n = kLanes<Lane>;
  for (int v = 0; v < vectors; ++v) {
    if (v >= range.begin && v < range.end) continue;
    for (int r = 0; r < kTileKeys; ++r) store<Lane>(tile + (k + r) * kBlockQ + v * n, Vec<Lane>{});
  }
}

// Zeros the lanes of queries that do not exist: an infinite key makes them NaN, and sums over queries read whole vectors.
template <class Lane>
FA_INLINE void clear_beyond(Lane* tile, int keys, int nq) {
  const int end = static_cast<int>(round_up(nq, kLanes<Lane>));
  if (nq == end) return;
  for (int k = 0; k < keys; ++k) {
    for (int q = nq; q < end; ++q) tile[k * kBlockQ + q] = 0;
  }
}

// rows[q][d] = factor * columns[d][q] as elements of P; added to what is there if asked to.
template <class P>
FA_NOINLINE void write_transposed(const typename P::Lane* columns, int nq, int dim, typename P::Lane factor, bool add,
                                  typename P::Storage* rows, int64_t stride_row) {
  using Lane = typename P::Lane;
  const auto column = [&](int d, int q) { return load<Lane>(columns + d * kBlockQ + q) * factor; };
  unpack_columns<P>(column, nq, dim, add, rows, stride_row);
}

// rows[j][d] = factor * source[j][d], as elements of type Out; source rows are padded to whole vectors.
template <class Out, class Lane>
FA_NOINLINE void write_rows(const Lane* source, int64_t count, int dim, Lane factor, Out* rows, int64_t stride_row) {
  constexpr int n = kLanes<Lane>;
  const int64_t row = round_up(dim, n);
  for (int64_t j = 0; j < count; ++j) {
    for (int d = 0; d < dim; d += n) {
      store_as<Lane>(rows + j * stride_row + d, load<Lane>(source + j * row + d) * factor, dim - d);
    }
  }
}

// row_sum[q] += sum over the keys of a tile of exp(S - lse).
template <class P, int kColumns>
FA_NOINLINE void sum_tile(const ScoreInputs<P>& in, int k, int v, bool partial, const typename P::Lane* lse,
                          Vec<typename P::Lane>* row_sum) {
  using Lane = typename P::Lane;
  Vec<Lane> acc[kTileKeys][kColumns];
  compute_scores<P, kColumns, false>(in, k, v, partial, nullptr, acc);
  const Lane to_logits = in.to_logits();
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> row_lse = load<Lane>(lse + (v + c) * kLanes<Lane>);
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      row_sum[v + c] += probability<P>(lse_exponent<P>(acc[r][c], to_logits, row_lse));
    }
  }
}

// A large lse is a coarse number: at 1e3 its rounding moves P by 6e-5, at -1e9 (a row under an additive mask) by a factor.
// Such rows are summed once more, over all their keys, and P is corrected by what the sum should have been: 1.
template <class P>
FA_NOINLINE void correct_lse(const AttentionParams& p, const Sequence& seq,
                             const RelativeBias<typename P::Lane>& relative, const LiveKeys* live, int64_t b, int64_t h,
                             int64_t q_begin, int nq, const BackwardScratch<P>& s,
                             const RowStatistics<typename P::Lane>& rows) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  constexpr int n = kLanes<Lane>;
  const int vectors = (nq + n - 1) / n;
  Vec<Lane> row_sum[kBlockVectors<Lane>] = {};

  pack_columns<P, kBlockQ>(row_of<const Storage>(p.query, b, h, seq.q_offset + q_begin), p.query.stride_row, nq,
                           static_cast<int>(p.head_dim), s.query);
  ScoreInputs<P> in = score_inputs<P>(p, relative, h, q_begin);
  in.query = s.query;
  KeyBlock& keys = *s.key.keys;
  KeyStream stream(p, seq, live, b, h, q_begin, nq, 0, seq.seqlen_k);
  while (stream.next(keys)) {
    prepare_keys<P>(p, seq, b, h, q_begin, nq, s.key, in);
    for (int k = 0; k < keys.count; k += kTileKeys) {
      bool partial;
      const VectorRange range = tile_range<Lane>(keys, k, stream.valid(), vectors, partial);
      for (int panel = 0; panel * kTileVectors < vectors; ++panel) {
        const VectorRange part = clip_to_panel(range, panel);
        if (part.begin >= part.end) continue;
        with_columns(part.end - part.begin, [&](auto columns) {
          sum_tile<P, decltype(columns)::value>(in, k, part.begin, partial, rows.lse, row_sum);
        });
      }
    }
  }
  for (int q = 0; q < nq; ++q) {
    Lane sum = row_sum[q / n][q % n];
    if (p.sinks.data != nullptr) sum += natural_exp(*row_of<const Lane>(p.sinks, 0, h, 0) - rows.lse[q]);
    if (sum > 0) rows.correction[q] = -natural_log(sum) * Lane(kLog2E);
  }
}

// Packs dO of a block and sets the block's statistics.
template <class P>
void measure_rows(const AttentionParams& p, const Sequence& seq, const RelativeBias<typename P::Lane>& relative,
                  const LiveKeys* live, int64_t b, int64_t h, int64_t q_begin, int nq, const BackwardScratch<P>& s,
                  const RowStatistics<typename P::Lane>& rows) {
  pack_columns<P, kBlockQ>(row_of<const typename P::Storage>(p.dout, b, h, seq.q_offset + q_begin), p.dout.stride_row,
                           nq, static_cast<int>(p.value_dim), s.dout);
  const bool inexact = load_row_statistics<P>(p, seq, b, h, q_begin, nq, s, rows);
  if (inexact) correct_lse<P>(p, seq, relative, live, b, h, q_begin, nq, s, rows);
}

// What an item of the backward pass works on.
template <class P>
struct BackwardItem {
  const AttentionParams& p;
  const BackwardPlan& plan;
  const RelativeBias<typename P::Lane>& relative;
  const LiveKeys* live;
  const RowStatistics<typename P::Lane>& statistics;
  const BackwardPartials<typename P::Lane>& partials;
  const BackwardScratch<P>& scratch;
  int64_t chunk;

  int64_t key_begin() const { return chunk * plan.chunk_keys; }
};

// Where an item sums dQ of one head: in its partial result, in the output, or, if that cannot hold lanes, in the
// scratch. Null: nowhere, as the only slab writes the output at once.
template <class P>
Rows<typename P::Lane> dquery_lanes(const BackwardItem<P>& item, const Sequence& seq, int64_t b, int64_t h) {
  using Lane = typename P::Lane;
  const AttentionParams& p = item.p;
  if (item.plan.chunks > 1) {
    const int64_t stride = item.partials.row_dquery;
    return {item.partials.dquery + head_index(p, item.chunk, b, h) * p.seqlen_q * stride, stride};
  }
  if constexpr (kSame<typename P::Storage, Lane>) {
    return {row_of<Lane>(p.dquery, b, h, seq.q_offset), p.dquery.stride_row};
  }
  if (!item.plan.sums_dquery) return {nullptr, 0};
  const int64_t stride = round_up(p.head_dim, kLanes<Lane>);
  return {item.scratch.dquery_rows + h % (p.num_heads / p.num_kv_heads) * p.seqlen_q * stride, stride};
}

// One query block of one head against the keys of one slab. dK and dV are added to the scratch; dQ is written by the
// first slab, and added to by the others.
template <class P>
void backward_block(const BackwardItem<P>& item, const Sequence& seq, int64_t b, int64_t h, int64_t q_begin,
                    int64_t slab_begin, int64_t slab_end) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  const AttentionParams& p = item.p;
  const BackwardScratch<P>& s = item.scratch;
  const int nq = seq.seqlen_q - q_begin < kBlockQ ? static_cast<int>(seq.seqlen_q - q_begin) : kBlockQ;
  const int vectors = (nq + kLanes<Lane> - 1) / kLanes<Lane>;
  const int panels = (vectors + kTileVectors - 1) / kTileVectors;
  const int head_dim = static_cast<int>(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t kv_head = h / (p.num_heads / p.num_kv_heads);
  const int64_t row = seq.q_offset + q_begin;
  const bool is_single_pass = item.plan.is_single_pass;
  const RowStatistics<Lane> rows = is_single_pass ? s.statistics : item.statistics.at(p, b, h, q_begin);
  const Lane dropout_scale = p.has_dropout ? static_cast<Lane>(p.dropout_scale) : Lane(1);
  const Storage* query = row_of<const Storage>(p.query, b, h, row);
  const Storage* dout = row_of<const Storage>(p.dout, b, h, row);
  const Storage* keys_base = row_of<const Storage>(p.key, b, kv_head, seq.k_offset);
  const Storage* values_base = row_of<const Storage>(p.value, b, kv_head, seq.k_offset);

  if (is_single_pass) measure_rows<P>(p, seq, item.relative, item.live, b, h, q_begin, nq, s, rows);
  KeyBlock& keys = *s.key.keys;
  KeyStream stream(p, seq, item.live, b, h, q_begin, nq, slab_begin, slab_end);
  const bool is_first = slab_begin == item.key_begin();
  const bool has_keys = stream.next(keys);
  if (!has_keys && !is_first) return;

  const bool wants_dquery = p.dquery.data != nullptr;
  if (wants_dquery) clear_columns<Lane>(s.dquery, head_dim, vectors);

  if (has_keys) {
    pack_columns<P, kBlockQ>(query, p.query.stride_row, nq, head_dim, s.query);
    if (!is_single_pass) pack_columns<P, kBlockQ>(dout, p.dout.stride_row, nq, value_dim, s.dout);
    const Rows<const Lane> query_rows = find_query_rows<P>(query, p.query.stride_row, nq, head_dim, s.query_rows);
    const Rows<const Lane> dout_rows = find_query_rows<P>(dout, p.dout.stride_row, nq, value_dim, s.dout_rows);
    ScoreInputs<P> in = score_inputs<P>(p, item.relative, h, q_begin);
    in.query = s.query;
    Vec<Lane> ones[kBlockVectors<Lane>];
    for (int v = 0; v < vectors; ++v) ones[v] = broadcast<Lane>(1);

    do {
      prepare_keys<P>(p, seq, b, h, q_begin, nq, s.key, in);
      find_rows<P>(values_base, p.value.stride_row, keys, value_dim, s.value_lanes, s.value_rows);
      if (P::kPerLane == 2 && wants_dquery) {
        s.summed_key.find(keys_base, p.key.stride_row, keys, head_dim);
      }
      const int tiles = (keys.count + kTileKeys - 1) / kTileKeys;
      for (int t = 0; t < tiles; ++t) {
        const int k = t * kTileKeys;
        bool partial;
        const VectorRange range = tile_range<Lane>(keys, k, stream.valid(), vectors, partial);
        const bool plain = !partial && in.raw && !p.has_dropout;
        s.key.ranges[t] = range;
        for (int panel = 0; panel < panels; ++panel) {
          const VectorRange part = clip_to_panel(range, panel);
          if (part.begin >= part.end) continue;
          with_columns(part.end - part.begin, [&](auto columns) {
            constexpr int kColumns = decltype(columns)::value;
            const int value_depth = P::lanes_for(value_dim);
            if (plain) {
              backward_tile<P, kColumns, true>(in, k, part.begin, false, false, s, rows, value_depth, dropout_scale);
            } else {
              backward_tile<P, kColumns, false>(in, k, part.begin, partial, p.has_dropout, s, rows, value_depth,
                                                dropout_scale);
            }
          });
        }
        if (s.dbias != nullptr) clear_outside(s.dbias, k, range, vectors);
        if (p.dvalue.data != nullptr) {
          accumulate_keys<P>(keys, k, slab_begin, item.plan.slab_keys, range, nq, s.weights, dout_rows, value_dim,
                             s.dvalue);
        }
        if (p.dkey.data != nullptr) {
          accumulate_keys<P>(keys, k, slab_begin, item.plan.slab_keys, range, nq, s.dscores, query_rows, head_dim,
                             s.dkey);
        }
      }
      if (wants_dquery) {
        outer_block<P>(P::kPerLane == 2 ? s.summed_key.rows : s.key.key_rows, head_dim, s.dscore_pairs, ones,
                       s.key.ranges, tiles, keys.count, vectors, s.dquery);
      }
      if (s.dbias != nullptr) clear_beyond<Lane>(s.dbias, keys.count, nq);
      if (p.dbias.data != nullptr) accumulate_dbias<Lane>(p.dbias, b, h, q_begin, nq, keys, s.dbias);
      if (p.drelative_bias.data != nullptr) {
        Lane* partial = item.partials.drelative_bias + head_index(p, item.chunk, b, h) * item.partials.row_relative;
        accumulate_drelative<Lane>(keys, vectors, s.dbias, partial + q_begin + p.seqlen_k - 1);
      }
    } while (stream.next(keys));
  }

  if (!wants_dquery) return;
  const Lane scale = static_cast<Lane>(p.scale);
  const Rows<Lane> sums = dquery_lanes(item, seq, b, h);
  if (sums.data != nullptr) {
    write_transposed<Policy<Lane, Lane, 1>>(s.dquery, nq, head_dim, scale, !is_first, sums.data + q_begin * sums.stride,
                                            sums.stride);
  } else {
    write_transposed<P>(s.dquery, nq, head_dim, scale, false, row_of<Storage>(p.dquery, b, h, row),
                        p.dquery.stride_row);
  }
}

// All query heads of one kv head.
template <class P>
void backward_kv_head(const BackwardItem<P>& item, int64_t b, int64_t kv_head) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  const AttentionParams& p = item.p;
  const BackwardScratch<P>& s = item.scratch;
  const Sequence seq = sequence_of(p, b);
  const int head_dim = static_cast<int>(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t heads = p.num_heads / p.num_kv_heads;
  const int64_t first_head = kv_head * heads;
  const int64_t chunk_stop = item.key_begin() + item.plan.chunk_keys;
  const int64_t chunk_end = chunk_stop < seq.seqlen_k ? chunk_stop : seq.seqlen_k;

  // Without keys there is still dQ to write: the first slab is always visited.
  int64_t slab_begin = item.key_begin();
  do {
    const int64_t slab_stop = slab_begin + item.plan.slab_keys;
    const int64_t slab_end = slab_stop < chunk_end ? slab_stop : chunk_end;
    const int64_t count = slab_end > slab_begin ? slab_end - slab_begin : 0;
    memset(s.dkey, 0, count * round_up(head_dim, kLanes<Lane>) * sizeof(Lane));
    memset(s.dvalue, 0, count * round_up(value_dim, kLanes<Lane>) * sizeof(Lane));
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      for (int64_t q_begin = 0; q_begin < seq.seqlen_q; q_begin += kBlockQ) {
        backward_block<P>(item, seq, b, h, q_begin, slab_begin, slab_end);
      }
    }
    const int64_t row = seq.k_offset + slab_begin;
    if (p.dkey.data != nullptr) {
      write_rows<Storage, Lane>(s.dkey, count, head_dim, static_cast<Lane>(p.scale),
                                row_of<Storage>(p.dkey, b, kv_head, row), p.dkey.stride_row);
    }
    if (p.dvalue.data != nullptr) {
      const Lane factor = p.has_dropout ? static_cast<Lane>(p.dropout_scale) : Lane(1);
      write_rows<Storage, Lane>(s.dvalue, count, value_dim, factor, row_of<Storage>(p.dvalue, b, kv_head, row),
                                p.dvalue.stride_row);
    }
    slab_begin = slab_stop;
  } while (slab_begin < chunk_end);

  if constexpr (!kSame<Storage, Lane>) {
    if (!item.plan.sums_dquery) return;
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      write_rows<Storage, Lane>(dquery_lanes(item, seq, b, h).data, seq.seqlen_q, head_dim, Lane(1),
                                row_of<Storage>(p.dquery, b, h, seq.q_offset), p.dquery.stride_row);
    }
  }
}

// Zeros the columns of the chunk in the bias gradients of (b, h).
template <class Lane>
FA_NOINLINE void clear_dbias(const AttentionParams& p, int64_t b, int64_t h, int64_t key_begin, int64_t key_end) {
  const int64_t rows = p.dbias.stride_row == 0 ? 1 : p.seqlen_q;
  for (int64_t i = 0; i < rows; ++i) {
    Lane* row = row_of<Lane>(p.dbias, b, h, i);
    if (p.dbias.stride_col == 1) {
      memset(row + key_begin, 0, (key_end - key_begin) * sizeof(Lane));
    } else {
      for (int64_t j = key_begin; j < key_end; ++j) row[j * p.dbias.stride_col] = 0;
    }
  }
}

template <class P>
void backward_item(const BackwardItem<P>& item, int64_t group) {
  using Lane = typename P::Lane;
  const AttentionParams& p = item.p;
  const BackwardPlan& plan = item.plan;
  const int64_t head_groups = plan.join_heads ? 1 : p.num_kv_heads;
  const int64_t b_begin = plan.join_batches ? 0 : group / head_groups;
  const int64_t b_end = plan.join_batches ? p.batch : b_begin + 1;
  const int64_t kv_begin = plan.join_heads ? 0 : group % head_groups;
  const int64_t kv_end = plan.join_heads ? p.num_kv_heads : kv_begin + 1;
  const int64_t heads = p.num_heads / p.num_kv_heads;

  if (p.dbias.data != nullptr) {
    const int64_t key_stop = item.key_begin() + plan.chunk_keys;
    const int64_t key_end = key_stop < p.seqlen_k ? key_stop : p.seqlen_k;
    for (int64_t b = b_begin; b < (plan.join_batches ? 1 : b_end); ++b) {
      for (int64_t h = kv_begin * heads; h < (plan.join_heads ? 1 : kv_end * heads); ++h) {
        clear_dbias<Lane>(p, b, h, item.key_begin(), key_end);
      }
    }
  }
  for (int64_t b = b_begin; b < b_end; ++b) {
    for (int64_t h = kv_begin * heads; p.drelative_bias.data != nullptr && h < kv_end * heads; ++h) {
      memset(item.partials.drelative_bias + head_index(p, item.chunk, b, h) * item.partials.row_relative, 0,
             item.partials.row_relative * sizeof(Lane));
    }
    for (int64_t kv_head = kv_begin; kv_head < kv_end; ++kv_head) backward_kv_head<P>(item, b, kv_head);
  }
}

// Sums the chunks' partial dq of one head, in the order of the chunks.
template <class P>
void reduce_dquery(const AttentionParams& p, const BackwardPlan& plan,
                   const BackwardPartials<typename P::Lane>& partials, int64_t b, int64_t h) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  const Sequence seq = sequence_of(p, b);
  const int dim = static_cast<int>(p.head_dim);
  for (int64_t i = 0; i < seq.seqlen_q; ++i) {
    Storage* target = row_of<Storage>(p.dquery, b, h, seq.q_offset + i);
    for (int d = 0; d < dim; d += kLanes<Lane>) {
      Vec<Lane> sum = {};
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t row = head_index(p, chunk, b, h) * p.seqlen_q + i;
        sum += load_as<Lane>(partials.dquery + row * partials.row_dquery + d, dim - d);
      }
      store_as<Lane>(target + d, sum, dim - d);
    }
  }
}

// Sums the partial gradients of the relative bias over chunks and batch entries (and heads, if they share it), in order.
template <class Lane>
void reduce_drelative(const AttentionParams& p, const BackwardPlan& plan, const BackwardPartials<Lane>& partials) {
  const int64_t columns = relative_columns(p);
  const TensorView& view = p.drelative_bias;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    Lane* target = row_of<Lane>(view, 0, h, 0);
    if (h == 0 || view.stride_head != 0) {
      for (int64_t c = 0; c < columns; ++c) target[c * view.stride_col] = 0;
    }
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      for (int64_t b = 0; b < p.batch; ++b) {
        const Lane* source = partials.drelative_bias + head_index(p, chunk, b, h) * partials.row_relative;
        for (int64_t c = 0; c < columns; ++c) target[(columns - 1 - c) * view.stride_col] += source[c];
      }
    }
  }
}

// dsinks[h] = -sum over rows of exp(sink - lse) * (delta - dlse): what the sink takes from the row.
template <class Lane>
void compute_dsinks(const AttentionParams& p, const RowStatistics<Lane>& statistics, int64_t h) {
  const Vec<Lane> sink = broadcast<Lane>(*row_of<const Lane>(p.sinks, 0, h, 0));
  Vec<Lane> total = {};
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = round_up(sequence_of(p, b).seqlen_q, kLanes<Lane>);
    const RowStatistics<Lane> rows = statistics.at(p, b, h, 0);
    for (int64_t i = 0; i < length; i += kLanes<Lane>) {
      const Vec<Lane> share = exp2<Lane>((sink - load<Lane>(rows.lse + i)) * Lane(kLog2E));
      total += share * (load<Lane>(rows.dlse + i) - load<Lane>(rows.delta + i));
    }
  }
  *row_of<Lane>(p.dsinks, 0, h, 0) += sum_lanes<Lane>(total);
}

template <class P>
void backward_with_policy(const AttentionParams& p) {
  using Lane = typename P::Lane;
  const BackwardPlan plan = plan_backward<P>(p);
  const double flops = 4.0 * static_cast<double>(p.batch * p.num_heads) * static_cast<double>(p.seqlen_q) *
                       static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim + p.value_dim);
  // Without keys there is still dq to write.
  const int64_t chunks = plan.chunks < 1 ? 1 : plan.chunks;
  const int64_t items = plan.groups * chunks;
  const int threads = choose_threads(p.num_threads, items, flops);

  const Buffer live_memory(live_keys_bytes(p));
  const Buffer relative_memory(relative_bias_bytes<Lane>(p));
  BackwardPartials<Lane> partials;
  const Buffer partials_memory([&](Arena& arena) { partials.layout(arena, p, plan); });
  const int64_t rows = plan.is_single_pass ? 0 : p.batch * p.num_heads * RowStatistics<Lane>::rows_of_head(p);
  RowStatistics<Lane> statistics;
  const Buffer statistics_memory([&](Arena& arena) { statistics.layout(arena, rows); });
  const std::unique_ptr<BackwardScratch<P>[]> scratch(new BackwardScratch<P>[threads]);
  const Buffer memory([&](Arena& arena) {
    for (int thread = 0; thread < threads; ++thread) scratch[thread].layout(arena, p, plan);
  });

  const LiveKeys* live = make_live_keys(p, live_memory.data());
  const RelativeBias<Lane> relative = make_relative_bias<Lane>(p, relative_memory.data());

  const int64_t heads = p.batch * p.num_heads;
  const int64_t blocks = (p.seqlen_q + kBlockQ - 1) / kBlockQ;
  parallel_for(threads, plan.is_single_pass ? 0 : heads * blocks, [&](int64_t index, int thread) {
    const int64_t b = index / blocks / p.num_heads;
    const int64_t h = index / blocks % p.num_heads;
    const int64_t q_begin = index % blocks * kBlockQ;
    const Sequence seq = sequence_of(p, b);
    if (q_begin >= seq.seqlen_q) return;
    const int nq = seq.seqlen_q - q_begin < kBlockQ ? static_cast<int>(seq.seqlen_q - q_begin) : kBlockQ;
    measure_rows<P>(p, seq, relative, live, b, h, q_begin, nq, scratch[thread], statistics.at(p, b, h, q_begin));
  });
  // Early chunks of a causal problem hold the most work.
  const Items order = plan.chunks > 1 ? Items::kInOrder : Items::kShared;
  const auto backward_of = [&](int64_t index, int thread) {
    const int64_t chunk = index / plan.groups;
    backward_item<P>({p, plan, relative, live, statistics, partials, scratch[thread], chunk}, index % plan.groups);
  };
  parallel_for(threads, items, backward_of, order);

  if (plan.chunks > 1 && p.dquery.data != nullptr) {
    parallel_for(threads, heads, [&](int64_t index, int) {
      reduce_dquery<P>(p, plan, partials, index / p.num_heads, index % p.num_heads);
    });
  }
  if (p.drelative_bias.data != nullptr) reduce_drelative<Lane>(p, plan, partials);
  if (p.dsinks.data != nullptr) {
    // One after another: a shared sink (stride 0) is summed over the heads.
    for (int64_t h = 0; h < p.num_heads; ++h) *row_of<Lane>(p.dsinks, 0, h, 0) = 0;
    for (int64_t h = 0; h < p.num_heads; ++h) compute_dsinks<Lane>(p, statistics, h);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
