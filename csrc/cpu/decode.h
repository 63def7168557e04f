// The forward kernel for few queries, as in decoding against a cache of keys. The other kernel (query_blocks.h) puts
// one query into each lane, so with few queries most lanes would be empty. Here the lanes of a vector are columns of a
// row of key or value, so each row is loaded as whole vectors:
//
//   scores[key] = sum over d of key[key][d] * query[d]     a vector of keys at a time, each with an accumulator
//   out[d]      = sum over keys of exp(scores[key] - row_max) * value[key][d]
//
// A work item is one split of the keys of a kv head, together with all queries that attend to this kv head. A second
// pass merges the results of the splits. The number of splits depends on the shapes alone, so results do not depend on
// the number of threads.
#pragma once
#include <memory>

#include "parallel.h"
#include "scores.h"

namespace fused_attn::cpu {
namespace {

// How the heads and keys of a call are divided into work items. An item is one group of query heads and one split.
struct DecodePlan {
  int64_t heads;      // query heads of a group: those of one kv head, or 1 if each head has its own mask
  int64_t groups;     // the number of groups in the whole batch
  int64_t splits;     // the number of splits into which the keys of a head are divided
  int64_t value_row;  // lanes of a row of DecodePartials::acc: value_dim, padded to whole vectors

  // The index of a row in DecodePartials, whose arrays are [split][batch][head][query].
  int64_t row(const AttentionParams& p, int64_t split, int64_t b, int64_t h, int64_t i) const {
    return ((split * p.batch + b) * p.num_heads + h) * p.seqlen_q + i;
  }

  // The number of keys of a split of a sequence, in whole blocks. The last splits may have fewer keys, or none. The
  // number depends on no other sequence of the batch, so that with num_splits the results of a sequence do not either.
  int64_t keys_per_split(const Sequence& seq) const { return round_up((seq.seqlen_k + splits - 1) / splits, kBlockK); }
};

// Chooses the number of groups and splits for one call.
template <class Lane>
DecodePlan plan_decode(const AttentionParams& p) {
  // Many items keep many threads busy. But each item takes time to start, which is small only beside this many keys.
  constexpr int64_t kLeastKeys = 512;
  DecodePlan plan;
  const bool own_masks = p.mask.data != nullptr && p.mask.stride_head != 0;
  plan.heads = own_masks ? 1 : p.num_heads / p.num_kv_heads;
  plan.groups = p.batch * p.num_heads / plan.heads;
  constexpr int64_t kItems = 64;
  const int64_t wanted = (kItems + plan.groups - 1) / plan.groups;
  const int64_t possible = p.seqlen_k / kLeastKeys;
  plan.splits = wanted < possible ? wanted : possible;
  if (p.num_splits > 0) plan.splits = p.num_splits;
  if (plan.splits < 1) plan.splits = 1;
  plan.value_row = round_up(p.value_dim, kLanes<Lane>);
  return plan;
}

// The softmax of each row over the keys of one split, before the division by the sum of exponentials. The second pass
// (merge_splits) merges the splits of a row.
template <class Lane>
struct DecodePartials {
  Lane* acc;      // [row][value_row]: the sum of exp(logit - row_max) * value
  Lane* row_max;  // the largest logit of the row in the split
  Lane* row_sum;  // the sum of exp(logit - row_max); 0 if the row sees no key of the split

  // Takes the memory of the three arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, const DecodePlan& plan) {
    const int64_t rows = plan.row(p, plan.splits, 0, 0, 0);
    acc = arena.take<Lane>(rows * plan.value_row);
    row_max = arena.take<Lane>(rows);
    row_sum = arena.take<Lane>(rows);
  }
};

// The memory in which one thread processes its work items.
template <class Policy>
struct DecodeScratch {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  static constexpr int64_t kRows = kBlockK + kLanes<Lane>;  // keys are processed in whole vectors, so spare rows

  KeyBlock* keys;              // the current block of keys
  const Storage** key_rows;    // [key of the block]: the address of its row
  const Storage** value_rows;  // [key of the block]: the address of its row
  const Storage** next_keys;   // [key of the block]: the row of a later key, for the prefetch from pages
  const Storage** next_values;
  Lane* query;         // [row][lanes of head_dim, padded]
  Lane* scores;        // [key of the block]: the logits of one row, which their exponentials overwrite
  Vec<Lane>* row_sum;  // [row]: the sum of exponentials; its lanes are added up at the end

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, const DecodePlan& plan) {
    const int64_t rows = plan.heads * p.seqlen_q;
    keys = arena.take<KeyBlock>(1);
    key_rows = arena.take<const Storage*>(kRows);
    value_rows = arena.take<const Storage*>(kRows);
    next_keys = arena.take<const Storage*>(kRows);
    next_values = arena.take<const Storage*>(kRows);
    query = arena.take<Lane>(rows * round_up(Policy::lanes_for(static_cast<int>(p.head_dim)), kLanes<Lane>));
    scores = arena.take<Lane>(kRows);
    row_sum = arena.take<Vec<Lane>>(rows);
  }
};

