// The backward kernel for many queries. A thread processes all query heads of one kv head with a chunk of keys, slab by
// slab. A slab is so small that its dkey and dvalue stay in the cache. For each slab, the thread loops over the query
// blocks of the heads. For each query block, it loops over the blocks of valid keys in the slab:
//
//   probs^T[key][query]   = exp(scores^T - lse)                                  scores as in forward (scores.h)
//   dscores^T[key][query] = probs^T * (value[key] . dout^T - delta + dlse)
//   dvalue[key][:]       += probs^T[key] . dout                                  lanes = value dim
//   dkey[key][:]         += dscores^T[key] . query                               lanes = head dim
//   dquery^T[d][query]   += key^T[d] . dscores^T                                 (outer_block)
//
// With AMX, tiles compute all five products (amx_products.h). The thread sums dkey and dvalue in its scratch, and sums
// dquery over the slabs.
#pragma once
#include "bias_gradients.h"
#include "row_statistics.h"

namespace fused_attn::cpu {
namespace {

// Returns the rows of a query block (of query or dout) in the form that a sum over queries reads. A row consists of
// `dim` lanes. If the factors of products are pairs, a pair is the same column of two neighbouring queries. The
// function copies the rows into `scratch` unless memory already holds them in this form.
template <class Policy>
FA_NOINLINE Rows<const typename Policy::Lane> find_query_rows(const typename Policy::Storage* base, int64_t stride_row,
                                                              int nq, int dim, typename Policy::Lane* scratch) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const int64_t row = round_up(dim, n);
  if constexpr (Policy::kParts > 0) {
#if defined(__AVX512BF16__)
    const int64_t next_part = BackwardScratch<Policy>::query_row_part(round_up(nq, n), row);
    for (int q = 0; q < nq; q += 2) {
      float* pairs = scratch + q / 2 * factor_stride<Policy>(row);
      const auto* low = base + q * stride_row;
      interleave<Policy>(low, q + 1 < nq ? low + stride_row : nullptr, dim, next_part, pairs);
      for (int64_t d = dim; Policy::kParts == 1 && d < row; ++d) pairs[d] = 0;
    }
#endif
    return {scratch, row};
  } else {
    if constexpr (!Policy::kConverts) {
      if (dim % n == 0) return {base, stride_row};
    }
    for (int q = 0; q < nq; ++q) {
      for (int d = 0; d < dim; d += n) {
        store<Lane>(scratch + q * row + d, load_lanes<Policy>(base + q * stride_row, d, dim));
      }
    }
    return {scratch, row};
  }
}

// Computes probs and dscores of kTiles tiles: their keys, from key k of the block on, and kColumns vectors of queries
// from vector v on. Writes them to the scratch `s`, for the products that follow. kPlain: every key of the tiles is
// visible, scores are plain products, and there is no dropout. So the compiler leaves out all code for these features.
// Returns false if floats are multiplied in parts, and a dscore is NaN or infinite.
template <class Policy, int kColumns, bool kPlain, int kTiles = 1>
FA_NOINLINE bool backward_tile(const ScoreInputs<Policy>& in, int k, int v, bool partial, bool dropout,
                               const BackwardScratch<Policy>& s, const RowStatistics<typename Policy::Lane>& rows,
                               int value_depth, typename Policy::Lane dropout_scale) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  constexpr int kKeys = kTiles * kTileKeys;
  const int64_t stride = in.stride;
  const int64_t offset = k * stride + v * n;
  const int64_t coefficient_stride = s.coefficient_stride(stride);
  const auto coefficient = [&](int r, int c) { return (k + r) * coefficient_stride + (v + c) * n; };
  alignas(kVectorBytes) Lane derivative[kPlain ? 1 : kKeys * kColumns * n];
  alignas(kVectorBytes) Lane probs[kKeys * kColumns * n];
  const auto after_dropout = [&](int r, int c, Vec<Lane> x) {
    if (kPlain || !dropout) return x;
    return select_or_zero<Lane>(
        *reinterpret_cast<const IntVec<Lane>*>(s.key.dropout_keep + offset + r * stride + c * n), x);
  };

