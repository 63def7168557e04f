// The forward kernel for many queries. A work item is a block of kBlockQ queries of one head. The kernel loops over the
// blocks of keys that these queries see, and computes for each of them:
//
//   scores^T[key][query] = key[key] . query^T                       (scores.h)
//   probs^T[key][query]  = exp(scores^T - reference)                (softmax.h)
//   acc^T[d][query]      = acc^T * rescale + value^T[d] . probs^T   (outer_block)
//
// After the last block of keys, out = transpose(acc^T) / (sum over keys of probs^T). With AMX, tiles compute both
// products (amx_products.h). Those of floats take longer than the softmax, so vectors compute the softmax of a block
// while tiles multiply the values of the block before it.
#pragma once
#include <memory>

#include "amx_products.h"
#include "denormals.h"
#include "kernels.h"
#include "parallel.h"
#include "scores.h"
#include "softmax.h"

namespace fused_attn::cpu {
namespace {

// The memory in which one thread processes its work items.
template <class Policy>
struct ForwardScratch {
  using Lane = typename Policy::Lane;

  KeyScratch<Policy> key;   // what depends on the current block of keys
  RowsToSum<Policy> value;  // the values of the current block of keys
  Lane* query;              // query^T [lanes of head_dim][stride], as ScoreInputs
  Lane* probs[2];           // probs^T [part][key, or pair of keys, of the block][stride], after dropout; see kDelays
  Lane* acc;                // acc^T [value_dim, padded to a vector][stride]

  // Takes the memory of all arrays out of the arena. `visits` is the number of query blocks that a thread processes
  // with one kv head before it goes to the next kv head.
  void layout(Arena& arena, const AttentionParams& p, int64_t visits) {
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t value_row = round_up(p.value_dim, kLanes<Lane>);
    const int64_t stride = largest_stride<Lane>(p);
    key.layout(arena, p, visits);
    value.layout(arena, p, static_cast<int>(p.value_dim), visits);
    query = arena.take<Lane>(column_lanes<Policy>(head_dim, stride));
    constexpr int64_t kParts = Policy::kParts > 1 ? Policy::kParts : 1;
    probs[0] = arena.take<Lane>(kParts * part_lanes<Policy>(stride));
    probs[1] = arena.take<Lane>(kParts > 1 ? kParts * part_lanes<Policy>(stride) : 0);
    acc = arena.take<Lane>(value_row * stride);
  }
};

// Prefetches the values of the tile that begins at key k of the block, and the keys of a later tile, of `count` keys of
// the block. The products read several rows side by side, or columns, which the hardware does not foresee.
template <class Policy>
FA_INLINE void prefetch_tile(const ForwardScratch<Policy>& s, int k, int count, int64_t key_bytes,
                             int64_t value_bytes) {
  constexpr int kAhead = 4 * kTileKeys;  // the products of so many keys take as long as memory
  for (int r = 0; r < kTileKeys; ++r) {
    for (int64_t byte = 0; byte < value_bytes; byte += kCacheLine) prefetch_bytes(s.value.rows[k + r], byte);
    if (k + kAhead >= count) continue;
    for (int64_t byte = 0; byte < key_bytes; byte += kCacheLine) prefetch_bytes(s.key.rows.rows[k + kAhead + r], byte);
  }
}

// Computes the probs of kTiles tiles: their keys, from key k of the block on, and kColumns vectors of queries from
// vector v on. Stores the probs after dropout in `probs`, and adds the probs before dropout to the sums of the softmax.
// kPlain: every key of the tiles is visible, scores have no other terms than products, and there is neither dropout nor
// row_max. So the compiler leaves out all code for these features. With more than one tile, results have the same bits
// as tile by tile.
template <class Policy, int kColumns, bool kPlain, int kTiles = 1>
FA_NOINLINE void forward_tile(const ScoreInputs<Policy>& in, int k, int v, bool partial, bool dropout,
                              const ForwardScratch<Policy>& s, typename Policy::Lane* probs,
                              RunningSoftmax<Policy>& softmax) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  constexpr int kKeys = kTiles * kTileKeys;
  Vec<Lane> acc[kKeys][kColumns];
  compute_scores<Policy, kColumns, kPlain>(in, k, v, partial, nullptr, acc);
  if constexpr (!kPlain) {
    if (softmax.tracks_max) softmax.track_max(acc, v);
  }

