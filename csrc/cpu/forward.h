// The forward kernel. A work item is kBlockQ queries of one head:
//
//   S^T[key][query]  = K[key] . Q^T           (scores.h)        row_max: online maximum, once per block of keys
//   P[key][query]    = exp(S - row_max)                         row_sum: sum over keys
//   O^T[d][query]    = O^T * alpha + V^T[d] . P                 (outer_block)
//   out              = transpose(O^T) / row_sum
#pragma once
#include "kernels.h"
#include "scores.h"

namespace fused_attn::cpu {
namespace {

template <class P>
struct ForwardScratch {
  using Lane = typename P::Lane;

  KeyScratch<P> key;
  const char** value_rows;
  Lane* value_lanes;
  Lane* query;    // [head lanes][kBlockQ]
  Lane* scores;   // [key of the block][kBlockQ]
  Lane* weights;  // P: over the scores, or as pairs of keys beside them
  Lane* acc;      // O^T [value_dim, padded to a vector][kBlockQ]

  void layout(Arena& arena, const AttentionParams& p) {
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t value_row = round_up(p.value_dim, kLanes<Lane>);
    const int64_t tile = KeyScratch<P>::kRows * kBlockQ;
    key.layout(arena, p);
    value_rows = arena.take<const char*>(KeyScratch<P>::kRows);
    value_lanes = arena.take<Lane>(P::kConverts || P::kPerLane == 2 ? KeyScratch<P>::kRows * value_row : 0);
    query = arena.take<Lane>(round_up(P::lanes_for(head_dim), kLanes<Lane>) * kBlockQ);
    scores = arena.take<Lane>(tile);
    weights = P::kPerLane == 1 ? scores : arena.take<Lane>(tile / P::kPerLane);
    acc = arena.take<Lane>(value_row * kBlockQ);
  }
};

// Stores the scores of one tile and raises the running maximum of its queries.
template <class P, int kColumns, bool kPlain>
FA_NOINLINE void forward_tile(const ScoreInputs<P>& in, int k, int v, bool partial, typename P::Lane* scores,
                              Vec<typename P::Lane>* row_max) {
  using Lane = typename P::Lane;
  constexpr int n = kLanes<Lane>;
  Vec<Lane> acc[kTileKeys][kColumns];
  compute_scores<P, kColumns, kPlain>(in, k, v, partial, nullptr, acc);
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    Vec<Lane> m = row_max[v + c];
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      m = max<Lane>(acc[r][c], m);  // a NaN score leaves the maximum alone; exp2 then passes it on
      store<Lane>(scores + (k + r) * kBlockQ + (v + c) * n, acc[r][c]);
    }
    row_max[v + c] = m;
  }
}

// Turns the scores of a tile into probabilities, relative to row_max, and adds them to block_sum, which dropout spares.
template <class P>
FA_INLINE void exponentiate_tile(const ForwardScratch<P>& s, int k, VectorRange range,
                                 const Vec<typename P::Lane>* row_max, Vec<typename P::Lane>* block_sum,
                                 typename P::Lane to_log2, bool dropout) {
  using Lane = typename P::Lane;
  constexpr int n = kLanes<Lane>;
  for (int v = range.begin; v < range.end; ++v) {
    const Vec<Lane> m = row_max[v];
    Vec<Lane> sum = {};
    const int64_t offset = k * kBlockQ + v * n;
    Vec<Lane> weight[kTileKeys];
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      weight[r] = exp2<Lane, P::kCoarseExp>((load<Lane>(s.scores + offset + r * kBlockQ) - m) * to_log2);
    }
    const auto dropped = [&](int r) {
      if (!dropout) return weight[r];
      return keep_where<Lane>(*reinterpret_cast<const IntVec<Lane>*>(s.key.keep + offset + r * kBlockQ), weight[r]);
    };
    if constexpr (P::kPerLane == 1) {
      FA_UNROLL
      for (int r = 0; r < kTileKeys; ++r) {
        sum += weight[r];
        store<Lane>(s.weights + offset + r * kBlockQ, dropped(r));
      }
    } else {
#if defined(__AVX512BF16__)
      FA_UNROLL
      for (int r = 0; r < kTileKeys; r += 2) {
        // The sum is taken of what is multiplied: otherwise rows that one key dominates lose twice the accuracy.
        Vec<Lane> pairs = round_to_pairs(weight[r], weight[r + 1]);
        sum = add_pairs(sum, pairs);
        if (dropout) pairs = round_to_pairs(dropped(r), dropped(r + 1));
        store<Lane>(s.weights + (k + r) / 2 * kBlockQ + v * n, pairs);
      }
#endif
    }
    block_sum[v] += sum;
  }
}

