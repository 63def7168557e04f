// Backward for few queries, as of a small window or of a few latents. The other kernel (backward_blocks.h) puts one
// query into each lane, so with few queries most lanes would be empty, and the transposition of queries and gradients
// would take longer than the products. Here the lanes of a vector are columns of a row, as in decode_forward.h, and
// nothing is transposed.
//
// A thread processes all queries of a head group, whose keys are the same, in two passes over the blocks of keys:
//
//   probs[key]   = exp(logit - largest)     logit from scale * sum over d of key[key][d] * query[d]
//   dprobs[key]  = sum over d of value[key][d] * dout[d]
//
//   dscores[key] = probs * (dprobs - delta + dlse)
//   dvalue[key]  = sum over queries of probs[key] * dout
//   dkey[key]    = sum over queries of dscores[key] * query * scale
//   dquery       = sum over keys of dscores[key] * key * scale
//
// `largest` is the largest logit of the keys so far. Between the passes, the sums over all keys give
// delta = sum of probs * dprobs, and divide the probs of a query by their sum. The logits have other rounding errors
// than those of forward, so their probs have another sum. If backward used forward's lse, the dscores of a query would
// not add up to 0, and the difference, multiplied by the mean of the keys, would be an error of dquery. An lse of 1e9
// would even be so far from the logits that the probs overflow.
#pragma once
#include "bias_gradients.h"
#include "decode_block.h"

namespace fused_attn::cpu {
namespace {

// A query of the head group.
template <class Lane>
struct DecodeRow {
  int64_t head;
  int64_t query;
  Lane dlse;        // the gradient by lse
  Lane largest;     // the largest logit of the keys so far and the sink
  Lane factor;      // 1 / sum of exp(logit - largest)
  Lane delta;       // sum of probs * dprobs
  Vec<Lane> sum;    // sum of exp(logit - largest), over the keys so far
  Vec<Lane> dprob;  // sum of exp(logit - largest) * dprobs, over the keys so far
};

// The memory in which one thread processes its work items. Rows of queries are padded to whole vectors.
template <class Policy>
struct DecodeBackwardScratch {
  using Lane = typename Policy::Lane;