  // `excess` says by how much the scores of the tile exceed the ceilings of their rows. A score that is NaN does not
  // change the maximum, and a difference that is NaN (inf - inf) does not change the excess. So a NaN in one row does
  // not keep the references of other rows from rising. The row of the NaN becomes NaN in exp2.
  Vec<Lane> excess = {};
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const Vec<Lane> ceiling = softmax.ceiling(v + c);
    Vec<Lane> maximum = ceiling;
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) maximum = max<Lane>(acc[r][c], maximum);
    excess = max<Lane>(maximum - ceiling, excess);
  }
  if (__builtin_expect(any_positive<Lane>(excess), 0)) {
    if constexpr (kTiles > 1) {
      for (int t = 0; t < kTiles; ++t)
        forward_tile<Policy, kColumns, kPlain>(in, k + t * kTileKeys, v, partial, dropout, s, probs, softmax);
      return;
    }
    // Some score is so large that the reference of its row must rise, which is rare. Only here are the scores stored in
    // an array. If they stayed in registers during the call of raise(), the compiler would spill the accumulators of
    // every tile, also of tiles that do not call raise().
    alignas(kVectorBytes) Lane scores[kKeys * kColumns * n];
    Vec<Lane> maxima[kColumns];
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      maxima[c] = softmax.reference[v + c];
      FA_UNROLL
      for (int r = 0; r < kKeys; ++r) {
        maxima[c] = max<Lane>(acc[r][c], maxima[c]);
        store<Lane>(scores + (r * kColumns + c) * n, acc[r][c]);
      }
    }
    softmax.raise(maxima, v, kColumns, probs, k / Policy::kFactorsPerLane);
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = load<Lane>(scores + (r * kColumns + c) * n);
    }
  }

  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const int64_t offset = k * in.stride + (v + c) * n;
    const auto after_dropout = [&](int r) {
      if (kPlain || !dropout) return acc[r][c];
      return select_or_zero<Lane>(*reinterpret_cast<const IntVec<Lane>*>(s.key.dropout_keep + offset + r * in.stride),
                                  acc[r][c]);
    };
    Vec<Lane> sum = {};
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      acc[r][c] = prob_of<Policy>((acc[r][c] - softmax.reference[v + c]) * softmax.to_log2);
      sum += acc[r][c];
      if ((r + 1) % kTileKeys != 0) continue;
      softmax.sum.block[v + c] += sum;  // tile by tile, so that the order of additions is always the same
      sum = Vec<Lane>{};
    }
    if constexpr (Policy::kParts == 0) {
      FA_UNROLL
      for (int r = 0; r < kKeys; ++r) store<Lane>(probs + offset + r * in.stride, after_dropout(r));
    } else if constexpr (Policy::kParts > 1) {
#if defined(__AMX_BF16__)
      FA_UNROLL
      for (int r = 0; r < kKeys; r += 2) {
        store_pairs_of_parts(after_dropout(r), after_dropout(r + 1), part_lanes<Policy>(in.stride),
                             probs + (k + r) / 2 * factor_stride<Policy>(in.stride) + (v + c) * n);
      }
#endif
    } else {
#if defined(__AVX512BF16__)
      Vec<Lane> rounded_sum = {};
      FA_UNROLL
      for (int r = 0; r < kKeys; r += 2) {
        Vec<Lane> pairs = round_to_pairs(acc[r][c], acc[r + 1][c]);
        rounded_sum = add_pairs(rounded_sum, pairs);
        if (!kPlain && dropout) pairs = round_to_pairs(after_dropout(r), after_dropout(r + 1));
        store<Lane>(probs + (k + r) / 2 * in.stride + (v + c) * n, pairs);
        if ((r + 2) % kTileKeys != 0) continue;
        softmax.rounded_sum.block[v + c] += rounded_sum;
        rounded_sum = Vec<Lane>{};
      }
#endif
    }
  }
}