// The distance of the software prefetch, in rows. On a Zen 4 processor, the kernel read main memory at 28 GB/s with a
// distance of 128 rows and at 19 GB/s without a prefetch, where 32 GB/s are possible. Distances of 32 and 64 rows were
// too short. multiply_keys read several keys in turns then. Now that it reads one after the other, the prefetch matters
// most with small pages, at whose ends the hardware prefetcher stops. The cost: if keys and values are in the
// third-level cache, the kernel takes 5-10 % longer.
constexpr int64_t kRowsAhead = 128;

// Prefetches the memory at p + bytes_ahead. This address may be invalid, because a prefetch never faults. The addition
// is done on integers, because C++ does not allow a pointer to leave its allocation.
FA_INLINE void prefetch(const void* address, int64_t bytes_ahead) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes_ahead)), 0, 3);
}

// What multiply_keys and sum_values prefetch while they read column `d` of row k: nothing, what is `bytes` behind that
// address, or the same column of another row, where rows lie in pages.
struct PrefetchNothing {
  template <class Storage>
  void operator()(const Storage* const*, int, int64_t) const {}
};
struct PrefetchBehind {
  int64_t bytes;
  template <class Storage>
  void operator()(const Storage* const* rows, int k, int64_t d) const {
    prefetch(rows[k] + d, bytes);
  }
};
template <class Storage>
struct PrefetchRows {
  const Storage* const* next;
  void operator()(const Storage* const*, int k, int64_t d) const { prefetch(next[k] + d, 0); }
};

// The lanes of a cache line of keys.
template <class Policy>
constexpr int kLineLanes = static_cast<int>(kCacheLine / sizeof(typename Policy::Storage)) / Policy::kPerLane;

// Whether multiply_keys converts keys by widen_pairs. Then the query has the same order in each whole cache line.
template <class Policy>
constexpr bool kWidensPairs = kSame<typename Policy::Storage, BFloat16> && Policy::kPerLane == 1;

// Writes one query to `lanes`, in the order in which multiply_keys reads it.
template <class Policy>
void read_query(const typename Policy::Storage* query, int head_dim, typename Policy::Lane* lanes) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  int d = 0;
  if constexpr (kWidensPairs<Policy>) {
    for (; d < head_dim / kLineLanes<Policy> * kLineLanes<Policy>; d += 2 * n) {
      Vec<Lane> even, odd;
      widen_pairs(query + d, even, odd);
      store<Lane>(lanes + d, even);
      store<Lane>(lanes + d + n, odd);
    }
  }
  for (; d < Policy::lanes_for(head_dim); d += n) store<Lane>(lanes + d, load_lanes<Policy>(query, d, head_dim));
}

// scores[k] = scale * (query . key k), for the `count` keys of a block, rounded up to whole vectors. kLanes keys are
// processed at a time, each with an accumulator of its own. They are read one after the other, because the hardware
// prefetcher follows one stream of addresses better than kLanes streams.
template <class Policy, class Prefetch>
FA_NOINLINE void multiply_keys(const typename Policy::Lane* query, const typename Policy::Storage* const* key_rows,
                               int count, int head_dim, typename Policy::Lane scale, const Prefetch& ahead,
                               typename Policy::Lane* scores) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  constexpr int kLine = kLineLanes<Policy>;
  const int lanes = Policy::lanes_for(head_dim);
  const int whole = head_dim / Policy::kPerLane / kLine * kLine;
  for (int k = 0; k < count; k += n) {
    Vec<Lane> acc[n];
    FA_UNROLL
    for (int i = 0; i < n; ++i) acc[i] = Vec<Lane>{};
    FA_UNROLL
    for (int i = 0; i < n; ++i) {
      const typename Policy::Storage* row = key_rows[k + i];
      Vec<Lane> other = {};  // a second accumulator, for the odd elements
      for (int d = 0; d < whole; d += kLine) {
        ahead(key_rows, k + i, d * Policy::kPerLane);
        if constexpr (kWidensPairs<Policy>) {
          FA_UNROLL
          for (int c = d; c < d + kLine; c += 2 * n) {
            Vec<Lane> even, odd;
            widen_pairs(row + c, even, odd);
            acc[i] = even * load<Lane>(query + c) + acc[i];
            other = odd * load<Lane>(query + c + n) + other;
          }
        } else {
          FA_UNROLL
          for (int c = d; c < d + kLine; c += n) {
            const auto x = load_lanes<Policy>(row, c, (c + n) * Policy::kPerLane);
            acc[i] = multiply_add<Policy>(x, load<Lane>(query + c), acc[i]);
          }
        }
      }
      acc[i] += other;
    }
    for (int d = whole; d < lanes; d += n) {
      const Vec<Lane> q = load<Lane>(query + d);
      FA_UNROLL
      for (int i = 0; i < n; ++i)
        acc[i] = multiply_add<Policy>(load_lanes<Policy>(key_rows[k + i], d, head_dim), q, acc[i]);
    }
    store<Lane>(scores + k, sum_rows<Lane>(acc) * scale);
  }
}

