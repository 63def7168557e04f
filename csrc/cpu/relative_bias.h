// The relative bias, laid out so that the queries of a block read neighbouring numbers.
#pragma once
#include "memory.h"
#include "sequence.h"
#include "tiles.h"

namespace fused_attn::cpu {
namespace {

// The relative bias, reversed: the biases of key j for the 64 queries from i on are data[i - j + seqlen_k - 1 ...].
template <class Lane>
struct RelativeBias {
  const Lane* data = nullptr;
  int64_t stride_head = 0;
};

// Without a pair of positions there is no column.
FA_INLINE int64_t relative_columns(const AttentionParams& p) {
  const int64_t columns = p.seqlen_q + p.seqlen_k - 1;
  return columns < 0 ? 0 : columns;
}

// A row is longer than the columns, because a block of queries may reach past seqlen_q.
FA_INLINE int64_t relative_row(const AttentionParams& p) { return round_up(relative_columns(p) + kBlockQ, kCacheLine); }

FA_INLINE int64_t relative_heads(const AttentionParams& p, const TensorView& view) {
  return view.stride_head == 0 ? 1 : p.num_heads;
}

template <class Lane>
int64_t relative_bias_bytes(const AttentionParams& p) {
  if (p.relative_bias.data == nullptr) return 0;
  return relative_heads(p, p.relative_bias) * relative_row(p) * static_cast<int64_t>(sizeof(Lane));
}

// Copies the relative bias into memory. The copy is reversed, because the index falls as the query rises: so the
// vector loads of neighbouring queries read neighbouring numbers. Behind the columns are zeros, for queries of a block
// past seqlen_q.
template <class Lane>
RelativeBias<Lane> make_relative_bias(const AttentionParams& p, char* memory) {
  RelativeBias<Lane> result;
  if (p.relative_bias.data == nullptr) return result;
  Lane* data = reinterpret_cast<Lane*>(memory);
  const int64_t columns = relative_columns(p);
  const int64_t row = relative_row(p);
  const int64_t heads = relative_heads(p, p.relative_bias);
  for (int64_t h = 0; h < heads; ++h) {
    const Lane* source = row_of<const Lane>(p.relative_bias, 0, h, 0);
    Lane* target = data + h * row;
    for (int64_t c = 0; c < columns; ++c) target[c] = source[(columns - 1 - c) * p.relative_bias.stride_col];
    for (int64_t c = columns; c < row; ++c) target[c] = 0;
  }
  result.data = data;
  result.stride_head = heads == 1 ? 0 : row;
  return result;
}

}  // namespace
}  // namespace fused_attn::cpu