  DecodeBlock<typename Policy::Storage> block;
  DecodeRow<Lane>* rows;  // [row]
  Lane* query;            // [row][head_dim], in the order of read_query
  Lane* dout;             // [row][value_dim], likewise
  Lane* query_rows;       // [row][head_dim], in the order of memory
  Lane* dout_rows;        // [row][value_dim], likewise
  Lane* block_largest;    // [block of keys][row], the `largest` that the probs of the block refer to
  Lane* probs;            // [block of keys][row][key of the block]
  Lane* dscores;          // as probs; dprobs before the second pass
  Lane* derivative;       // as probs: the derivative of the softcap
  Lane* dquery;           // [row][head_dim]

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p) {
    const int64_t count = group_size_of(p) * p.seqlen_q;
    const int64_t head_lanes = count * round_up(p.head_dim, kLanes<Lane>);
    const int64_t value_lanes = count * round_up(p.value_dim, kLanes<Lane>);
    const int64_t block_rows = round_up(p.seqlen_k, kBlockK) / kBlockK * count;
    const int64_t scores = block_rows * kScoreRow<Lane>;
    block.layout(arena);
    rows = arena.take<DecodeRow<Lane>>(count);
    query = arena.take<Lane>(head_lanes);
    dout = arena.take<Lane>(value_lanes);
    query_rows = kWidensPairs<Policy> ? arena.take<Lane>(head_lanes) : query;
    dout_rows = kWidensPairs<Policy> ? arena.take<Lane>(value_lanes) : dout;
    block_largest = arena.take<Lane>(block_rows);
    probs = arena.take<Lane>(scores);
    dscores = arena.take<Lane>(scores);
    derivative = arena.take<Lane>(p.softcap > 0 ? scores : 0);
    dquery = arena.take<Lane>(head_lanes);
  }
};

// Copies a row of `dim` elements as lanes, in the order of read_query, and in the order of memory.
template <class Policy>
FA_INLINE void read_row(const typename Policy::Storage* row, int dim, typename Policy::Lane* lanes,
                        typename Policy::Lane* in_order) {
  using Lane = typename Policy::Lane;
  read_query<Policy>(row, dim, lanes);
  if constexpr (kWidensPairs<Policy>) {
    for (int d = 0; d < dim; d += kLanes<Lane>) store<Lane>(in_order + d, load_lanes<Policy>(row, d, dim));
  }
}

// Replaces the logits of a block of keys by exp(logit - largest), and adds them to the sums of the row.
template <class Policy>
FA_NOINLINE void make_probs(int count, const typename Policy::Lane* dprobs, typename Policy::Lane* probs,
                            DecodeRow<typename Policy::Lane>& row) {
  using Lane = typename Policy::Lane;
  const Lane rescale = decode_softmax<Policy>(count, probs, row.largest, row.sum);
  Vec<Lane> dprob = row.dprob * rescale;
  for (int k = 0; k < count; k += kLanes<Lane>) {
    const Vec<Lane> prob = load<Lane>(probs + k);
    dprob += select<Lane>(prob == 0, Vec<Lane>{}, prob * load<Lane>(dprobs + k));  // a hidden value may be NaN
  }
  row.dprob = dprob;
}

// Divides the probs of a row by their sum, and replaces dprobs by dscores, for a block of keys whose probs refer to
// block_largest.
template <class Lane>
FA_NOINLINE void make_dscores(int count, const DecodeRow<Lane>& row, Lane block_largest, Lane* probs, Lane* dscores) {
  const Lane factor = row.factor * natural_exp(block_largest - row.largest);
  for (int k = 0; k < count; k += kLanes<Lane>) {
    const Vec<Lane> prob = load<Lane>(probs + k) * factor;
    const Vec<Lane> x = prob * (load<Lane>(dscores + k) - row.delta + row.dlse);
    store<Lane>(probs + k, prob);
    store<Lane>(dscores + k, select<Lane>(prob == 0, Vec<Lane>{}, x));
  }
}

// Stores or adds dscores of one row and a block of keys in a row of the gradient of a bias.
template <class Lane, class Entry>
FA_NOINLINE void put_bias_gradient(const BiasGradient<Entry>& gradient, const KeyBlock& keys, const Lane* dscores,
                                   int64_t stride_col, Entry* row) {
  constexpr int n = kLanes<Lane>;
  int k = 0;
  if (stride_col == 0) {
    Vec<Lane> sum = {};
    for (; k < keys.count; k += n) sum += load<Lane>(dscores + k);  // zero behind the last key
    gradient.template put<Lane>(row, sum_lanes<Lane>(sum));
  } else if (stride_col == 1 && keys.contiguous) {
    Entry* first = row + keys.index[0];
    for (; k + n <= keys.count; k += n) gradient.template put<Lane>(first + k, load<Lane>(dscores + k), n);
  }
  for (; k < keys.count; ++k) gradient.template put<Lane>(row + keys.index[k] * stride_col, dscores[k]);
}

// Where dkey or dvalue of one head goes.
template <class Policy>
struct KeyGradientRows {
  typename Policy::Storage* rows;  // the row of key 0; null = the gradient is not wanted
  int64_t stride_row;
  int dim;                       // the number of columns
  typename Policy::Lane factor;  // the factor of every sum

  // Sets the rows of keys [0, count) to zero.
  void clear(int64_t count) const {
    for (int64_t j = 0; rows != nullptr && j < count; ++j) {
      memset(static_cast<void*>(rows + j * stride_row), 0, dim * sizeof(typename Policy::Storage));
    }
  }
};

// Stores kColumns vectors of a gradient, from column d on, of up to kKeys keys of a block, from key k on: factor * sum
// over the `count` rows of coefficients[row][key] * rows[row].
template <class Policy, int kKeys, int kColumns>
FA_INLINE void key_gradient_tile(const KeyBlock& keys, int k, int d, const typename Policy::Lane* coefficients,
                                 const typename Policy::Lane* rows, int64_t count,
                                 const KeyGradientRows<Policy>& gradient) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const int64_t row = round_up(gradient.dim, n);
  Vec<Lane> acc[kKeys][kColumns] = {};
  for (int64_t q = 0; q < count; ++q) {
    Vec<Lane> x[kColumns];
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) x[c] = load<Lane>(rows + q * row + d + c * n);
    FA_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      const Vec<Lane> coefficient = broadcast<Lane>(coefficients[q * kScoreRow<Lane> + k + i]);
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[i][c] = coefficient * x[c] + acc[i][c];
    }
  }
  FA_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    if (k + i >= keys.count) return;
    typename Policy::Storage* target = gradient.rows + keys.index[k + i] * gradient.stride_row + d;
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      store_as<Lane>(target + c * n, acc[i][c] * gradient.factor, gradient.dim - d - c * n);
    }
  }
}