// scores[k] += row[index of key k * stride_col]: adds one row of a bias to the scores of a block of keys.
template <class Lane, class Storage>
FA_NOINLINE void add_bias(const Storage* row, int64_t stride_col, const KeyBlock& keys, Lane* scores) {
  constexpr int n = kLanes<Lane>;
  int k = 0;
  if (stride_col == 1 && keys.contiguous) {
    const Storage* first = row + keys.index[0];
    for (; k + n <= keys.count; k += n) store<Lane>(scores + k, load<Lane>(scores + k) + load_as<Lane>(first + k));
  }
  for (; k < keys.count; ++k) scores[k] += load_scalar<Lane>(row + keys.index[k] * stride_col);
}

// Writes the logits of query i of head h for the current block of keys to s.scores. The logit of a key that the query
// does not see is -inf, and so are the entries behind the last key, up to a whole vector.
template <class Policy, class Prefetch>
void decode_scores(const AttentionParams& p, int64_t b, int64_t h, int64_t i, const typename Policy::Lane* query,
                   const Prefetch& ahead, const DecodeScratch<Policy>& s) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const KeyBlock& keys = *s.keys;
  const Lane hidden = -FloatTraits<Lane>::kInfinity;
  multiply_keys<Policy, Prefetch>(query, s.key_rows, keys.count, static_cast<int>(p.head_dim),
                                  static_cast<Lane>(p.scale), ahead, s.scores);
  const int end = static_cast<int>(round_up(keys.count, kLanes<Lane>));
  if (p.softcap > 0) apply_softcap<Lane>(s.scores, end, static_cast<Lane>(p.softcap), nullptr);
  if (p.bias.data != nullptr) {
    if (p.bias_dtype == p.dtype) {
      add_bias<Lane>(row_of<const Storage>(p.bias, b, h, i), p.bias.stride_col, keys, s.scores);
    } else {
      add_bias<Lane>(row_of<const Lane>(p.bias, b, h, i), p.bias.stride_col, keys, s.scores);
    }
  }
  if (p.key_bias.data != nullptr) add_bias<Lane>(row_of<const Lane>(p.key_bias, b, 0, 0), 1, keys, s.scores);
  if (p.relative_bias.data != nullptr) {
    const int64_t stride_col = p.relative_bias.stride_col;
    const Lane* row = row_of<const Lane>(p.relative_bias, 0, h, 0) + (p.seqlen_q - 1 - i) * stride_col;
    add_bias<Lane>(row, stride_col, keys, s.scores);
  }
  if (keys.partial) {
    for (int k = 0; k < keys.count; ++k) {
      if ((keys.word[k] >> i & 1) == 0) s.scores[k] = hidden;
    }
  }
  for (int k = keys.count; k < end; ++k) s.scores[k] = hidden;
}

