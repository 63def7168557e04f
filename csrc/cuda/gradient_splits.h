// Splits of backward: if a gradient has few blocks of rows, several programs (blocks of threads) share the work for
// each block. For dq, each program visits a part of the keys (a Perceiver, whose few queries see many keys). For dk and
// dv, each visits a part of the queries (cross-attention to a short text, or many query heads that share one key head).
// Each program stores its part of the gradient in float, and a second kernel adds the parts (merge_gradients.h).
//
// The fused backward needs no splits for dq: its blocks of keys add to dq in any case, if there are several.
#pragma once
#include <type_traits>

#include "fragments.h"
#include "params.h"
#include "visibility.h"

namespace fused_attn::gpu {

// What a program works on: number n computes split n % num_splits of block n / num_splits.
struct SplitOfBlock {
  int32_t block;
  int32_t split;

  GPU_DEVICE SplitOfBlock(int32_t program, int32_t num_splits)
      : block(program / num_splits), split(program % num_splits) {}
};

// Stores this thread's row r of a fragment of a gradient, times `factor`: rounded to T, or as floats if it is a part.
// row_of(T{}, rows) gives the address of the row in a tensor of type T. All lanes of the warp call this.
template <class T, class RowOf, int kTiles>
GPU_DEVICE void store_gradient_row(const Rows& gradient, const GradientParts& parts, int32_t split, RowOf row_of,
                                   const float (&x)[kTiles][4], int r, float factor, bool is_row, Lane lane) {
  if (parts.rows.data == nullptr)
    return store_row<T>(row_of(T{}, gradient), x, r, factor, is_row, gradient.columns, lane);
  if (!is_row) return;
  float* const row = row_of(float{}, parts.rows) + split * parts.stride_split + 2 * lane.q;
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    if (8 * t < gradient.columns)
      store_global(reinterpret_cast<Float2*>(row + 8 * t), Float2{x[t][2 * r] * factor, x[t][2 * r + 1] * factor});
  }
}

// Stores zeros in place of the sums of store_gradient_row.
template <class T, class RowOf>
GPU_DEVICE void store_zero_row(const Rows& gradient, const GradientParts& parts, int32_t split, RowOf row_of,
                               bool is_row, Lane lane) {
  if (!is_row) return;
  const auto fill_row = [&](auto* row) {
    constexpr int kColumns = 16 / sizeof(std::remove_pointer_t<decltype(row)>);
    for (int column = kColumns * lane.q; column < gradient.columns; column += 4 * kColumns)
      store_global(reinterpret_cast<Vec4*>(row + column), Vec4{0, 0, 0, 0});
  };
  if (parts.rows.data == nullptr) {
    fill_row(row_of(T{}, gradient));
  } else {
    fill_row(row_of(float{}, parts.rows) + split * parts.stride_split);
  }
}

}  // namespace fused_attn::gpu