  Vec<Lane> acc[kKeys][kColumns];
  compute_scores<Policy, kColumns, kPlain>(in, k, v, partial, derivative, acc);
  const Lane to_logits = in.to_logits();
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> lse = load<Lane>(rows.lse + (v + c) * n);
    const Vec<Lane> correction = load<Lane>(rows.correction + (v + c) * n);
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      const Vec<Lane> log_prob = above_lse<Policy>(acc[r][c], to_logits, lse) + correction;
      Vec<Lane> x = prob_of<Policy>(log_prob * Lane(kLog2E));
      // The lse of a row may be NaN, but the probability of a hidden key must still be zero.
      if (!kPlain) x = select<Lane>(acc[r][c] == -FloatTraits<Lane>::kInfinity, Vec<Lane>{}, x);
      store<Lane>(probs + (r * kColumns + c) * n, x);
      x = after_dropout(r, c, x);
      if constexpr (Policy::kParts <= 1) store_as<Lane>(s.probs + coefficient(r, c), x);
#if defined(__AMX_BF16__)
      if constexpr (Policy::kParts > 1) store_parts(x, s.coefficient_part(stride), s.probs + coefficient(r, c));
#endif
    }
  }

  if constexpr (Policy::kUsesAmx) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = load<Lane>(s.dprobs + offset + r * stride + c * n);
    }
  } else {
    dot_tile<Policy, kKeys, kColumns>(s.value.rows + k, s.dout + v * n, stride, value_depth, acc);
  }
  [[maybe_unused]] unsigned infinite = 0;
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> delta = load<Lane>(rows.delta + (v + c) * n);
    const Vec<Lane> dlse = load<Lane>(rows.dlse + (v + c) * n);
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      const Vec<Lane> prob = load<Lane>(probs + (r * kColumns + c) * n);
      Vec<Lane> x = acc[r][c];
      if (!kPlain && dropout) x = after_dropout(r, c, x * dropout_scale);
      x = prob * (x - delta + dlse);
      if constexpr (!kPlain) {
        x = select<Lane>(prob == 0, Vec<Lane>{}, x);  // a hidden value may be NaN, and 0 * NaN is NaN
        if (s.dbias != nullptr) store<Lane>(s.dbias + offset + r * stride + c * n, x);
        if (in.softcap > 0) x *= load<Lane>(derivative + (r * kColumns + c) * n);
      }
      acc[r][c] = x;
      if constexpr (Policy::kParts == 0) store<Lane>(s.dscore_pairs + offset + r * stride + c * n, x);
    }
#if defined(__AMX_BF16__)
    if constexpr (Policy::kParts > 1) {
      FA_UNROLL
      for (int r = 0; r < kKeys; ++r) {
        infinite |= infinite_lanes(acc[r][c]);
        store_parts(acc[r][c], s.coefficient_part(stride), s.dscores + coefficient(r, c));
      }
      FA_UNROLL
      for (int r = 0; r < kKeys; r += 2) {
        store_pairs_of_parts(acc[r][c], acc[r + 1][c], part_lanes<Policy>(stride),
                             s.dscore_pairs + (k + r) / 2 * factor_stride<Policy>(stride) + (v + c) * n);
      }
    }
#endif
#if defined(__AVX512BF16__)
    if constexpr (Policy::kParts == 1) {
      FA_UNROLL
      for (int r = 0; r < kKeys; r += 2) {
        store_as<Lane>(s.dscores + coefficient(r, c), acc[r][c]);
        store_as<Lane>(s.dscores + coefficient(r + 1, c), acc[r + 1][c]);
        store<Lane>(s.dscore_pairs + (k + r) / 2 * stride + (v + c) * n, round_to_pairs(acc[r][c], acc[r + 1][c]));
      }
    }
#endif
  }
  return infinite == 0;
}

