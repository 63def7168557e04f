// The forward kernel for few queries, as in decoding against a cache of keys. The other kernel (query_blocks.h) puts
// one query into each lane, so with few queries most lanes would be empty. Here the lanes of a vector are columns of a
// row of key or value, so each row is loaded as whole vectors:
//
//   scores[key] = sum over d of key[key][d] * query[d]     a vector of sums at a time, each in a vector of its own
//   out[d]      = sum over keys of exp(scores[key] - row_max) * value[key][d]
//
// Up to four queries of a head group are processed together, because they read the same keys.
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

// The most queries that one pass over a block of keys serves. With four queries, a vector of a key is loaded and
// converted once for four multiply-adds. A vector of sums has a lane for each query.
template <class Lane>
constexpr int kMostQueries = kLanes<Lane> < 4 ? kLanes<Lane> : 4;

// Calls visit(row, Constant<queries>) for as many rows at a time as possible.
template <class Lane, class Visit>
void visit_in_passes(int64_t rows, const Visit& visit) {
  int64_t r = 0;
  if constexpr (kMostQueries<Lane> == 4) {
    for (; r + 4 <= rows; r += 4) visit(r, Constant<4>{});
  }
  for (; r + 2 <= rows; r += 2) visit(r, Constant<2>{});
  for (; r < rows; ++r) visit(r, Constant<1>{});
}

// The number of keys of a block, and spare ones, because keys are processed in whole vectors.
template <class Lane>
constexpr int64_t kScoreRow = kBlockK + kLanes<Lane>;

// The memory in which one thread processes its work items.
template <class Policy>
struct DecodeScratch {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  static constexpr int64_t kRows = kScoreRow<Lane>;

  KeyBlock* keys;              // the current block of keys
  const Storage** key_rows;    // [key of the block]: the address of its row
  const Storage** value_rows;  // [key of the block]: the address of its row
  Lane* query;                 // [row][lanes of head_dim, padded]
  Lane* scores;                // [query of a pass][key of the block]: logits, which their exponentials overwrite
  Vec<Lane>* row_sum;          // [row]: the sum of exponentials; its lanes are added up at the end

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena, const AttentionParams& p, const DecodePlan& plan) {
    const int64_t rows = plan.heads * p.seqlen_q;
    keys = arena.take<KeyBlock>(1);
    key_rows = arena.take<const Storage*>(kRows);
    value_rows = arena.take<const Storage*>(kRows);
    query = arena.take<Lane>(rows * round_up(Policy::lanes_for(static_cast<int>(p.head_dim)), kLanes<Lane>));
    scores = arena.take<Lane>(kMostQueries<Lane> * kRows);
    row_sum = arena.take<Vec<Lane>>(rows);
  }
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

// Prefetches the cache line at address + offset. The sum is one of numbers, because a row of values may be shorter than a
// row of keys, and C++ does not allow a pointer to leave its allocation.
FA_INLINE void prefetch_bytes(const void* address, size_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + offset), 0, 2);
}

