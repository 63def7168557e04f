// The gradients of the dense and of the relative bias, from dscores of a block of keys.
#pragma once
#include "backward_plan.h"

namespace fused_attn::cpu {
namespace {

// Adds the block's dscores (tile[key][query]) to the gradient of the bias, summed over the dimensions whose stride is
// 0.
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
      for (int q = 0; q < nq; ++q) column[q * view.stride_row] += tile[k * kBlockQ + q];
    }
  }
}

// Adds the block's dscores to the gradient of the reversed relative bias. A key adds to 64 neighbouring entries.
template <class Lane>
FA_NOINLINE void accumulate_drelative(const KeyBlock& keys, int vectors, const Lane* tile, Lane* relative) {
  constexpr int n = kLanes<Lane>;
  for (int k = 0; k < keys.count; ++k) {
    for (int v = 0; v < vectors; ++v) {
      Lane* target = relative - keys.index[k] + v * n;
      store<Lane>(target, load<Lane>(target) + load<Lane>(tile + k * kBlockQ + v * n));
    }
  }
}

// Zeros the vectors that the range of a tile does not cover, because whole rows of the tile will be read.
template <class Lane>
FA_INLINE void clear_outside(Lane* tile, int k, VectorRange range, int vectors) {
  constexpr int n = kLanes<Lane>;
  for (int v = 0; v < vectors; ++v) {
    if (v >= range.begin && v < range.end) continue;
    for (int r = 0; r < kTileKeys; ++r) store<Lane>(tile + (k + r) * kBlockQ + v * n, Vec<Lane>{});
  }
}

// Zeros the lanes of queries that do not exist. An infinite key makes them NaN, and sums over queries read whole
// vectors.
template <class Lane>
FA_INLINE void clear_beyond(Lane* tile, int keys, int nq) {
  const int end = static_cast<int>(round_up(nq, kLanes<Lane>));
  if (nq == end) return;
  for (int k = 0; k < keys; ++k) {
    for (int q = nq; q < end; ++q) tile[k * kBlockQ + q] = 0;
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

// Sums the partial gradients of the relative bias over chunks and batch entries, in order. If heads share the bias,
// sums over them, too.
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