// Writes the output of a block of queries: acc, divided by the sums of the softmax and transposed. Writes lse and
// row_max of these queries if the caller wants them.
template <class Policy>
FA_NOINLINE void write_output(const AttentionParams& p, const Sequence& seq, const QueryBlock& queries,
                              const typename Policy::Lane* acc, typename Policy::Lane to_logits,
                              const RunningSoftmax<Policy>& softmax) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int nq = queries.count;
  const int64_t stride = round_up(nq, n);
  Lane* lse = p.lse.data != nullptr ? rows_of<Lane>(p.lse, seq, queries) : nullptr;
  Lane* row_max = p.row_max.data != nullptr ? rows_of<Lane>(p.row_max, seq, queries) : nullptr;
  const Lane dropout_scale = p.has_dropout ? static_cast<Lane>(p.dropout_scale) : Lane(1);
  Vec<Lane> factors[kBlockVectors<Lane>];

  for (int q = 0; q < nq; q += n) {
    const int v = q / n;
    Vec<Lane> total = softmax.sum.row[v];
    Vec<Lane> denominator = softmax.multiplied_sum().row[v];
    Vec<Lane> reference = softmax.reference[v] * to_logits;
    Vec<Lane> factor = broadcast<Lane>(dropout_scale);
    if (p.sinks.data != nullptr) {
      // The sink is added to the denominator only, so it can be added after the loop over the keys.
      const Vec<Lane> sink = broadcast<Lane>(sink_of<Lane>(p, queries.h));
      const Vec<Lane> keys_reference = reference;
      reference = max<Lane>(sink, keys_reference);
      const Vec<Lane> shift = exp2<Lane>((keys_reference - reference) * Lane(kLog2E));
      const Vec<Lane> sink_probability = exp2<Lane>((sink - reference) * Lane(kLog2E));
      total = total * shift + sink_probability;
      denominator = denominator * shift + sink_probability;
      factor = factor * shift;
    }
    factors[v] = factor / denominator;
    if (lse != nullptr) {
      const Vec<Lane> none = broadcast<Lane>(-FloatTraits<Lane>::kInfinity);
      const Vec<Lane> value = select<Lane>(softmax.sum.row[v] == 0, none, reference + log(total));
      for (int i = 0; i < n && q + i < nq; ++i) lse[(q + i) * p.lse.stride_row] = value[i];
    }
    for (int i = 0; row_max != nullptr && i < n && q + i < nq; ++i) {
      const Lane sum = softmax.sum.row[v][i];
      // A maximum ignores logits that are NaN, but a sum does not.
      row_max[q + i] = sum == sum ? softmax.row_max[v][i] * to_logits : sum;
    }
  }
  // The sum of a row that sees no key is 0. Its output is 0 and its lse is -inf, even if there is a sink.
  const auto column = [&](int d, int q) {
    const Vec<Lane> x = load<Lane>(acc + d * stride + q) * factors[q / n];
    return select<Lane>(softmax.sum.row[q / n] == 0, Vec<Lane>{}, x);
  };
  unpack_columns<Policy>(column, nq, static_cast<int>(p.value_dim), /*add=*/false,
                         rows_of<Storage>(p.out, seq, queries), p.out.stride_row);
}

// Processes one work item: attention of the queries [q_begin, q_begin + kBlockQ) of head (b, h) over all keys. Returns
// false, and writes nothing, if the policy has parts and vectors have to multiply: where parts do not pay, or if a
// result is NaN or infinite, because an infinite float has no parts.
template <class Policy>
bool forward_block(const AttentionParams& p, const RelativeBias<typename Policy::Lane>& relative,
                   const ValidKeys* valid_keys, int64_t b, int64_t h, int64_t q_begin,
                   const ForwardScratch<Policy>& s) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const Sequence seq = sequence_of(p, b);
  if (q_begin >= seq.seqlen_q) return true;
  if (Policy::kParts > 1 && !multiplies_parts<Policy>(p, seq)) return false;
  const QueryBlock queries = query_block_of(seq, b, h, q_begin);
  const int nq = queries.count;
  const Storage* const query = rows_of<const Storage>(p.query, seq, queries);
  [[maybe_unused]] const MatrixRegisters<Policy> registers;
  const int vectors = (nq + kLanes<Lane> - 1) / kLanes<Lane>;
  const int panels = (vectors + kTileVectors - 1) / kTileVectors;
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t kv_head = kv_head_of(p, h);
  const RowSource<Storage> values = row_source<Storage>(p, p.value, seq, b, kv_head);

#if defined(__AMX_BF16__)
  if constexpr (Policy::kParts > 1) {
    if (!have_parts(query, p.query.stride_row, nq, static_cast<int>(p.head_dim))) return false;
  }