// Where the rows of dkey or dvalue of a slab go. If only one block of queries attends to the keys, its products are the
// gradient, and `rows` is the output. Otherwise the products are added up in `sums`.
template <class Policy>
struct KeyGradient {
  using Lane = typename Policy::Lane;

  int dim;                         // the number of columns
  Lane factor;                     // the factor of every product
  Lane* sums;                      // [key of the slab, and one spare row that nobody reads][dim, padded]
  typename Policy::Storage* rows;  // [key of the slab]; null = add to `sums`
  int64_t stride_row;              // of `rows`
};

// Adds to dkey or dvalue of the kTileKeys keys of a tile: sum over queries q of coefficients[r][q] * rows[q][d], for
// kColumns vectors of columns from column d on. targets[r] is the row of key r, of the output or of the sums. Rows of
// the output are stored, and those that do not exist are null.
template <class Policy, int kColumns>
FA_NOINLINE void query_product(const char* const* coefficients, const typename Policy::Lane* rows, int64_t stride,
                               int depth, const KeyGradient<Policy>& gradient, void* const* targets, int d) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  Vec<Lane> acc[kTileKeys][kColumns];
  dot_tile<Policy, kTileKeys, kColumns>(coefficients, rows + d, stride, depth, acc);
  if (gradient.rows == nullptr) {
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      Lane* target = static_cast<Lane*>(targets[r]) + d;
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) store<Lane>(target + c * n, load<Lane>(target + c * n) + acc[r][c]);
    }
    return;
  }
  FA_UNROLL
  for (int r = 0; r < kTileKeys; ++r) {
    if (targets[r] == nullptr) continue;
    Storage* target = static_cast<Storage*>(targets[r]) + d;
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      store_as<Lane>(target + c * n, acc[r][c] * gradient.factor, gradient.dim - d - c * n);
    }
  }
}

// Adds what one tile of keys contributes to dkey or dvalue, all columns of it. The tile begins at key k of the block,
// and the vectors of queries in `range` contribute. A tile may have more rows than the block has keys left: what these
// rows would add goes into the spare row of the sums, behind the slab_keys rows of the slab.
template <class Policy>
FA_INLINE void accumulate_keys(const KeyBlock& keys, int k, int64_t slab_begin, int64_t slab_keys, VectorRange range,
                               int nq, const typename BackwardScratch<Policy>::Coefficient* coefficients,
                               Rows<const typename Policy::Lane> rows, const KeyGradient<Policy>& gradient) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const int q_begin = range.begin * n;
  const int q_end = range.end * n < nq ? range.end * n : nq;
  const int depth = Policy::lanes_for(q_end - q_begin);
  const int64_t stride = round_up(nq, n);
  const int row = static_cast<int>(round_up(gradient.dim, n));
  const char* coefficient_rows[kTileKeys];
  void* targets[kTileKeys];
  for (int r = 0; r < kTileKeys; ++r) {
    coefficient_rows[r] = reinterpret_cast<const char*>(coefficients + (k + r) * stride + q_begin);
    const bool exists = k + r < keys.count;
    const int64_t key = exists ? keys.index[k + r] - slab_begin : slab_keys;
    if (gradient.rows == nullptr) {
      targets[r] = gradient.sums + key * row;
    } else {
      targets[r] = exists ? gradient.rows + key * gradient.stride_row : nullptr;
    }
  }
  const Lane* source = rows.data + q_begin / Policy::kPerLane * rows.stride;
  for (int d = 0; d < row; d += kTileVectors * n) {
    const int columns = (row - d) / n;
    with_columns(columns < kTileVectors ? columns : kTileVectors, [&](auto count) {
      query_product<Policy, decltype(count)::value>(coefficient_rows, source, rows.stride, depth, gradient, targets, d);
    });
  }
}