// scores[q][k] = scale * (query q . key k), for the `count` keys of a block, rounded up to whole vectors. There are
// kLanes sums at a time, each in a vector of its own. Keys are read one after the other, because the hardware prefetcher
// follows one stream of addresses better than several. To read two keys at a time for four queries took 1.06 of the time
// in float32, and 0.96 in bfloat16.
//
// A query gets the same bits, whatever queries stand beside it. The same is true of sum_values.
//
// Beside each key, its value is prefetched, if value_rows is not null. So memory is read in order, although sum_values
// reads the values by columns, and although it begins late. On a Zen 3 processor, one query over 64k keys took 0.76
// (bfloat16), 0.98 (float32) and 0.84 (bfloat16 in pages of 16) of the time. To prefetch keys, too, from 8 to 128 rows
// behind, made calls up to 20 % slower.
template <class Policy, int kQueries>
FA_NOINLINE void multiply_keys(const typename Policy::Lane* query, int64_t query_row,
                               const typename Policy::Storage* const* key_rows, int count, int head_dim,
                               const typename Policy::Storage* const* value_rows, typename Policy::Lane scale,
                               typename Policy::Lane* scores) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  constexpr int kKeys = n / kQueries;  // keys that fill the vector of sums
  constexpr int kLine = kLineLanes<Policy>;
  const int lanes = Policy::lanes_for(head_dim);
  const int whole = head_dim / Policy::kPerLane / kLine * kLine;
  const int end = static_cast<int>(round_up(count, n));
  for (int k = 0; k < end; k += kKeys) {
    Vec<Lane> acc[n] = {};  // [query][key]
    FA_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      const Storage* row = key_rows[k + i];
      Vec<Lane> other[kQueries] = {};  // second sums, for the odd elements
      for (int d = 0; d < whole; d += kLine) {
        if (value_rows != nullptr) prefetch_bytes(value_rows[k + i], d * Policy::kPerLane * sizeof(Storage));
        if constexpr (kWidensPairs<Policy>) {
          FA_UNROLL
          for (int c = d; c < d + kLine; c += 2 * n) {
            Vec<Lane> even, odd;
            widen_pairs(row + c, even, odd);
            FA_UNROLL
            for (int q = 0; q < kQueries; ++q) {
              const Lane* own = query + q * query_row + c;
              acc[q * kKeys + i] = even * load<Lane>(own) + acc[q * kKeys + i];
              other[q] = odd * load<Lane>(own + n) + other[q];
            }
          }
        } else {
          FA_UNROLL
          for (int c = d; c < d + kLine; c += n) {
            const auto x = load_lanes<Policy>(row, c, (c + n) * Policy::kPerLane);
            FA_UNROLL
            for (int q = 0; q < kQueries; ++q)
              acc[q * kKeys + i] = multiply_add<Policy>(x, load<Lane>(query + q * query_row + c), acc[q * kKeys + i]);
          }
        }
      }
      FA_UNROLL
      for (int q = 0; q < kQueries; ++q) acc[q * kKeys + i] += other[q];
    }
    for (int d = whole; d < lanes; d += n) {
      FA_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        const Vec<Lane> x = load_lanes<Policy>(key_rows[k + i], d, head_dim);
        FA_UNROLL
        for (int q = 0; q < kQueries; ++q)
          acc[q * kKeys + i] = multiply_add<Policy>(x, load<Lane>(query + q * query_row + d), acc[q * kKeys + i]);
      }
    }
    const Vec<Lane> sums = sum_rows<Lane>(acc) * scale;
    FA_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      memcpy(scores + q * kScoreRow<Lane> + k, reinterpret_cast<const Lane*>(&sums) + q * kKeys, kKeys * sizeof(Lane));
    }
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

// Turns the scaled scores of query i of head h into logits, for a block of keys: softcap, biases and masks. The logit of
// a key that the query does not see is -inf, and so are the entries behind the last key, up to a whole vector.
template <class Policy>
void make_logits(const AttentionParams& p, int64_t b, int64_t h, int64_t i, const KeyBlock& keys,
                 typename Policy::Lane* scores) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const Lane hidden = -FloatTraits<Lane>::kInfinity;
  const int end = static_cast<int>(round_up(keys.count, kLanes<Lane>));
  if (p.softcap > 0) apply_softcap<Lane>(scores, end, static_cast<Lane>(p.softcap), nullptr);
  if (p.bias.data != nullptr) {
    if (p.bias_dtype == p.dtype) {
      add_bias<Lane>(row_of<const Storage>(p.bias, b, h, i), p.bias.stride_col, keys, scores);
    } else {
      add_bias<Lane>(row_of<const Lane>(p.bias, b, h, i), p.bias.stride_col, keys, scores);
    }
  }
  if (p.key_bias.data != nullptr) add_bias<Lane>(row_of<const Lane>(p.key_bias, b, 0, 0), 1, keys, scores);
  if (p.relative_bias.data != nullptr) {
    const int64_t stride_col = p.relative_bias.stride_col;
    const Lane* row = row_of<const Lane>(p.relative_bias, 0, h, 0) + (p.seqlen_q - 1 - i) * stride_col;
    add_bias<Lane>(row, stride_col, keys, scores);
  }
  if (keys.partial) {
    for (int k = 0; k < keys.count; ++k) {
      if ((keys.word[k] >> i & 1) == 0) scores[k] = hidden;
    }
  }
  for (int k = keys.count; k < end; ++k) scores[k] = hidden;
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