#endif
  pack_columns<Policy>(query, p.query.stride_row, nq, static_cast<int>(p.head_dim), s.query);
  ScoreInputs<Policy> in = score_inputs<Policy>(p, relative, queries);
  in.query = s.query;
  RunningSoftmax<Policy> softmax(static_cast<Lane>((in.raw ? p.scale : 1.0) * kLog2E), vectors,
                                 p.row_max.data != nullptr);
  clear_columns<Lane>(s.acc, value_dim, vectors);

  // Where rows are converted, they are read in order, so the hardware prefetches them. On a Xeon with AVX-512, float32
  // calls with 16 queries and 4096 keys of 8 heads took 0.72 of the time (head dim 128), with 64 queries 0.84. If all
  // rows are in the cache, prefetches only take time: 64 queries and keys took 1.03 of the time, 16 queries and 128
  // keys 1.07. The same is true if several blocks of queries read the rows of a head, and these fit into the cache: 512
  // queries and keys of two batch entries, of which one is half padded, took 1.05 of the time.
  constexpr bool kReadsMemory = !Policy::kConverts && Policy::kParts == 0;
  const int64_t heads_in_cache = p.seqlen_q > kBlockQ ? p.batch * p.num_kv_heads : 1;
  const bool prefetches = kReadsMemory && key_value_bytes<Storage>(p) > heads_in_cache * kCachedBytes;
  const int64_t row_bytes = p.head_dim * static_cast<int64_t>(sizeof(Storage));
  const int64_t value_row_bytes = p.value_dim * static_cast<int64_t>(sizeof(Storage));
  const auto prefetch = [&](int k, int count) {
    if constexpr (kReadsMemory) {
      if (prefetches) prefetch_tile(s, k, count, row_bytes, value_row_bytes);
    }
  };
  // Whether AMX multiplies the values of a block of keys while vectors compute the softmax of the next block.
  constexpr bool kDelays = Policy::kParts > 1;
  Vec<Lane> delayed_rescale[kBlockVectors<Lane>];
  const Vec<Lane>* const rescale = kDelays ? delayed_rescale : softmax.rescale;
  int delayed = 0;  // the keys of the block before, if their values have not been multiplied yet
  Lane* probs = s.probs[0];
  const auto add_values = [&](const Lane* coefficients, int count, const auto& meanwhile) {
    add_sum_over_keys<Policy>(s.value, value_dim, coefficients, rescale, count, vectors, s.acc, meanwhile);
  };
  KeyBlock& keys = *s.key.keys;
  KeyStream stream(p, seq, valid_keys, queries, 0, seq.seqlen_k, kKeyStep<Policy>);
  while (stream.next(keys)) {
    prepare_keys<Policy>(p, seq, queries, s.key, in);
    if (!kDelays) s.value.find(values, keys, value_dim);

    const int tiles = (keys.count + kTileKeys - 1) / kTileKeys;
    softmax.begin_block();
    const bool is_plain = in.has_no_other_terms() && !p.has_dropout && !softmax.tracks_max;
    const MaskPrefetcher<Policy> masks(p, queries, keys, seq.seqlen_k);
    const auto prefetch_for = [&](int t) {
      prefetch(t * kTileKeys, tiles * kTileKeys);
      masks.prefetch(t, tiles);
    };
    int t = 0;  // the next tile
    const auto compute_tile = [&] {
      if (t >= tiles) return;
      prefetch_for(t);
      // A block that fills at most half of a tile takes two tiles at once, because one has too few sums: each
      // multiply-add would wait for an earlier one. The first tile often raises the references, which two tiles at once
      // do slowly.
      if (2 * vectors <= kTileVectors && t > 0 && is_plain && !keys.partial && (t + 2) * kTileKeys <= keys.count) {
        with_columns(vectors, [&](auto columns) {
          constexpr int kColumns = decltype(columns)::value;
          if constexpr (2 * kColumns <= kTileVectors) {
            forward_tile<Policy, kColumns, /*kPlain=*/true, 2>(in, t * kTileKeys, 0, /*partial=*/false,
                                                               /*dropout=*/false, s, probs, softmax);
          }
        });
        s.key.ranges[t] = s.key.ranges[t + 1] = {0, vectors};
        prefetch_for(t + 1);
        t += 2;
        return;
      }
      bool partial;
      const VectorRange range = tile_range<Lane>(keys, t * kTileKeys, stream.valid_queries(), vectors, partial);
      s.key.ranges[t] = range;
      for (int panel = 0; panel < panels; ++panel) {
        const VectorRange part = clip_to_panel(range, panel);
        if (part.begin >= part.end) continue;
        with_columns(part.end - part.begin, [&](auto columns) {
          constexpr int kColumns = decltype(columns)::value;
          if (partial || !is_plain) {
            forward_tile<Policy, kColumns, /*kPlain=*/false>(in, t * kTileKeys, part.begin, partial, p.has_dropout, s,
                                                             probs, softmax);
          } else {
            forward_tile<Policy, kColumns, /*kPlain=*/true>(in, t * kTileKeys, part.begin, /*partial=*/false,
                                                            /*dropout=*/false, s, probs, softmax);
          }
        });
      }
      ++t;
    };
    Lane* const other_probs = probs == s.probs[0] ? s.probs[1] : s.probs[0];
    if constexpr (kDelays) {
      if (delayed > 0) add_values(other_probs, delayed, compute_tile);
    }
    while (t < tiles) compute_tile();
    softmax.end_block();
    if constexpr (Policy::kUsesAmx) clear_unseen_pairs<Policy>(probs, s.key.ranges, keys.count, vectors);
    if constexpr (kDelays) {
      s.value.find(values, keys, value_dim);
      for (int v = 0; v < vectors; ++v) delayed_rescale[v] = softmax.rescale[v];
      delayed = keys.count;
      probs = other_probs;
    } else if constexpr (Policy::kUsesAmx) {
      add_values(probs, keys.count, DoNothing{});
    } else {
      outer_block<Policy>(s.value.rows, value_dim, probs, softmax.rescale, s.key.ranges, tiles, keys.count, vectors,
                          s.acc);
    }
  }
  if constexpr (kDelays) {
    if (delayed > 0) add_values(probs == s.probs[0] ? s.probs[1] : s.probs[0], delayed, DoNothing{});
  }