// One step of the online softmax of a row: raises row_max to the largest of the logits in `scores`, replaces the logits
// by exp(logit - row_max), and adds these to row_sum. Returns the factor by which the caller must multiply sums of
// earlier blocks, because they were made with the old row_max.
template <class Policy>
FA_INLINE typename Policy::Lane decode_softmax(int count, typename Policy::Lane* scores, typename Policy::Lane& row_max,
                                               Vec<typename Policy::Lane>& row_sum) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  Vec<Lane> maximum = broadcast<Lane>(row_max);
  for (int k = 0; k < count; k += n) maximum = max<Lane>(load<Lane>(scores + k), maximum);
  Lane new_max = row_max;
  FA_UNROLL
  for (int i = 0; i < n; ++i) new_max = maximum[i] > new_max ? maximum[i] : new_max;
  const Vec<Lane> rescale = exp2<Lane>((broadcast<Lane>(row_max) - new_max) * Lane(kLog2E));
  Vec<Lane> sum = row_sum * rescale;
  for (int k = 0; k < count; k += n) {
    const Vec<Lane> prob = exp2<Lane, Policy::kCoarseExp>((load<Lane>(scores + k) - new_max) * Lane(kLog2E));
    sum += prob;
    store<Lane>(scores + k, prob);
  }
  row_max = new_max;
  row_sum = sum;
  return rescale[0];
}

// acc[c] = acc[c] * rescale + sum over keys of probs[key] * value_rows[key][first + c], for kColumns vectors of
// columns. `dim` of these columns exist; kWhole means that all of them do.
template <class Policy, class Prefetch, int kColumns, bool kWhole>
FA_INLINE void sum_values_tile(const typename Policy::Storage* const* value_rows, int64_t first,
                               const typename Policy::Lane* probs, int count, int dim, const Prefetch& ahead,
                               typename Policy::Lane rescale, typename Policy::Lane* acc) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  // Independent sums: a multiply-add that waits for the one before it would be slow. They take half of the registers.
  constexpr int kFit = kVectorRegisters / 2 / kColumns;
  constexpr int kKeys = kFit < 4 ? kFit : 4;
  constexpr bool kPairs = kSame<Storage, BFloat16> && kWhole && kColumns % 2 == 0;
  Vec<Lane> sum[kKeys][kColumns] = {};
  const auto add_key = [&](int j, Vec<Lane>(&target)[kColumns]) {
    const Storage* row = value_rows[j] + first;
    const Vec<Lane> prob = broadcast<Lane>(probs[j]);
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (c * n * sizeof(Storage) % kCacheLine == 0) ahead(value_rows, j, first + c * n);
      if constexpr (!kPairs) {
        target[c] = load_as<Lane>(row + c * n, kWhole ? n : dim - c * n) * prob + target[c];
      } else if (c % 2 == 0) {
        Vec<Lane> even, odd;
        widen_pairs(row + c * n, even, odd);
        target[c] = even * prob + target[c];
        target[c + 1] = odd * prob + target[c + 1];
      }
    }
  };
  int j = 0;
  for (; j + kKeys <= count; j += kKeys) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) add_key(j + r, sum[r]);
  }
  for (; j < count; ++j) add_key(j, sum[0]);
  FA_UNROLL
  for (int r = 1; r < kKeys; ++r) {
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) sum[0][c] += sum[r][c];
  }
  FA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    if constexpr (kPairs) {
      if (c % 2 == 0) interleave(sum[0][c], sum[0][c + 1], std::make_integer_sequence<int, n>{});
    }
    store<Lane>(acc + c * n, load<Lane>(acc + c * n) * rescale + sum[0][c]);
  }
}

// Adds the values of a block of keys, multiplied by probs, to acc. Tiles are as wide as the registers allow, because
// memory is read fastest in order. Each narrower tile would read a part of every row.
template <class Policy, class Prefetch>
FA_NOINLINE void sum_values(const typename Policy::Storage* const* value_rows, const typename Policy::Lane* probs,
                            int count, int value_dim, const Prefetch& ahead, typename Policy::Lane rescale,
                            typename Policy::Lane* acc) {
  constexpr int n = kLanes<typename Policy::Lane>;
  int d = 0;
  const auto tiles = [&](auto constant) {
    constexpr int kColumns = decltype(constant)::value;
    for (; d + kColumns * n <= value_dim; d += kColumns * n) {
      sum_values_tile<Policy, Prefetch, kColumns, /*kWhole=*/true>(value_rows, d, probs, count, kColumns * n, ahead,
                                                                   rescale, acc + d);
    }
  };
  tiles(Constant<8>{});
  tiles(Constant<4>{});
  tiles(Constant<2>{});
  tiles(Constant<1>{});
  if (d < value_dim)
    sum_values_tile<Policy, Prefetch, 1, /*kWhole=*/false>(value_rows, d, probs, count, value_dim - d, ahead, rescale,
                                                           acc + d);
}