// Divides by row_sum, transposes and writes the rows of the block, and their lse.
template <class P>
FA_NOINLINE void write_output(const AttentionParams& p, const Sequence& seq, int64_t b, int64_t h, int64_t q_begin,
                              int nq, const typename P::Lane* acc, typename P::Lane to_logits,
                              const Vec<typename P::Lane>* row_max, const Vec<typename P::Lane>* row_sum) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  constexpr int n = kLanes<Lane>;
  const int value_dim = static_cast<int>(p.value_dim);
  Storage* out = row_of<Storage>(p.out, b, h, seq.q_offset + q_begin);
  Lane* lse = p.lse.data != nullptr ? row_of<Lane>(p.lse, b, h, seq.q_offset + q_begin) : nullptr;
  const Lane kept_scale = p.has_dropout ? static_cast<Lane>(p.dropout_scale) : Lane(1);

  for (int q = 0; q < nq; q += n) {
    const int v = q / n;
    // A row that sees no key has row_sum 0: its output is 0, its lse -inf, and not even a sink changes that.
    const IntVec<Lane> empty = row_sum[v] == 0;
    Vec<Lane> total = row_sum[v];
    Vec<Lane> reference = row_max[v] * to_logits;
    Vec<Lane> factor = broadcast<Lane>(kept_scale);
    if (p.sinks.data != nullptr) {
      // The sink joins the denominator alone, so it can join at the end.
      const Vec<Lane> sink = broadcast<Lane>(*row_of<const Lane>(p.sinks, 0, h, 0));
      const Vec<Lane> keys_max = reference;
      reference = max<Lane>(sink, keys_max);
      const Vec<Lane> shift = exp2<Lane>((keys_max - reference) * Lane(kLog2E));
      total = total * shift + exp2<Lane>((sink - reference) * Lane(kLog2E));
      factor = factor * shift;
    }
    factor = factor / total;
    for (int d = 0; d < value_dim; d += n) {
      Vec<Lane> block[n];
      FA_UNROLL
      for (int i = 0; i < n; ++i) {
        block[i] = select<Lane>(empty, Vec<Lane>{}, load<Lane>(acc + (d + i) * kBlockQ + q) * factor);
      }
      transpose<Lane>(block);
      const int columns = value_dim - d;
      if (q + n <= nq && columns >= n) {
        FA_UNROLL
        for (int i = 0; i < n; ++i) store_as<Lane>(out + (q + i) * p.out.stride_row + d, block[i]);
      } else {
        FA_UNROLL
        for (int i = 0; i < n; ++i) {
          if (q + i < nq) store_as<Lane>(out + (q + i) * p.out.stride_row + d, block[i], columns);
        }
      }
    }
    if (lse != nullptr) {
      const Lane none = -FloatTraits<Lane>::kInfinity;
      for (int i = 0; i < n && q + i < nq; ++i) {
        const Lane value = reference[i] + natural_log(total[i]);
        lse[(q + i) * p.lse.stride_row] = empty[i] != 0 ? none : value;
      }
    }
  }
}

