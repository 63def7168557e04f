// The gradients of the dense bias, the key bias and the relative bias, which are sums of dscores.
#pragma once
#include "backward_plan.h"

namespace fused_attn::cpu {
namespace {

// Adds dscores of a block of keys, tile[key][query], to the gradient of the dense bias, or of the key bias, of head (b,
// h). A dimension in which the bias is broadcast has stride 0 in `view`, so the function sums over it. There are four
// branches:
//
//   stride_col is 0                    all keys share an entry, so the function sums over the keys
//   stride_row is 0                    all queries share an entry, so the function sums over the queries
//   stride_col is 1, contiguous keys   the function transposes the tile, and adds whole vectors
//   otherwise                          the function adds one number at a time
template <class Lane>
FA_NOINLINE void accumulate_dbias(const TensorView& view, int64_t b, int64_t h, int64_t q_begin, int nq,
                                  const KeyBlock& keys, const Lane* tile) {
  constexpr int n = kLanes<Lane>;
  const int64_t stride = round_up(nq, n);
  Lane* base = row_of<Lane>(view, b, h, q_begin);
  if (view.stride_col == 0) {
    Vec<Lane> total = {};
    for (int q = 0; q < nq; q += n) {
      Vec<Lane> sum = {};
      for (int k = 0; k < keys.count; ++k) sum += load<Lane>(tile + k * stride + q);
      total += sum;  // clear_beyond has set the lanes of queries from nq on to zero
      for (int i = 0; view.stride_row != 0 && i < n && q + i < nq; ++i) base[(q + i) * view.stride_row] += sum[i];
    }
    if (view.stride_row == 0) *base += sum_lanes<Lane>(total);
  } else if (view.stride_row == 0) {
    for (int k = 0; k < keys.count; ++k) {
      Vec<Lane> sum = {};
      for (int q = 0; q < nq; q += n) sum += load<Lane>(tile + k * stride + q);
      base[keys.index[k] * view.stride_col] += sum_lanes<Lane>(sum);
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
        if (q + n <= nq && count >= n) {
          FA_UNROLL
          for (int i = 0; i < n; ++i) {
            Lane* target = base + (q + i) * view.stride_row + k;
            store<Lane>(target, load<Lane>(target) + block[i]);
          }
        } else {
          FA_UNROLL
          for (int i = 0; i < n; ++i) {
            Lane* target = base + (q + i) * view.stride_row + k;
            if (q + i < nq) store_as<Lane>(target, load_as<Lane>(target, count) + block[i], count);
          }
        }
      }
    }
  } else {
    for (int k = 0; k < keys.count; ++k) {
      Lane* column = base + keys.index[k] * view.stride_col;
      for (int q = 0; q < nq; ++q) column[q * view.stride_row] += tile[k * stride + q];
    }
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

// Sets the vectors of queries outside of `range` to zero, in the rows of the tile of keys that begins at key k. The
// tile computed dscores only for the vectors inside of `range`, but accumulate_dbias reads whole rows.
template <class Lane>
FA_INLINE void clear_outside(Lane* tile, int k, VectorRange range, int vectors) {
  constexpr int n = kLanes<Lane>;
  for (int v = 0; v < vectors; ++v) {
    if (v >= range.begin && v < range.end) continue;
    for (int r = 0; r < kTileKeys; ++r) store<Lane>(tile + ((k + r) * vectors + v) * n, Vec<Lane>{});
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

// Sets the columns [key_begin, key_end) of a gradient that accumulate_dbias adds to, for head (b, h), to zero.
template <class Lane>
FA_NOINLINE void clear_dbias(const TensorView& view, int64_t b, int64_t h, int64_t seqlen_q, int64_t key_begin,
                             int64_t key_end) {
  const int64_t rows = view.stride_row == 0 ? 1 : seqlen_q;
  for (int64_t i = 0; i < rows; ++i) {
    Lane* row = row_of<Lane>(view, b, h, i);
    if (view.stride_col == 1) {
      memset(row + key_begin, 0, (key_end - key_begin) * sizeof(Lane));
    } else {
      for (int64_t j = key_begin; j < key_end; ++j) row[j * view.stride_col] = 0;
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