// RowSource::find for the keys of a block, with copies of the last row up to a multiple of n.
template <class Storage>
FA_INLINE void find_rows_to(const RowSource<Storage>& source, const KeyBlock& keys, int64_t shift, int64_t last, int n,
                            const Storage** rows) {
  source.find(keys.index, keys.count, shift, last, rows);
  for (int k = keys.count; k < round_up(keys.count, n); ++k) rows[k] = rows[keys.count - 1];
}

// Processes one work item: attention of all queries of a group of heads over the keys of one split. Writes the result
// to `partials`.
template <class Policy>
void decode_item(const AttentionParams& p, const DecodePlan& plan, const ValidKeys* valid_keys, int64_t group,
                 int64_t split, const DecodeScratch<Policy>& s, const DecodePartials<typename Policy::Lane>& partials) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int64_t groups = p.num_heads / plan.heads;  // how many groups a batch entry has
  const int64_t b = group / groups;
  const int64_t first_head = group % groups * plan.heads;
  const int64_t kv_head = first_head / (p.num_heads / p.num_kv_heads);
  const Sequence seq = sequence_of(p, b);
  const int nq = static_cast<int>(seq.seqlen_q);
  if (nq == 0) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t query_row = round_up(Policy::lanes_for(head_dim), n);
  // Convert the queries to lanes, and start the softmax of each row. Row r is query r % nq of head first_head + r / nq.
  for (int64_t r = 0; r < plan.heads * nq; ++r) {
    const Storage* source = row_of<const Storage>(p.query, b, first_head + r / nq, seq.q_offset + r % nq);
    read_query<Policy>(source, head_dim, s.query + r * query_row);
    const int64_t row = plan.row(p, split, b, first_head + r / nq, r % nq);
    memset(partials.acc + row * plan.value_row, 0, plan.value_row * sizeof(Lane));
    partials.row_max[row] = FloatTraits<Lane>::kLowest;
    s.row_sum[r] = Vec<Lane>{};
  }

  KeyBlock& keys = *s.keys;
  const RowSource<Storage> key_source = row_source<Storage>(p, p.key, seq, b, kv_head);
  const RowSource<Storage> value_source = row_source<Storage>(p, p.value, seq, b, kv_head);
  const auto bytes_ahead = [](const TensorView& x) {
    return kRowsAhead * x.stride_row * static_cast<int64_t>(sizeof(Storage));
  };
  const int64_t key_begin = split * plan.keys_per_split(seq);
  const int64_t key_stop = key_begin + plan.keys_per_split(seq);
  const int64_t key_end = key_stop < seq.seqlen_k ? key_stop : seq.seqlen_k;
  KeyStream stream(p, seq, valid_keys, b, first_head, 0, nq, key_begin, key_end);
  while (stream.next(keys)) {
    find_rows_to(key_source, keys, 0, key_end - 1, n, s.key_rows);
    find_rows_to(value_source, keys, 0, key_end - 1, n, s.value_rows);
    const auto visit = [&](int64_t r, const auto& keys_ahead, const auto& values_ahead) {
      const int64_t h = first_head + r / nq;
      const int64_t row = plan.row(p, split, b, h, r % nq);
      decode_scores<Policy>(p, b, h, r % nq, s.query + r * query_row, keys_ahead, s);
      const Lane rescale = decode_softmax<Policy>(keys.count, s.scores, partials.row_max[row], s.row_sum[r]);
      sum_values<Policy>(s.value_rows, s.scores, keys.count, static_cast<int>(p.value_dim), values_ahead, rescale,
                         partials.acc + row * plan.value_row);
    };
    // Only the first row prefetches, because all rows of the group read the same keys. The last block of a split
    // prefetches rows of the next split, which is probably the next item of this thread.
    if (p.page_size > 0) {
      find_rows_to(key_source, keys, kRowsAhead, seq.seqlen_k - 1, n, s.next_keys);
      find_rows_to(value_source, keys, kRowsAhead, seq.seqlen_k - 1, n, s.next_values);
      visit(0, PrefetchRows<Storage>{s.next_keys}, PrefetchRows<Storage>{s.next_values});
    } else {
      visit(0, PrefetchBehind{bytes_ahead(p.key)}, PrefetchBehind{bytes_ahead(p.value)});
    }
    for (int64_t r = 1; r < plan.heads * nq; ++r) visit(r, PrefetchNothing{}, PrefetchNothing{});
  }
  for (int64_t r = 0; r < plan.heads * nq; ++r) {
    partials.row_sum[plan.row(p, split, b, first_head + r / nq, r % nq)] = sum_lanes<Lane>(s.row_sum[r]);
  }
}