// Does with AMX, for all keys of a block, what accumulate_keys does for a tile. `rows` are pairs of queries.
template <class Policy>
FA_NOINLINE void add_to_keys(const KeyBlock& keys, int64_t slab_begin, int nq, BFloat16* coefficients, float* rows,
                             const BackwardScratch<Policy>& s, const KeyGradient<Policy>& gradient) {
  const int64_t stride = round_up(nq, kLanes<float>), row = round_up(gradient.dim, kLanes<float>);
  sum_over_queries<Policy>(coefficients, s.coefficient_stride(stride), s.coefficient_part(stride), s.key.ranges,
                           keys.count, nq, rows, row, s.query_row_part(stride, row), s.key_sums);
  for (int k = 0; k < keys.count; ++k) {
    const int64_t key = keys.index[k] - slab_begin;
    const float* const part = s.key_sums + k * row;
    for (int64_t d = 0; d < row; d += kLanes<float>) {
      if (gradient.rows == nullptr) {
        float* const sum = gradient.sums + key * row + d;
        store<float>(sum, load<float>(sum) + load<float>(part + d));
      } else {
        store_as<float>(gradient.rows + key * gradient.stride_row + d, load<float>(part + d) * gradient.factor,
                        static_cast<int>(gradient.dim - d));
      }
    }
  }
}

// Writes a transposed block back as rows: rows[q][d] = factor * columns[d][q], as elements of Policy::Storage. If
// `add`, the product is added to the rows instead.
template <class Policy>
FA_NOINLINE void write_transposed(const typename Policy::Lane* columns, int nq, int dim, typename Policy::Lane factor,
                                  bool add, typename Policy::Storage* rows, int64_t stride_row) {
  using Lane = typename Policy::Lane;
  const int64_t stride = round_up(nq, kLanes<Lane>);
  const auto column = [&](int d, int q) { return load<Lane>(columns + d * stride + q) * factor; };
  unpack_columns<Policy>(column, nq, dim, add, rows, stride_row);
}

// Writes finished sums from the scratch to a tensor: rows[j][d] = factor * source[j][d], as elements of type Out. Rows
// of `source` are padded to whole vectors.
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

// Sets `count` rows of a gradient to zero, before blocks of queries add to its sums. Rows of the output need that only
// if some keys may be hidden from all queries, because every other row is stored.
template <class Policy>
FA_NOINLINE void clear_gradient(const KeyGradient<Policy>& gradient, int64_t count, bool visits_all_keys) {
  using Lane = typename Policy::Lane;
  if (gradient.rows == nullptr) {
    memset(gradient.sums, 0, count * round_up(gradient.dim, kLanes<Lane>) * sizeof(Lane));
  } else if (!visits_all_keys) {
    for (int64_t j = 0; j < count; ++j) {
      memset(static_cast<void*>(gradient.rows + j * gradient.stride_row), 0,
             gradient.dim * sizeof(typename Policy::Storage));
    }
  }
}

// The largest number of keys of a slab whose rows of dkey and dvalue are prefetched. Those of more keys would not stay
// in the second-level cache while a block of queries is processed.
constexpr int64_t kMostPrefetchedKeys = 512;

// Prefetches the rows of dkey and dvalue of `count` keys of one kv head, before the last block of queries that adds to
// them. Where dquery, dkey and dvalue are views (B, H, L, D) of tensors (B, L, H, D), each row lies apart from the one
// before it. Without these prefetches and those of dquery, each of its stores waits for memory. With both, backward of
// 12 heads of 197 queries and keys, head dim 64, 12 batch entries, takes 0.77 of the time in bfloat16, and 0.86 in
// float32 (AMX); 512 queries and keys take 0.87 and 0.98.
template <class Policy>
FA_NOINLINE void prefetch_key_gradients(const AttentionParams& p, int64_t b, int64_t kv_head, int64_t row,
                                        int64_t count) {
  using Storage = typename Policy::Storage;
  const auto prefetch = [&](const TensorView& view, int64_t dim) {
    if (view.data == nullptr) return;
    prefetch_rows(row_of<Storage>(view, b, kv_head, row), view.stride_row, count, static_cast<int>(dim));
  };
  prefetch(p.dkey, p.head_dim);
  prefetch(p.dvalue, p.value_dim);
}