// Calls key_gradient_tile for all keys of a block. Narrow tiles have twice as many keys: with four, 8 queries and 128
// keys of head dim 32 took 1.2 of the time.
template <class Policy, int kColumns>
FA_NOINLINE void write_key_columns(const KeyBlock& keys, int d, const typename Policy::Lane* coefficients,
                                   const typename Policy::Lane* rows, int64_t count,
                                   const KeyGradientRows<Policy>& gradient) {
  int k = 0;
  if constexpr (2 * kColumns <= kTileVectors) {
    for (; k + 4 < keys.count; k += 8) {
      key_gradient_tile<Policy, 8, kColumns>(keys, k, d, coefficients, rows, count, gradient);
    }
  }
  for (; k < keys.count; k += 4) {
    key_gradient_tile<Policy, 4, kColumns>(keys, k, d, coefficients, rows, count, gradient);
  }
}

// Stores the gradient of a block of keys.
template <class Policy>
void write_key_gradient(const KeyBlock& keys, const typename Policy::Lane* coefficients,
                        const typename Policy::Lane* rows, int64_t count, const KeyGradientRows<Policy>& gradient) {
  constexpr int n = kLanes<typename Policy::Lane>;
  int d = 0;
  const auto tiles = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    for (; d + (kColumns - 1) * n < gradient.dim; d += kColumns * n) {
      write_key_columns<Policy, kColumns>(keys, d, coefficients, rows, count, gradient);
    }
  };
  if (gradient.rows == nullptr) return;
  if constexpr (kTileVectors == 4) tiles(Constant<4>{});
  tiles(Constant<2>{});
  tiles(Constant<1>{});
}

// Reads the rows of the head group of one kv head into the scratch.
template <class Policy>
void read_rows(const AttentionParams& p, const Sequence& seq, int64_t b, int64_t kv_head,
               const DecodeBackwardScratch<Policy>& s) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const int head_dim = static_cast<int>(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t head_row = round_up(head_dim, kLanes<Lane>);
  const int64_t value_row = round_up(value_dim, kLanes<Lane>);
  const int64_t group_size = group_size_of(p);
  for (int64_t r = 0, h = kv_head * group_size; h < (kv_head + 1) * group_size; ++h) {
    for (int64_t i = 0; i < seq.seqlen_q; ++i, ++r) {
      const int64_t row = seq.q_offset + i;
      const Lane lse = *row_of<const Lane>(p.lse, b, h, row);
      const bool is_empty = lse == -FloatTraits<Lane>::kInfinity;
      const Lane dlse = p.dlse.data == nullptr || is_empty ? 0 : *row_of<const Lane>(p.dlse, b, h, row);
      const Lane sink = sink_of<Lane>(p, h), lowest = FloatTraits<Lane>::kLowest;
      const Lane largest = sink > lowest ? sink : lowest;
      s.rows[r] = {h, i, dlse, largest, 0, 0, Vec<Lane>{}, Vec<Lane>{}};
      read_row<Policy>(row_of<const Storage>(p.query, b, h, row), head_dim, s.query + r * head_row,
                       s.query_rows + r * head_row);
      read_row<Policy>(row_of<const Storage>(p.dout, b, h, row), value_dim, s.dout + r * value_row,
                       s.dout_rows + r * value_row);
      memset(s.dquery + r * head_row, 0, head_row * sizeof(Lane));
    }
  }
}

// Computes the factor and delta of a row from the sums over all keys.
template <class Lane>
void finish_row(const AttentionParams& p, DecodeRow<Lane>& row) {
  Lane sum = sum_lanes<Lane>(row.sum);
  sum += natural_exp(sink_of<Lane>(p, row.head) - row.largest);
  row.factor = sum == 0 ? 0 : 1 / sum;
  row.delta = sum_lanes<Lane>(row.dprob) * row.factor;
}

