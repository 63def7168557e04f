// One block of keys for one pass of queries, as in decoding: the scores, the logits, a step of the softmax, and the sum
// of the values.
#pragma once
#include "scores.h"

namespace fused_attn::cpu {
namespace {

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

// The keys of a part of a block: so many are read of one head before the next head of a turn (groups_of_turn).
constexpr int kPartKeys = 32;

// The number of keys of a block, and spare ones, because keys are processed in whole vectors.
template <class Lane>
constexpr int64_t kScoreRow = kBlockK + kLanes<Lane>;

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

// A block of keys, and the addresses of their rows for the first kv head of a work item. There are kBlockK addresses,
// whatever the number of keys: keys are processed in whole vectors, and sum_values prefetches as many rows of the next
// block as it reads of the current one.
template <class Storage>
struct DecodeBlock {
  KeyBlock* keys;
  const Storage** key_rows;    // [key of the block], followed by copies of the last one
  const Storage** value_rows;  // the same for values

  // Takes the memory of all arrays out of the arena.
  void layout(Arena& arena) {
    keys = arena.take<KeyBlock>(1);
    key_rows = arena.take<const Storage*>(kBlockK);
    value_rows = arena.take<const Storage*>(kBlockK);
  }

  // Takes the next keys of the stream. Returns false if no key is left.
  FA_NOINLINE bool next(KeyStream& stream, const RowSource<Storage>& key_source,
                        const RowSource<Storage>& value_source) const {
    if (!stream.next(*keys)) return false;
    find_rows(key_source, key_rows);
    find_rows(value_source, value_rows);
    return true;
  }

 private:
  // Sets the kBlockK addresses.
  void find_rows(const RowSource<Storage>& source, const Storage** rows) const {
    source.find(*keys, rows);
    for (int k = keys->count; k < kBlockK; ++k) rows[k] = rows[keys->count - 1];
  }
};

// The rows of key or value of one head, for the keys of a block. Several heads share one array of addresses.
template <class Storage>
struct HeadRows {
  const Storage* const* rows;  // [key of the block]: the address of its row for the first head; null = no rows
  int64_t offset;              // from there to the row of this head, in elements