// What the thread that processes a work item of backward needs: the call, its plan, the memory, and which chunk of
// keys.
template <class Policy>
struct BackwardItem {
  const AttentionParams& p;
  const BackwardPlan& plan;
  const RelativeBias<typename Policy::Lane>& relative;
  const ValidKeys* valid_keys;
  const RowStatistics<typename Policy::Lane>& statistics;
  const BackwardPartials<typename Policy::Lane>& partials;
  const BackwardScratch<Policy>& scratch;
  const BackwardScratch<LanePolicy<Policy>>& lane_scratch;  // for what vectors multiply, if the policy has parts
  int64_t chunk;

  // The first key of the chunk.
  int64_t key_begin() const { return chunk * plan.chunk_keys; }

  // The same item for vectors.
  BackwardItem<LanePolicy<Policy>> for_lanes() const {
    return {p, plan, relative, valid_keys, statistics, partials, lane_scratch, lane_scratch, chunk};
  }
};

// Returns where a work item sums dquery of one head over its slabs:
//
//   the partial dquery of the chunk   if there are several chunks
//   the output                        if its elements have the type of lanes
//   the scratch                       if the output has 16-bit elements, in which sums would be too coarse
//   null                              if there is only one slab, which then writes the output without a sum
template <class Policy>
Rows<typename Policy::Lane> dquery_lanes(const BackwardItem<Policy>& item, const Sequence& seq, int64_t b, int64_t h) {
  using Lane = typename Policy::Lane;
  const AttentionParams& p = item.p;
  if (item.plan.chunks > 1) {
    const int64_t stride = item.partials.row_dquery;
    return {item.partials.dquery + head_index(p, item.chunk, b, h) * p.seqlen_q * stride, stride};
  }
  if constexpr (kSame<typename Policy::Storage, Lane>) {
    return {row_of<Lane>(p.dquery, b, h, seq.q_offset), p.dquery.stride_row};
  }
  if (!item.plan.sums_dquery) return {nullptr, 0};
  const int64_t stride = round_up(p.head_dim, kLanes<Lane>);
  return {item.scratch.dquery_rows + h % group_size_of(p) * p.seqlen_q * stride, stride};
}