// Computes the output of query i of head h from the partial results of all splits, and writes it, and lse if wanted.
template <class Policy>
void merge_splits(const AttentionParams& p, const DecodePlan& plan,
                  const DecodePartials<typename Policy::Lane>& partials, int64_t b, int64_t h, int64_t i) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const Sequence seq = sequence_of(p, b);
  if (i >= seq.seqlen_q) return;
  // The splits subtracted different maxima before their exponentials. Multiply each by a factor that refers it to the
  // largest of these maxima.
  Lane keys_max = FloatTraits<Lane>::kLowest;
  for (int64_t split = 0; split < plan.splits; ++split) {
    const Lane other = partials.row_max[plan.row(p, split, b, h, i)];
    keys_max = other > keys_max ? other : keys_max;
  }
  Lane factors[kMaxSplits];
  Lane total = 0;
  for (int64_t split = 0; split < plan.splits; ++split) {
    const int64_t row = plan.row(p, split, b, h, i);
    factors[split] = natural_exp(partials.row_max[row] - keys_max);
    total += partials.row_sum[row] * factors[split];
  }
  // A row that sees no key has the output 0, even if there is a sink. A total of NaN is not 0, so its row becomes NaN.
  const bool empty = total == 0;
  if (p.row_max.data != nullptr) {
    *row_of<Lane>(p.row_max, b, h, seq.q_offset + i) = empty ? -FloatTraits<Lane>::kInfinity : keys_max;
  }
  Lane keys_share = 1, reference = keys_max;
  if (p.sinks.data != nullptr) {
    // The sink is added to the denominator only. The maximum, the sink included, is subtracted before each exponential.
    const Lane sink = *row_of<const Lane>(p.sinks, 0, h, 0);
    reference = sink > keys_max ? sink : keys_max;
    keys_share = natural_exp(keys_max - reference);
    total = total * keys_share + natural_exp(sink - reference);
  }
  for (int64_t split = 0; split < plan.splits; ++split) factors[split] *= keys_share / total;
  if (p.lse.data != nullptr) {
    *row_of<Lane>(p.lse, b, h, seq.q_offset + i) =
        empty ? -FloatTraits<Lane>::kInfinity : reference + natural_log(total);
  }
  Storage* out = row_of<Storage>(p.out, b, h, seq.q_offset + i);
  for (int64_t d = 0; d < p.value_dim; d += n) {
    Vec<Lane> sum = {};
    for (int64_t split = 0; split < plan.splits && !empty; ++split) {
      sum += load<Lane>(partials.acc + plan.row(p, split, b, h, i) * plan.value_row + d) * factors[split];
    }
    store_as<Lane>(out + d, sum, static_cast<int>(p.value_dim - d));
  }
}

// Forward for few queries: processes all work items, then merges the splits of each row.
template <class Policy>
void forward_split_keys(const AttentionParams& p) {
  using Lane = typename Policy::Lane;
  if (p.batch * p.num_heads * p.seqlen_q == 0) return;
  const DecodePlan plan = plan_decode<Lane>(p);
  const int64_t items = plan.groups * plan.splits;
  const int64_t rows = p.batch * p.num_heads * p.seqlen_q;
  const double flops =
      2.0 * static_cast<double>(rows) * static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim + p.value_dim);
  const int threads = choose_threads(p.num_threads, items, flops);

  const Buffer valid_keys_memory(valid_keys_bytes(p));
  DecodePartials<Lane> partials;
  const Buffer partials_memory([&](Arena& arena) { partials.layout(arena, p, plan); });
  const std::unique_ptr<DecodeScratch<Policy>[]> scratch(new DecodeScratch<Policy>[threads]);
  const Buffer memory([&](Arena& arena) {
    for (int thread = 0; thread < threads; ++thread) scratch[thread].layout(arena, p, plan);
  });
  const ValidKeys* valid_keys = make_valid_keys(p, valid_keys_memory.data());

  parallel_for(threads, items, [&](int64_t item, int thread) {
    decode_item<Policy>(p, plan, valid_keys, item / plan.splits, item % plan.splits, scratch[thread], partials);
  });
  const double merge_flops = 2.0 * static_cast<double>(rows * plan.splits * p.value_dim);
  parallel_for(choose_threads(p.num_threads, rows, merge_flops), p.batch * p.num_heads, [&](int64_t head, int) {
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      merge_splits<Policy>(p, plan, partials, head / p.num_heads, head % p.num_heads, i);
    }
  });
}

}  // namespace
}  // namespace fused_attn::cpu