// acc[q][c] = acc[q][c] * rescale[q] + sum over keys of probs[q][key] * value_rows[key][first + c], for kColumns vectors
// of columns. `dim` of these columns exist; kWhole means that all of them do. Each column has kKeys sums, which take the
// keys in turns: a multiply-add that waits for the one before it would be slow.
template <class Policy, int kQueries, int kColumns, int kKeys, bool kWhole>
FA_INLINE void sum_values_tile(const typename Policy::Storage* const* value_rows, int64_t first,
                               const typename Policy::Lane* probs, int count, int dim,
                               const typename Policy::Lane* rescale, typename Policy::Lane* const* acc) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  constexpr bool kPairs = kSame<Storage, BFloat16> && kWhole && kColumns % 2 == 0;
  Vec<Lane> sum[kKeys][kQueries][kColumns] = {};
  const auto add_key = [&](int j, Vec<Lane>(&target)[kQueries][kColumns]) {
    const Storage* row = value_rows[j] + first;
    Vec<Lane> values[kColumns];
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (!kPairs) {
        values[c] = load_as<Lane>(row + c * n, kWhole ? n : dim - c * n);
      } else if (c % 2 == 0) {
        widen_pairs(row + c * n, values[c], values[c + 1]);
      }
    }
    FA_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const Vec<Lane> prob = broadcast<Lane>(probs[q * kScoreRow<Lane> + j]);
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) target[q][c] = values[c] * prob + target[q][c];
    }
  };
  int j = 0;
  for (; j + kKeys <= count; j += kKeys) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) add_key(j + r, sum[r]);
  }
  for (; j < count; ++j) add_key(j, sum[0]);
  FA_UNROLL
  for (int q = 0; q < kQueries; ++q) {
    FA_UNROLL
    for (int r = 1; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) sum[0][q][c] += sum[r][q][c];
    }
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (kPairs) {
        if (c % 2 == 0) interleave(sum[0][q][c], sum[0][q][c + 1], std::make_integer_sequence<int, n>{});
      }
      Lane* target = acc[q] + first + c * n;
      store<Lane>(target, load<Lane>(target) * rescale[q] + sum[0][q][c]);
    }
  }
}

// Adds the values of a block of keys, multiplied by the probs of each query, to acc of the query. Tiles are as wide as
// the registers allow, because memory is read fastest in order. Each narrower tile would read a part of every row. The
// sums of a tile take half of the registers. How many sums a column has does not depend on kQueries, so neither does the
// order of additions.
template <class Policy, int kQueries>
FA_NOINLINE void sum_values(const typename Policy::Storage* const* value_rows, const typename Policy::Lane* probs,
                            int count, int value_dim, const typename Policy::Lane* rescale,
                            typename Policy::Lane* const* acc) {
  constexpr int n = kLanes<typename Policy::Lane>;
  constexpr int kSums = kVectorRegisters / 2;
  constexpr int kRestKeys = kSums / 4;
  int d = 0;
  const auto tiles = [&](auto columns, auto keys, int end) {
    constexpr int kColumns = decltype(columns)::value;
    for (; d + kColumns * n <= end; d += kColumns * n) {
      sum_values_tile<Policy, kQueries, kColumns, decltype(keys)::value, /*kWhole=*/true>(value_rows, d, probs, count,
                                                                                          kColumns * n, rescale, acc);
    }
  };
  tiles(Constant<8 / kQueries>{}, Constant<kSums / 8>{}, value_dim / (8 * n) * (8 * n));
  if constexpr (kQueries == 1) tiles(Constant<4>{}, Constant<kRestKeys>{}, value_dim);
  if constexpr (kQueries <= 2) tiles(Constant<2>{}, Constant<kRestKeys>{}, value_dim);
  tiles(Constant<1>{}, Constant<kRestKeys>{}, value_dim);
  if (d < value_dim) {
    sum_values_tile<Policy, kQueries, 1, kRestKeys, /*kWhole=*/false>(value_rows, d, probs, count, value_dim - d,
                                                                      rescale, acc);
  }
}