// Processes one block of queries with the keys [slab_begin, slab_end). Adds the block's part of dkey and dvalue to
// `dkey` and `dvalue`. Writes the part of dquery if this is the first slab of the item. A later slab adds its part to
// dquery. Returns false if floats are multiplied in parts, and a query, dout or a dscore has none (float_parts.h).
template <class Policy>
bool backward_block(const BackwardItem<Policy>& item, const Sequence& seq, const QueryBlock& queries,
                    int64_t slab_begin, int64_t slab_end, const KeyGradient<Policy>& dkey,
                    const KeyGradient<Policy>& dvalue) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const AttentionParams& p = item.p;
  const BackwardScratch<Policy>& s = item.scratch;
  const int64_t b = queries.b, h = queries.h;
  const int nq = queries.count;
  const int vectors = (nq + kLanes<Lane> - 1) / kLanes<Lane>;
  const int panels = (vectors + kTileVectors - 1) / kTileVectors;
  const int head_dim = static_cast<int>(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t kv_head = kv_head_of(p, h);
  const bool is_single_pass = item.plan.is_single_pass;
  const bool stores_pairs = stores_dbias_pairs<Policy>(p);
  const RowStatistics<Lane> rows = is_single_pass ? s.statistics : item.statistics.at(p, b, h, queries.begin);
  const Lane dropout_scale = p.has_dropout ? static_cast<Lane>(p.dropout_scale) : Lane(1);
  const Storage* query = rows_of<const Storage>(p.query, seq, queries);
  const Storage* dout = rows_of<const Storage>(p.dout, seq, queries);
  const RowSource<Storage> key_source = row_source<Storage>(p, p.key, seq, b, kv_head);
  const RowSource<Storage> value_source = row_source<Storage>(p, p.value, seq, b, kv_head);

  const bool wants_dquery = p.dquery.data != nullptr;
  const bool is_first = slab_begin == item.key_begin();
  if (wants_dquery && is_first && item.plan.chunks == 1 && !item.plan.sums_dquery)
    prefetch_rows(rows_of<Storage>(p.dquery, seq, queries), p.dquery.stride_row, nq, head_dim);
  bool is_exact = true;
  if (is_single_pass) is_exact = measure_rows<Policy>(p, seq, item.relative, item.valid_keys, queries, s, rows);
  // Stop here if no query of the block sees a key of the slab. In the first slab, dquery must still be written.
  KeyBlock& keys = *s.key.keys;
  KeyStream stream(p, seq, item.valid_keys, queries, slab_begin, slab_end, kKeyStep<Policy>);
  const bool has_keys = stream.next(keys);
  if (!has_keys && !is_first) return is_exact;

  if (wants_dquery) clear_columns<Lane>(s.dquery, head_dim, vectors);

#if defined(__AMX_BF16__)
  if constexpr (Policy::kParts > 1) {
    is_exact &=
        have_parts(query, p.query.stride_row, nq, head_dim) && have_parts(dout, p.dout.stride_row, nq, value_dim);
    if (!is_exact) return false;
  }
#endif
  if (has_keys) {
    // Bring the queries and dout into both forms that products read: transposed (s.query, s.dout), and as rows.
    pack_columns<Policy>(query, p.query.stride_row, nq, head_dim, s.query);
    if (!is_single_pass) pack_columns<Policy>(dout, p.dout.stride_row, nq, value_dim, s.dout);
    const Rows<const Lane> query_rows = find_query_rows<Policy>(query, p.query.stride_row, nq, head_dim, s.query_rows);
    const Rows<const Lane> dout_rows = find_query_rows<Policy>(dout, p.dout.stride_row, nq, value_dim, s.dout_rows);
    ScoreInputs<Policy> in = score_inputs<Policy>(p, item.relative, queries);
    in.query = s.query;
    Vec<Lane> ones[kBlockVectors<Lane>];
    for (int v = 0; v < vectors; ++v) ones[v] = broadcast<Lane>(1);

    do {
      prepare_keys<Policy>(p, seq, queries, s.key, in);
      s.value.find(value_source, keys, value_dim);
      if constexpr (Policy::kUsesAmx)
        multiply_keys_by_columns<Policy>(s.value, keys.count, value_dim, s.dout, in.stride, s.dprobs);
      if (Policy::kParts > 0 && wants_dquery) {
        s.summed_key.find(key_source, keys, head_dim);
      }
      // For each tile of keys: compute probs and dscores, then add the tile's part of dvalue and dkey.
      const int tiles = (keys.count + kTileKeys - 1) / kTileKeys;
      const bool is_plain = in.raw && !p.has_dropout;
      const int value_depth = Policy::lanes_for(value_dim);
      const MaskPrefetcher<Policy> masks(p, queries, keys, slab_end);
      for (int t = 0; t < tiles; ++t) {
        const int k = t * kTileKeys;
        masks.prefetch(t, tiles);
        bool partial;
        const VectorRange range = tile_range<Lane>(keys, k, stream.valid_queries(), vectors, partial);
        s.key.ranges[t] = range;
        // As in forward, a block that fills at most half of a tile takes two tiles at once: every second tile is
        // computed together with the one before it.
        const bool takes_two = 2 * vectors <= kTileVectors && is_plain && !keys.partial;
        const bool is_pair = takes_two && (t | 1) * kTileKeys + kTileKeys <= keys.count;
        for (int panel = 0; panel < panels && !(is_pair && t % 2 == 1); ++panel) {
          const VectorRange part = clip_to_panel(range, panel);
          if (part.begin >= part.end) continue;
          with_columns(part.end - part.begin, [&](auto columns) {
            constexpr int kColumns = decltype(columns)::value;
            if constexpr (2 * kColumns <= kTileVectors) {
              if (is_pair) {
                is_exact &= backward_tile<Policy, kColumns, /*kPlain=*/true, 2>(in, k, part.begin, /*partial=*/false,
                                                                                /*dropout=*/false, s, rows, value_depth,
                                                                                dropout_scale);
                return;
              }
            }
            if (is_plain && !partial) {
              is_exact &= backward_tile<Policy, kColumns, /*kPlain=*/true>(in, k, part.begin, /*partial=*/false,
                                                                           /*dropout=*/false, s, rows, value_depth,
                                                                           dropout_scale);
            } else {
              is_exact &= backward_tile<Policy, kColumns, /*kPlain=*/false>(in, k, part.begin, partial, p.has_dropout,
                                                                            s, rows, value_depth, dropout_scale);
            }
          });
        }
        if (s.dbias != nullptr) clear_outside(s.dbias, k, kTileKeys, range, vectors);
        if (stores_pairs) clear_outside(s.dscore_pairs, k / 2, kTileKeys / 2, range, vectors);
        if constexpr (Policy::kUsesAmx) continue;  // AMX adds the parts of the whole block
        if (p.dvalue.data != nullptr) {
          accumulate_keys<Policy>(keys, k, slab_begin, item.plan.slab_keys, range, nq, s.probs, dout_rows, dvalue);
        }
        if (p.dkey.data != nullptr) {
          accumulate_keys<Policy>(keys, k, slab_begin, item.plan.slab_keys, range, nq, s.dscores, query_rows, dkey);
        }
      }
      // For the whole block of keys: add its part of dquery and of the gradients of the biases.
      if constexpr (Policy::kUsesAmx) {
        if (p.dvalue.data != nullptr) add_to_keys(keys, slab_begin, nq, s.probs, s.dout_rows, s, dvalue);
        if (p.dkey.data != nullptr) add_to_keys(keys, slab_begin, nq, s.dscores, s.query_rows, s, dkey);
        if (wants_dquery) {
          clear_unseen_pairs<Policy>(s.dscore_pairs, s.key.ranges, keys.count, vectors);
          add_sum_over_keys<Policy>(s.summed_key, head_dim, s.dscore_pairs, ones, keys.count, vectors, s.dquery,
                                    DoNothing{});
        }
      } else if (wants_dquery) {
        outer_block<Policy>(Policy::kParts > 0 ? s.summed_key.rows : s.key.rows.rows, head_dim, s.dscore_pairs, ones,
                            s.key.ranges, tiles, keys.count, vectors, s.dquery);
      }
      if (stores_pairs) {
        store_dbias_pairs<Policy>(p.dbias, queries, keys, s.dscore_pairs);
      } else if (s.dbias != nullptr) {
        clear_beyond<Lane>(s.dbias, keys.count, nq);
        with_bias_gradients<Policy>(
            p, b, h, [&](const auto& gradient) { accumulate_dbias<Lane>(gradient, queries, keys, s.dbias); });
      }
      if (p.drelative_bias.data != nullptr) {
        Lane* partial = item.partials.drelative_bias + head_index(p, item.chunk, b, h) * item.partials.row_relative;
        accumulate_drelative<Lane>(keys, vectors, s.dbias, partial + queries.begin + p.seqlen_k - 1);
      }
    } while (stream.next(keys));
  }

  // Write dquery, or add dquery to the sum of the slabs before this one.
  if (!wants_dquery) return is_exact;
  const Lane scale = static_cast<Lane>(p.scale);
  const Rows<Lane> sums = dquery_lanes(item, seq, b, h);
  if (sums.data != nullptr) {
    write_transposed<ElementPolicy<Lane, Lane, 1>>(s.dquery, nq, head_dim, scale, /*add=*/!is_first,
                                                   sums.data + queries.begin * sums.stride, sums.stride);
  } else {
    write_transposed<Policy>(s.dquery, nq, head_dim, scale, /*add=*/false, rows_of<Storage>(p.dquery, seq, queries),
                             p.dquery.stride_row);
  }
  return is_exact;
}