// Stores the statistics of the rows of a head group, from which compute_dsinks computes dsinks: the largest logit as
// lse, and what the rest of the sum adds as its correction.
template <class Lane>
void store_statistics(const AttentionParams& p, int64_t b, const DecodeRow<Lane>* rows, int64_t count,
                      const RowStatistics<Lane>& statistics) {
  for (int64_t r = 0; r < count; ++r) {
    const RowStatistics<Lane> own = statistics.at(p, b, rows[r].head, rows[r].query);
    *own.lse = rows[r].largest;
    *own.correction = rows[r].factor > 0 ? natural_log(rows[r].factor) : 0;
    *own.delta = rows[r].delta;
    *own.dlse = rows[r].dlse;
    const bool is_last = r + 1 == count || rows[r + 1].head != rows[r].head;
    if (!is_last) continue;
    for (int64_t i = 1; (rows[r].query + i) % kLanes<Lane> != 0; ++i) {
      own.lse[i] = FloatTraits<Lane>::kInfinity;  // of queries that do not exist
      own.correction[i] = own.delta[i] = own.dlse[i] = 0;
    }
  }
}

// Computes probs and dscores of a row and a block of keys, and adds dscores to the gradients of the biases. `entry` is
// the number of the pair of block and row.
template <class Policy>
void finish_scores(const AttentionParams& p, int64_t b, const DecodeRow<typename Policy::Lane>& row, int64_t entry,
                   const BackwardPartials<typename Policy::Lane>& partials, const DecodeBackwardScratch<Policy>& s) {
  using Lane = typename Policy::Lane;
  const KeyBlock& keys = *s.block.keys;
  const int64_t first = entry * kScoreRow<Lane>;
  Lane* dscores = s.dscores + first;
  make_dscores<Lane>(keys.count, row, s.block_largest[entry], s.probs + first, dscores);
  with_bias_gradients<Policy>(p, b, row.head, [&](const auto& gradient) {
    put_bias_gradient<Lane>(gradient, keys, dscores, gradient.view.stride_col, gradient.row(b, row.head, row.query));
  });
  if (p.drelative_bias.data != nullptr) {
    Lane* drelative = partials.drelative_bias + head_index(p, 0, b, row.head) * partials.row_relative;
    const BiasGradient<Lane> sums = {p.drelative_bias, /*is_first=*/false};
    put_bias_gradient<Lane>(sums, keys, dscores, -1, drelative + row.query + p.seqlen_k - 1);
  }
  for (int k = 0; p.softcap > 0 && k < keys.count; k += kLanes<Lane>) {
    store<Lane>(dscores + k, load<Lane>(dscores + k) * load<Lane>(s.derivative + first + k));
  }
}