// The addresses of the keys of a block, with copies of the last one up to a multiple of n.
template <class Storage>
FA_INLINE void find_rows_to(const RowSource<Storage>& source, const KeyBlock& keys, int n, const Storage** rows) {
  source.find(keys, rows);
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
  const int64_t rows = plan.heads * nq;
  // Convert the queries to lanes, and start the softmax of each row. Row r is query r % nq of head first_head + r / nq.
  for (int64_t r = 0; r < rows; ++r) {
    const Storage* source = row_of<const Storage>(p.query, b, first_head + r / nq, seq.q_offset + r % nq);
    read_query<Policy>(source, head_dim, s.query + r * query_row);
    const int64_t row = plan.row(p, split, b, first_head + r / nq, r % nq);
    memset(partials.acc + row * plan.value_row, 0, plan.value_row * sizeof(Lane));
    partials.row_max[row] = FloatTraits<Lane>::kLowest;
    s.row_sum[r] = Vec<Lane>{};
  }

  const RowSource<Storage> key_source = row_source<Storage>(p, p.key, seq, b, kv_head);
  const RowSource<Storage> value_source = row_source<Storage>(p, p.value, seq, b, kv_head);
  const int64_t key_begin = split * plan.keys_per_split(seq);
  const int64_t key_stop = key_begin + plan.keys_per_split(seq);
  const int64_t key_end = key_stop < seq.seqlen_k ? key_stop : seq.seqlen_k;
  KeyStream stream(p, seq, valid_keys, b, first_head, 0, nq, key_begin, key_end);
  // Computes kQueries rows, from row r on, for the current block of keys.
  const auto visit = [&](int64_t r, auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    // The first pass brings the values into the cache.
    multiply_keys<Policy, kQueries>(s.query + r * query_row, query_row, s.key_rows, s.keys->count, head_dim,
                                    r == 0 ? s.value_rows : nullptr, static_cast<Lane>(p.scale), s.scores);
    Lane rescale[kQueries];
    Lane* acc[kQueries];
    for (int q = 0; q < kQueries; ++q) {
      const int64_t h = first_head + (r + q) / nq, i = (r + q) % nq;
      const int64_t row = plan.row(p, split, b, h, i);
      Lane* scores = s.scores + q * kScoreRow<Lane>;
      make_logits<Policy>(p, b, h, i, *s.keys, scores);
      rescale[q] = decode_softmax<Policy>(s.keys->count, scores, partials.row_max[row], s.row_sum[r + q]);
      acc[q] = partials.acc + row * plan.value_row;
    }
    sum_values<Policy, kQueries>(s.value_rows, s.scores, s.keys->count, static_cast<int>(p.value_dim), rescale, acc);
  };
  while (stream.next(*s.keys)) {
    find_rows_to(key_source, *s.keys, n, s.key_rows);
    find_rows_to(value_source, *s.keys, n, s.value_rows);
    visit_in_passes<Lane>(rows, visit);
  }
  for (int64_t r = 0; r < rows; ++r) {
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