// Processes all query heads of one kv head with the item's chunk of keys, slab by slab, and writes dkey and dvalue of
// the chunk. Returns false if floats are multiplied in parts, and a dscore is NaN or infinite.
template <class Policy>
bool backward_kv_head(const BackwardItem<Policy>& item, int64_t b, int64_t kv_head) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const AttentionParams& p = item.p;
  const BackwardScratch<Policy>& s = item.scratch;
  const Sequence seq = sequence_of(p, b);
  const int head_dim = static_cast<int>(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t group_size = group_size_of(p);
  const int64_t first_head = kv_head * group_size;
  const int64_t chunk_stop = item.key_begin() + item.plan.chunk_keys;
  const int64_t chunk_end = chunk_stop < seq.seqlen_k ? chunk_stop : seq.seqlen_k;

  bool is_exact = true;
  const bool has_one_block = group_size == 1 && seq.seqlen_q > 0 && seq.seqlen_q <= kBlockQ;
  // The loop visits the first slab even if the slab has no key, because dquery must be written in any case.
  int64_t slab_begin = item.key_begin();
  do {
    const int64_t slab_stop = slab_begin + item.plan.slab_keys;
    const int64_t slab_end = slab_stop < chunk_end ? slab_stop : chunk_end;
    const int64_t count = slab_end > slab_begin ? slab_end - slab_begin : 0;
    const int64_t row = seq.k_offset + slab_begin;
    KeyGradient<Policy> dkey = {head_dim, static_cast<Lane>(p.scale), s.dkey, nullptr, p.dkey.stride_row};
    KeyGradient<Policy> dvalue = {value_dim, p.has_dropout ? static_cast<Lane>(p.dropout_scale) : Lane(1), s.dvalue,
                                  nullptr, p.dvalue.stride_row};
    if (has_one_block && p.dkey.data != nullptr) dkey.rows = row_of<Storage>(p.dkey, b, kv_head, row);
    if (has_one_block && p.dvalue.data != nullptr) dvalue.rows = row_of<Storage>(p.dvalue, b, kv_head, row);
    for (const KeyGradient<Policy>* gradient : {&dkey, &dvalue})
      clear_gradient(*gradient, count, item.plan.visits_all_keys);
    for (int64_t h = first_head; h < first_head + group_size; ++h) {
      for (int64_t q_begin = 0; q_begin < seq.seqlen_q; q_begin += kBlockQ) {
        const bool is_last = h + 1 == first_head + group_size && q_begin + kBlockQ >= seq.seqlen_q;
        if (is_last && count <= kMostPrefetchedKeys) prefetch_key_gradients<Policy>(p, b, kv_head, row, count);
        is_exact &=
            backward_block<Policy>(item, seq, query_block_of(seq, b, h, q_begin), slab_begin, slab_end, dkey, dvalue);
      }
    }
    if (!has_one_block && p.dkey.data != nullptr) {
      write_rows<Storage, Lane>(s.dkey, count, head_dim, dkey.factor, row_of<Storage>(p.dkey, b, kv_head, row),
                                p.dkey.stride_row);
    }
    if (!has_one_block && p.dvalue.data != nullptr) {
      write_rows<Storage, Lane>(s.dvalue, count, value_dim, dvalue.factor, row_of<Storage>(p.dvalue, b, kv_head, row),
                                p.dvalue.stride_row);
    }
    slab_begin = slab_stop;
  } while (slab_begin < chunk_end);

  // Round the sums of dquery in the scratch to the output.
  if constexpr (!kSame<Storage, Lane>) {
    if (!item.plan.sums_dquery) return is_exact;
    for (int64_t h = first_head; h < first_head + group_size; ++h) {
      write_rows<Storage, Lane>(dquery_lanes(item, seq, b, h).data, seq.seqlen_q, head_dim, Lane(1),
                                row_of<Storage>(p.dquery, b, h, seq.q_offset), p.dquery.stride_row);
    }
  }
  return is_exact;
}

}  // namespace
}  // namespace fused_attn::cpu