// Computes all gradients that the head group of one kv head contributes. If dsinks is wanted, `statistics` receives the
// statistics of the rows.
template <class Policy>
void decode_backward(const AttentionParams& p, bool visits_all_keys, const ValidKeys* valid_keys, int64_t b,
                     int64_t kv_head, const RowStatistics<typename Policy::Lane>& statistics,
                     const BackwardPartials<typename Policy::Lane>& partials, const DecodeBackwardScratch<Policy>& s) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const Sequence seq = sequence_of(p, b);
  const int head_dim = static_cast<int>(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t head_row = round_up(head_dim, n);
  const int64_t value_row = round_up(value_dim, n);
  const int64_t group_size = group_size_of(p);
  const int64_t rows = group_size * seq.seqlen_q;
  const Lane scale = static_cast<Lane>(p.scale);
  const auto key_gradient = [&](const TensorView& view, int dim, Lane factor) -> KeyGradientRows<Policy> {
    if (view.data == nullptr) return {nullptr, 0, dim, factor};
    return {row_of<Storage>(view, b, kv_head, seq.k_offset), view.stride_row, dim, factor};
  };
  const KeyGradientRows<Policy> dkey = key_gradient(p.dkey, head_dim, scale);
  const KeyGradientRows<Policy> dvalue = key_gradient(p.dvalue, value_dim, Lane(1));
  if (!visits_all_keys || rows == 0) {
    dkey.clear(seq.seqlen_k);
    dvalue.clear(seq.seqlen_k);
  }
  if (rows == 0) return;
  read_rows<Policy>(p, seq, b, kv_head, s);

  // The masks of the first head are those of all heads of the group.
  const QueryBlock queries = {b, kv_head * group_size, 0, static_cast<int>(seq.seqlen_q)};
  // Calls visit(the number of the pair of the block and row 0) for each block of keys. Returns the number of blocks.
  // If the caller knows that there is a single block, s.block still holds it.
  const KeyBlock& keys = *s.block.keys;
  const HeadRows<Storage> key_rows = {s.block.key_rows, 0};
  const HeadRows<Storage> value_rows = {s.block.value_rows, 0};
  const auto visit_blocks = [&](bool is_single, const auto& visit) {
    int64_t blocks = 0;
    KeyStream stream(p, seq, valid_keys, queries, 0, seq.seqlen_k, /*step=*/1);
    const RowSource<Storage> key_source = row_source<Storage>(p, p.key, seq, b, kv_head);
    const RowSource<Storage> value_source = row_source<Storage>(p, p.value, seq, b, kv_head);
    for (; is_single ? blocks == 0 : s.block.next(stream, key_source, value_source); ++blocks) {
      visit(blocks * rows);
    }
    return blocks;
  };

  const bool prefetches = key_value_bytes<Storage>(p) > kCachedBytes;
  const auto first_pass = [&](int64_t first) {
    visit_in_passes<Lane>(rows, [&](int64_t r, auto queries) {
      constexpr int kQueries = decltype(queries)::value;
      const int64_t entry = (first + r) * kScoreRow<Lane>;
      multiply_keys<Policy, kQueries>(s.query + r * head_row, head_row, key_rows, keys.count, head_dim,
                                      prefetches && r == 0 ? value_rows : HeadRows<Storage>{}, scale, s.probs + entry);
      multiply_keys<Policy, kQueries>(s.dout + r * value_row, value_row, value_rows, keys.count, value_dim, {}, Lane(1),
                                      s.dscores + entry);
    });
    for (int64_t r = 0; r < rows; ++r) {
      DecodeRow<Lane>& row = s.rows[r];
      const int64_t entry = (first + r) * kScoreRow<Lane>;
      Lane* derivative = p.softcap > 0 ? s.derivative + entry : nullptr;
      make_logits<Policy>(p, b, row.head, row.query, keys, s.probs + entry, derivative);
      make_probs<Policy>(keys.count, s.dscores + entry, s.probs + entry, row);
      s.block_largest[first + r] = row.largest;
    }
  };
  const int64_t blocks = visit_blocks(/*is_single=*/false, first_pass);
  for (int64_t r = 0; r < rows; ++r) finish_row<Lane>(p, s.rows[r]);
  if (p.dsinks.data != nullptr) store_statistics<Lane>(p, b, s.rows, rows, statistics);

  const auto second_pass = [&](int64_t first) {
    for (int64_t r = 0; r < rows; ++r) {
      finish_scores<Policy>(p, b, s.rows[r], first + r, partials, s);
    }
    const Lane* dscores = s.dscores + first * kScoreRow<Lane>;
    write_key_gradient<Policy>(keys, s.probs + first * kScoreRow<Lane>, s.dout_rows, rows, dvalue);
    write_key_gradient<Policy>(keys, dscores, s.query_rows, rows, dkey);
    if (p.dquery.data == nullptr) return;
    visit_in_passes<Lane>(rows, [&](int64_t r, auto queries) {
      constexpr int kQueries = decltype(queries)::value;
      sum_values<Policy, kQueries>(key_rows, {}, dscores + r * kScoreRow<Lane>, keys.count, head_dim,
                                   /*rescale=*/nullptr, s.dquery + r * head_row, head_row);
    });
  };
  visit_blocks(/*is_single=*/blocks == 1, second_pass);

  for (int64_t r = 0; p.dquery.data != nullptr && r < rows; ++r) {
    Storage* target = row_of<Storage>(p.dquery, b, s.rows[r].head, seq.q_offset + s.rows[r].query);
    for (int d = 0; d < head_dim; d += n) {
      store_as<Lane>(target + d, load<Lane>(s.dquery + r * head_row + d) * scale, head_dim - d);
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
