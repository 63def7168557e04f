// A copy of the relative bias in reversed order, so that the biases of neighbouring queries are neighbours in memory.
#pragma once
#include "memory.h"
#include "sequence.h"
#include "tiles.h"

namespace fused_attn::cpu {
namespace {

// The reversed relative bias: the bias of query i and key j is data[i - j + seqlen_k - 1] of the row of the head.
template <class Lane>
struct RelativeBias {
  const Lane* data = nullptr;
  int64_t stride_head = 0;
};

// The number of different distances between a query and a key; 0 without queries and keys.
FA_INLINE int64_t relative_columns(const AttentionParams& p) {
  const int64_t columns = p.seqlen_q + p.seqlen_k - 1;
  return columns < 0 ? 0 : columns;
}

// The length of a row of the copy of a relative bias. It is longer than the number of columns, because kernels read
// whole blocks of queries, and the last block may reach past seqlen_q.
FA_INLINE int64_t relative_row(const AttentionParams& p) { return round_up(relative_columns(p) + kBlockQ, kCacheLine); }

// The number of rows of the copy of a relative bias: 1 if all heads share one row (stride 0), otherwise one for each
// head.
FA_INLINE int64_t relative_heads(const AttentionParams& p, const TensorView& view) {
  return view.stride_head == 0 ? 1 : p.num_heads;
}

// The size of the copy that make_relative_bias makes, in bytes; 0 without a relative bias.
template <class Lane>
int64_t relative_bias_bytes(const AttentionParams& p) {
  if (p.relative_bias.data == nullptr) return 0;
  return relative_heads(p, p.relative_bias) * relative_row(p) * static_cast<int64_t>(sizeof(Lane));
}

// Makes the reversed copy in `memory`. In the tensor of the caller, the column is j - i + seqlen_q - 1, so it falls as
// the query i rises. In the copy it rises, so a vector of queries loads neighbouring numbers. Zeros follow behind the
// last column, for queries of the last block that do not exist.
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
