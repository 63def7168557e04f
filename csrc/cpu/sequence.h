// Where a sequence lies in packed tensors, and where a row lies in a view.
#pragma once
#include "../common/attention_params.h"
#include "vec.h"

namespace fused_attn::cpu {
namespace {

// Where a sequence lies. Positions within the sequence count from these offsets.
struct Sequence {
  int64_t q_offset;
  int64_t k_offset;
  int64_t seqlen_q;
  int64_t seqlen_k;
};

FA_INLINE Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s = {0, 0, p.seqlen_q, p.seqlen_k};
  if (p.cu_seqlens_q != nullptr) {
    s.q_offset = p.cu_seqlens_q[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.q_offset;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_offset = p.cu_seqlens_k[b];
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.k_offset;
  }
  return s;
}

// The element of a view at (b, h, row).
template <class T>
FA_INLINE T* row_of(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(view.data) + (b * view.stride_batch + h * view.stride_head + row * view.stride_row);
}

}  // namespace
}  // namespace fused_attn::cpu