#if defined(__AMX_BF16__)
  if constexpr (Policy::kParts > 1) {
    unsigned infinite = 0;
    for (int v = 0; v < vectors; ++v) infinite |= infinite_lanes(softmax.sum.row[v]);
    for (int64_t i = 0; i < value_dim * in.stride; i += kLanes<Lane>) infinite |= infinite_lanes(load<Lane>(s.acc + i));
    if (infinite != 0) return false;
  }
#endif
  write_output<Policy>(p, seq, queries, s.acc, in.to_logits(), softmax);
  return true;
}

// Forward for many queries: allocates the scratch and processes all work items on threads.
template <class Policy>
void forward_blocks(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  const int64_t blocks = (p.seqlen_q + kBlockQ - 1) / kBlockQ;
  const int64_t items = p.batch * p.num_heads * blocks;
  if (items == 0) return;
  const double flops = 2.0 * static_cast<double>(p.batch * p.num_heads) * static_cast<double>(p.seqlen_q) *
                       static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim + p.value_dim);
  const int threads = choose_threads(p.num_threads, items, flops);

  const Buffer valid_keys_memory(valid_keys_bytes(p));
  const Buffer relative_memory(relative_bias_bytes<Lane>(p));
  // A thread visits one kv head with as many query blocks as its head group has, but with no more than its share.
  const int64_t group_blocks = group_size_of(p) * blocks;
  const int64_t share = items / threads;
  const int64_t visits = group_blocks < share ? group_blocks : share;
  const std::unique_ptr<ForwardScratch<Policy>[]> scratch(new ForwardScratch<Policy>[threads]);
  // For the items that vectors multiply.
  constexpr bool kHasParts = Policy::kParts > 1;
  const std::unique_ptr<ForwardScratch<LanePolicy<Policy>>[]> lane_scratch(
      new ForwardScratch<LanePolicy<Policy>>[kHasParts ? threads : 0]);
  const Buffer memory([&](Arena& arena) {
    for (int thread = 0; thread < threads; ++thread) {
      scratch[thread].layout(arena, p, visits);
      if (kHasParts) lane_scratch[thread].layout(arena, p, visits);
    }
  });
  const ValidKeys* valid_keys = make_valid_keys(p, valid_keys_memory.data());
  const RelativeBias<Lane> relative = make_relative_bias<Lane>(p, relative_memory.data());

  // Neighbouring items are query blocks of the same head, so that the keys and values of the head stay in the cache. At
  // head dim 128, this saves 8-10 % of the time. The last query block of a head comes first, because under a causal
  // mask it takes longest.
  parallel_for(threads, items, [&](int64_t item, int thread) {
    const FlushDenormalResults flush;
    const int64_t head = item / blocks;
    const int64_t block = blocks - 1 - item % blocks;
    const int64_t b = head / p.num_heads, h = head % p.num_heads;
    const bool is_done = forward_block<Policy>(p, relative, valid_keys, b, h, block * kBlockQ, scratch[thread]);
    if constexpr (kHasParts) {
      if (!is_done)
        forward_block<LanePolicy<Policy>>(p, relative, valid_keys, b, h, block * kBlockQ, lane_scratch[thread]);
    }
  });
}

}  // namespace
}  // namespace fused_attn::cpu
