// The gradients of the dense bias, the key bias and the relative bias, which are sums of dscores.
#pragma once
#include "backward_scratch.h"

namespace fused_attn::cpu {
namespace {

// The gradient of the dense bias, or of the key bias. A dimension in which the bias is broadcast has stride 0, so the
// gradient is summed over it.
template <class Entry>
struct BiasGradient {
  const TensorView& view;
  // Whether the scores of a head are the first ones that reach their entries. Then they are stored. Otherwise, they are
  // added to what the entries hold.
  bool is_first;

  // The entry of query i and key 0 of head (b, h).
  Entry* row(int64_t b, int64_t h, int64_t i) const { return row_of<Entry>(view, b, h, i); }

  // Stores the first `count` lanes of x in entries that lie side by side, or adds them.
  template <class Lane>
  void put(Entry* entries, Vec<Lane> x, int count) const {
    store_as<Lane>(entries, is_first ? x : load_as<Lane>(entries, count) + x, count);
  }

  // The same for one entry.
  template <class Lane>
  void put(Entry* entry, Lane x) const {
    put<Lane>(entry, broadcast<Lane>(x), 1);
  }
};

// The number of entries from the first entry of the gradient of a dense bias to the last one, of all heads.
inline int64_t extent_of_scores(const AttentionParams& p, const TensorView& view) {
  return (p.batch - 1) * view.stride_batch + (p.num_heads - 1) * view.stride_head + (p.seqlen_q - 1) * view.stride_row +
         (p.seqlen_k - 1) * view.stride_col + 1;
}

// Calls f with the gradients of the dense bias and of the key bias of head (b, h), those that are wanted. The item that
// computes the gradients of the head sets entries to zero that no score reaches (clear_dbias).
template <class Policy, class F>
FA_INLINE void with_bias_gradients(const AttentionParams& p, int64_t b, int64_t h, const F& f) {
  using Lane = typename Policy::Lane;
  if (p.dbias.data != nullptr) {
    // Batch entries or heads that share entries are in one item, in order.
    const bool is_first =
        has_entries_of_scores(p.dbias) && (p.dbias.stride_batch != 0 || b == 0) && (p.dbias.stride_head != 0 || h == 0);
    if (p.dbias_dtype == p.dtype) {
      f(BiasGradient<typename Policy::Storage>{p.dbias, is_first});
    } else {
      f(BiasGradient<Lane>{p.dbias, is_first});
    }
  }
  if (p.dkey_bias.data != nullptr) f(BiasGradient<Lane>{p.dkey_bias, /*is_first=*/false});
}

// Stores or adds dscores of a block of keys, tile[key][query]. There are four branches:
//
//   stride_col is 0                    all keys share an entry, so the function sums over the keys
//   stride_row is 0                    all queries share an entry, so the function sums over the queries
//   stride_col is 1, contiguous keys   the function transposes the tile, and takes whole vectors
//   otherwise                          the function takes one number at a time
template <class Lane, class Entry>
FA_NOINLINE void accumulate_dbias(const BiasGradient<Entry>& gradient, const QueryBlock& queries, const KeyBlock& keys,
                                  const Lane* tile) {
  constexpr int n = kLanes<Lane>;
  const TensorView& view = gradient.view;
  const int nq = queries.count;
  const int64_t stride = round_up(nq, n);
  Entry* base = rows_of<Entry>(view, queries);
  if (view.stride_col == 0) {
    Vec<Lane> total = {};
    for (int q = 0; q < nq; q += n) {
      Vec<Lane> sum = {};
      for (int k = 0; k < keys.count; ++k) sum += load<Lane>(tile + k * stride + q);
      total += sum;  // clear_beyond has set the lanes of queries from nq on to zero
      for (int i = 0; view.stride_row != 0 && i < n && q + i < nq; ++i) {
        gradient.template put<Lane>(base + (q + i) * view.stride_row, sum[i]);
      }
    }
    if (view.stride_row == 0) gradient.template put<Lane>(base, sum_lanes<Lane>(total));
  } else if (view.stride_row == 0) {
    for (int k = 0; k < keys.count; ++k) {
      Vec<Lane> sum = {};
      for (int q = 0; q < nq; q += n) sum += load<Lane>(tile + k * stride + q);
      gradient.template put<Lane>(base + keys.index[k] * view.stride_col, sum_lanes<Lane>(sum));
    }
  } else if (view.stride_col == 1 && keys.contiguous) {
    base += keys.index[0];
    for (int q = 0; q < nq; q += n) {
      for (int k = 0; k < keys.count; k += n) {
        Vec<Lane> block[n];
        FA_UNROLL
        for (int i = 0; i < n; ++i) block[i] = load<Lane>(tile + (k + i) * stride + q);
        transpose<Lane>(block);
        const int count = keys.count - k;
        Entry* const target = base + q * view.stride_row + k;
        if (q + n <= nq && count >= n) {
          FA_UNROLL
          for (int i = 0; i < n; ++i) gradient.template put<Lane>(target + i * view.stride_row, block[i], n);
        } else {
          FA_UNROLL
          for (int i = 0; i < n; ++i) {
            if (q + i < nq) gradient.template put<Lane>(target + i * view.stride_row, block[i], count);
          }
        }
      }
    }
  } else {
    for (int k = 0; k < keys.count; ++k) {
      Entry* column = base + keys.index[k] * view.stride_col;
      for (int q = 0; q < nq; ++q) gradient.template put<Lane>(column + q * view.stride_row, tile[k * stride + q]);
    }
  }
}

// Stores dscores of a block of keys, pairs[pair of keys][query], in the gradient of the dense bias, in which each score
// has an entry of its own.
template <class Policy>
FA_NOINLINE void store_dbias_pairs(const TensorView& view, const QueryBlock& queries, const KeyBlock& keys,
                                   const typename Policy::Lane* pairs) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int nq = queries.count;
  const int64_t stride = round_up(nq, n);
  Storage* base = rows_of<Storage>(view, queries);
  if (view.stride_col == 1 && keys.contiguous) {
    base += keys.index[0];
    for (int q = 0; q < nq; q += n) {
      for (int k = 0; k < keys.count; k += 2 * n) {
        Vec<Lane> block[n];
        FA_UNROLL
        for (int i = 0; i < n; ++i) block[i] = load<Lane>(pairs + (k / 2 + i) * stride + q);
        transpose<Lane>(block);
        FA_UNROLL
        for (int i = 0; i < n; ++i) {
          if (q + i < nq) store_lanes<Policy>(base + (q + i) * view.stride_row + k, 0, keys.count - k, block[i]);
        }
      }
    }
    return;
  }
  for (int k = 0; k < keys.count; ++k) {
    const auto* column = reinterpret_cast<const Storage*>(pairs + k / 2 * stride) + k % 2;
    for (int q = 0; q < nq; ++q) base[q * view.stride_row + keys.index[k] * view.stride_col] = column[2 * q];
  }
}

// Adds dscores of a block of keys, tile[key][query], to the gradient of the relative bias, which is stored reversed
// (RelativeBias). `relative` points to the entry of the block's first query and key 0. So the dscores of one key and 64
// neighbouring queries are added to 64 neighbouring entries, as whole vectors.
template <class Lane>
FA_NOINLINE void accumulate_drelative(const KeyBlock& keys, int vectors, const Lane* tile, Lane* relative) {
  constexpr int n = kLanes<Lane>;
  for (int k = 0; k < keys.count; ++k) {
    for (int v = 0; v < vectors; ++v) {
      Lane* target = relative - keys.index[k] + v * n;
      store<Lane>(target, load<Lane>(target) + load<Lane>(tile + (k * vectors + v) * n));
    }
  }
}

// Sets the vectors of queries outside of `range` to zero, in `count` rows of a tile, of keys or pairs of keys, from
// `row` on. dscores are computed only for the vectors inside of `range`, but what stores or adds them reads whole rows.
template <class Lane>
FA_INLINE void clear_outside(Lane* tile, int row, int count, VectorRange range, int vectors) {
  constexpr int n = kLanes<Lane>;
  for (int v = 0; v < vectors; ++v) {
    if (v >= range.begin && v < range.end) continue;
    for (int r = 0; r < count; ++r) store<Lane>(tile + ((row + r) * vectors + v) * n, Vec<Lane>{});
  }
}

// Sets the lanes of queries from nq on, which do not exist, to zero. A key with an infinite element makes these lanes
// NaN, and the sums over queries in accumulate_dbias add up whole vectors.
template <class Lane>
FA_INLINE void clear_beyond(Lane* tile, int keys, int nq) {
  const int end = static_cast<int>(round_up(nq, kLanes<Lane>));
  if (nq == end) return;
  for (int k = 0; k < keys; ++k) {
    for (int q = nq; q < end; ++q) tile[k * end + q] = 0;
  }
}

// Sets the columns [key_begin, key_end) of a gradient, for head (b, h), to zero.
template <class Entry>
FA_NOINLINE void clear_dbias(const BiasGradient<Entry>& gradient, int64_t b, int64_t h, int64_t seqlen_q,
                             int64_t key_begin, int64_t key_end) {
  const int64_t stride_col = gradient.view.stride_col;
  const int64_t rows = gradient.view.stride_row == 0 ? 1 : seqlen_q;
  for (int64_t i = 0; i < rows; ++i) {
    Entry* row = gradient.row(b, h, i);
    if (stride_col == 1) {
      memset(static_cast<void*>(row + key_begin), 0, (key_end - key_begin) * sizeof(Entry));
    } else {
      for (int64_t j = key_begin; j < key_end; ++j) memset(static_cast<void*>(row + j * stride_col), 0, sizeof(Entry));
    }
  }
}

// Computes the gradient of the relative bias: the sum of its partial sums over chunks and batch entries. If all heads
// share one bias (stride 0), the sum also goes over the heads. The order of the sum is fixed, so that a second call
// gives the same bits.
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

}  // namespace
}  // namespace fused_attn::cpu