template <class P>
void forward_block(const AttentionParams& p, const RelativeBias<typename P::Lane>& relative, const LiveKeys* live,
                   int64_t b, int64_t h, int64_t q_begin, const ForwardScratch<P>& s) {
  using Lane = typename P::Lane;
  using Storage = typename P::Storage;
  const Sequence seq = sequence_of(p, b);
  if (q_begin >= seq.seqlen_q) return;
  const int nq = seq.seqlen_q - q_begin < kBlockQ ? static_cast<int>(seq.seqlen_q - q_begin) : kBlockQ;
  const int vectors = (nq + kLanes<Lane> - 1) / kLanes<Lane>;
  const int panels = (vectors + kTileVectors - 1) / kTileVectors;
  const int value_dim = static_cast<int>(p.value_dim);
  const int64_t kv_head = h / (p.num_heads / p.num_kv_heads);
  const Storage* values = row_of<const Storage>(p.value, b, kv_head, seq.k_offset);

  pack_columns<P, kBlockQ>(row_of<const Storage>(p.query, b, h, seq.q_offset + q_begin), p.query.stride_row, nq,
                           static_cast<int>(p.head_dim), s.query);
  ScoreInputs<P> in = score_inputs<P>(p, relative, h, q_begin);
  in.query = s.query;
  const Lane to_log2 = static_cast<Lane>((in.raw ? p.scale : 1.0) * kLog2E);

  Vec<Lane> row_max[kBlockVectors<Lane>], row_sum[kBlockVectors<Lane>];
  for (int v = 0; v < vectors; ++v) {
    row_max[v] = broadcast<Lane>(FloatTraits<Lane>::kLowest);  // finite: -inf minus it is -inf, never NaN
    row_sum[v] = Vec<Lane>{};
  }
  memset(s.acc, 0, round_up(value_dim, kLanes<Lane>) * kBlockQ * sizeof(Lane));

  KeyBlock& keys = *s.key.keys;
  KeyStream stream(p, seq, live, b, h, q_begin, nq, 0, seq.seqlen_k);
  while (stream.next(keys)) {
    prepare_keys<P>(p, seq, b, h, q_begin, nq, s.key, in);
    find_summed_rows<P>(values, p.value.stride_row, keys, value_dim, s.value_lanes, s.value_rows);

    const int tiles = (keys.count + kTileKeys - 1) / kTileKeys;
    Vec<Lane> new_max[kBlockVectors<Lane>], block_sum[kBlockVectors<Lane>], alpha[kBlockVectors<Lane>];
    for (int v = 0; v < vectors; ++v) new_max[v] = row_max[v];
    for (int t = 0; t < tiles; ++t) {
      bool partial;
      const VectorRange range = tile_range<Lane>(keys, t * kTileKeys, stream.valid(), vectors, partial);
      s.key.ranges[t] = range;
      for (int panel = 0; panel < panels; ++panel) {
        const VectorRange part = clip_to_panel(range, panel);
        if (part.begin >= part.end) continue;
        with_columns(part.end - part.begin, [&](auto columns) {
          constexpr int kColumns = decltype(columns)::value;
          if (partial || !in.raw) {
            forward_tile<P, kColumns, false>(in, t * kTileKeys, part.begin, partial, s.scores, new_max);
          } else {
            forward_tile<P, kColumns, true>(in, t * kTileKeys, part.begin, false, s.scores, new_max);
          }
        });
      }
    }
    for (int v = 0; v < vectors; ++v) {
      alpha[v] = exp2<Lane>((row_max[v] - new_max[v]) * to_log2);
      row_max[v] = new_max[v];
      block_sum[v] = Vec<Lane>{};
    }
    for (int t = 0; t < tiles; ++t) {
      exponentiate_tile<P>(s, t * kTileKeys, s.key.ranges[t], row_max, block_sum, to_log2, p.has_dropout);
    }
    for (int v = 0; v < vectors; ++v) row_sum[v] = row_sum[v] * alpha[v] + block_sum[v];
    outer_block<P>(s.value_rows, value_dim, s.weights, alpha, s.key.ranges, tiles, keys.count, vectors, s.acc);
  }
  write_output<P>(p, seq, b, h, q_begin, nq, s.acc, in.to_logits(), row_max, row_sum);
}

template <class P>
void forward_by_query_blocks(const AttentionParams& p) {
  using Lane = typename P::Lane;
  const int64_t blocks = (p.seqlen_q + kBlockQ - 1) / kBlockQ;
  const int64_t items = p.batch * p.num_heads * blocks;
  if (items == 0) return;
  const double flops = 2.0 * static_cast<double>(p.batch * p.num_heads) * static_cast<double>(p.seqlen_q) *
                       static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim + p.value_dim);
  const int threads = choose_threads(p.num_threads, items, flops);

  const Buffer live_memory(live_keys_bytes(p));
  const Buffer relative_memory(relative_bias_bytes<Lane>(p));
  Arena measure(nullptr);
  ForwardScratch<P> scratch;
  scratch.layout(measure, p);
  const Buffer memory(measure.used() * threads);

  const LiveKeys* live = make_live_keys(p, live_memory.data());
  const RelativeBias<Lane> relative = make_relative_bias<Lane>(p, relative_memory.data());

  // Heads outside, so that the threads share the keys and values of a head in the cache (8-10 % at head dim 128), and
  // the query blocks of a head descending: the longest of a causal head first.
  parallel_for(threads, items, [&](int64_t item, int thread) {
    const int64_t head = item / blocks;
    const int64_t block = blocks - 1 - item % blocks;
    Arena arena(memory.data() + measure.used() * thread);
    ForwardScratch<P> own;
    own.layout(arena, p);
    forward_block<P>(p, relative, live, head / p.num_heads, head % p.num_heads, block * kBlockQ, own);
  });
}

}  // namespace
}  // namespace fused_attn::cpu