  // The row of key k of the block.
  const Storage* operator[](int64_t k) const { return rows[k] + offset; }
};

// scores[q][k] = scale * (query q . key k), for the `count` keys of a block. There are kLanes sums at a time, each in a
// vector of its own, so there are also scores of a few keys behind the last one. Keys are read one after the other,
// because the hardware prefetcher follows one stream of addresses better than several. To read two keys at a time for
// four queries took 1.06 of the time in float32, and 0.96 in bfloat16.
//
// A query gets the same bits, whatever queries stand beside it. The same is true of sum_values.
//
// Beside each key, its value is prefetched, if value_rows has addresses. So memory is read in order, although
// sum_values reads the values by columns, and although it begins late. On a Zen 3 processor, one query over 64k keys
// took 0.76 (bfloat16), 0.98 (float32) and 0.84 (bfloat16 in pages of 16) of the time. To prefetch keys here, too, from
// 8 to 128 rows behind, made calls up to 20 % slower. sum_values prefetches them.
template <class Policy, int kQueries>
FA_NOINLINE void multiply_keys(const typename Policy::Lane* query, int64_t query_row,
                               HeadRows<typename Policy::Storage> key_rows, int count, int head_dim,
                               HeadRows<typename Policy::Storage> value_rows, typename Policy::Lane scale,
                               typename Policy::Lane* scores) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  constexpr int kKeys = n / kQueries;  // keys that fill the vector of sums
  constexpr int kLine = kLineLanes<Policy>;
  const int lanes = Policy::lanes_for(head_dim);
  const int whole = head_dim / Policy::kPerLane / kLine * kLine;
  const int end = static_cast<int>(round_up(count, kKeys));
  const bool prefetches = value_rows.rows != nullptr;
  for (int k = 0; k < end; k += kKeys) {
    Vec<Lane> acc[n] = {};  // [query][key]
    FA_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      const Storage* row = key_rows[k + i];
      const Storage* value_row = prefetches ? value_rows[k + i] : nullptr;
      Vec<Lane> other[kQueries] = {};  // second sums, for the odd elements
      for (int d = 0; d < whole; d += kLine) {
        if (prefetches) prefetch_bytes(value_row, d * Policy::kPerLane * sizeof(Storage));
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
      if constexpr (kWidensPairs<Policy>) {
        FA_UNROLL
        for (int q = 0; q < kQueries; ++q) acc[q * kKeys + i] += other[q];
      }
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

// Turns the scaled scores of query i of head h into logits, for a block of keys: softcap, biases and masks. The logit
// of a key that the query does not see is -inf, and so are the entries behind the last key, up to a whole vector.
// Before the call, these entries may hold any numbers. `derivative`, if not null, receives the derivative of the
// softcap.
template <class Policy>
void make_logits(const AttentionParams& p, int64_t b, int64_t h, int64_t i, const KeyBlock& keys,
                 typename Policy::Lane* scores, typename Policy::Lane* derivative = nullptr) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const Lane hidden = -FloatTraits<Lane>::kInfinity;
  const int end = static_cast<int>(round_up(keys.count, kLanes<Lane>));
  if (p.softcap > 0) apply_softcap<Lane>(scores, end, static_cast<Lane>(p.softcap), derivative);
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
  if (keys.count == end) return;
  // One store of a whole vector, because a load of the vector would wait long for several smaller ones.
  Lane* last = scores + end - kLanes<Lane>;
  const IntVec<Lane> exists = lanes_of_bits<Lane>(bit_range(0, keys.count - 1 - (last - scores)), 0);
  store<Lane>(last, select<Lane>(exists, load<Lane>(last), broadcast<Lane>(hidden)));
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
  const Lane new_max = max_lanes<Lane>(maximum);
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

// acc[q][c] = acc[q][c] * rescale[q] + sum over keys of probs[q][key] * value_rows[key][first + c], for kColumns
// vectors of columns. A null rescale means 1. Rows of acc are acc_row lanes apart. `dim` of these columns exist; kWhole
// means that all of them do. Each column has kKeys sums, which take the keys in turns: a multiply-add that waits for
// the one before it would be slow. After kPartKeys keys the sums are added to acc, so that acc is the same if the parts
// of a block come in calls of their own. The function prefetches the same columns of next_rows.
template <class Policy, int kQueries, int kColumns, int kKeys, bool kWhole>
FA_INLINE void sum_values_tile(HeadRows<typename Policy::Storage> value_rows,
                               HeadRows<typename Policy::Storage> next_rows, int64_t first,
                               const typename Policy::Lane* probs, int count, int dim,
                               const typename Policy::Lane* rescale, typename Policy::Lane* acc, int64_t acc_row) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  constexpr bool kPairs = kSame<Storage, BFloat16> && kWhole && kColumns % 2 == 0;
  const auto add_key = [&](int j, Vec<Lane>(&target)[kQueries][kColumns], auto prefetches) {
    const Storage* row = value_rows[j] + first;
    if constexpr (decltype(prefetches)::value) {
      FA_UNROLL
      for (size_t line = 0; line < kColumns * n * sizeof(Storage); line += kCacheLine) {
        prefetch_bytes(next_rows[j], first * sizeof(Storage) + line);
      }
    }
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
  // A test for each key would take longer than two loops: up to 1.1 of the time of a call whose keys are in the cache.
  const auto add_keys = [&](auto prefetches) {
    for (int begin = 0; begin < count; begin += kPartKeys) {
      const int end = begin + kPartKeys < count ? begin + kPartKeys : count;
      Vec<Lane> sum[kKeys][kQueries][kColumns] = {};
      int j = begin;
      for (; j + kKeys <= end; j += kKeys) {
        FA_UNROLL
        for (int r = 0; r < kKeys; ++r) add_key(j + r, sum[r], prefetches);
      }
      for (; j < end; ++j) add_key(j, sum[0], prefetches);
      FA_UNROLL
      for (int q = 0; q < kQueries; ++q) {
        const Lane factor = begin == 0 && rescale != nullptr ? rescale[q] : Lane(1);
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
          Lane* target = acc + q * acc_row + first + c * n;
          store<Lane>(target, load<Lane>(target) * factor + sum[0][q][c]);
        }
      }
    }
  };
  next_rows.rows != nullptr ? add_keys(Constant<true>{}) : add_keys(Constant<false>{});
}

// Adds the values of a block of keys, multiplied by the probs of each query, to acc of the query. Tiles are as wide as
// the registers allow, because memory is read fastest in order. Each narrower tile would read a part of every row. The
// sums of a tile take half of the registers. How many sums a column has does not depend on kQueries, so neither does
// the order of additions.
//
// The values are in the cache by now, so memory would rest. Hence the function prefetches next_rows, the keys that
// multiply_keys reads next, if next_rows has addresses. On a Xeon with AVX-512, one query over 64k keys of 8 heads took
// 0.87 (bfloat16) and 0.94 (float32) of the time.
template <class Policy, int kQueries>
FA_NOINLINE void sum_values(HeadRows<typename Policy::Storage> value_rows, HeadRows<typename Policy::Storage> next_rows,
                            const typename Policy::Lane* probs, int count, int value_dim,
                            const typename Policy::Lane* rescale, typename Policy::Lane* acc, int64_t acc_row) {
  constexpr int n = kLanes<typename Policy::Lane>;
  constexpr int kSums = kVectorRegisters / 2;
  constexpr int kRestKeys = kSums / 4;
  int d = 0;
  const auto tiles = [&](auto columns, auto keys, int end) {
    constexpr int kColumns = decltype(columns)::value;
    for (; d + kColumns * n <= end; d += kColumns * n) {
      sum_values_tile<Policy, kQueries, kColumns, decltype(keys)::value, /*kWhole=*/true>(
          value_rows, next_rows, d, probs, count, kColumns * n, rescale, acc, acc_row);
    }
  };
  tiles(Constant<8 / kQueries>{}, Constant<kSums / 8>{}, value_dim / (8 * n) * (8 * n));
  if constexpr (kQueries == 1) tiles(Constant<4>{}, Constant<kRestKeys>{}, value_dim);
  if constexpr (kQueries <= 2) tiles(Constant<2>{}, Constant<kRestKeys>{}, value_dim);
  tiles(Constant<1>{}, Constant<kRestKeys>{}, value_dim);
  if (d < value_dim) {
    sum_values_tile<Policy, kQueries, 1, kRestKeys, /*kWhole=*/false>(value_rows, next_rows, d, probs, count,
                                                                      value_dim - d, rescale, acc, acc_row);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
