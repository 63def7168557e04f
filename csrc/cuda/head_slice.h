// Where the rows of one head lie in tensors, packed or not.
#pragma once
#include "hardware.h"
#include "params.h"

namespace fused_attn::gpu {

// Where one head of one batch entry, or of one packed sequence, lies in the tensors: its indices, offsets and lengths.
struct HeadSlice {
  int32_t batch;
  int32_t head;
  int32_t kv_head;
  int32_t q_offset;  // first row of the sequence in a packed tensor, else 0
  int32_t k_offset;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t
      padded_q_offset;  // first row of the sequence in arrays that have whole row blocks (kRowBlock) for each sequence

  template <class T>
  GPU_DEVICE T* query_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch * x.stride_batch + head * x.stride_head + (q_offset + row) * x.stride_row;
  }
  template <class T>
  GPU_DEVICE T* key_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch * x.stride_batch + kv_head * x.stride_head + (k_offset + row) * x.stride_row;
  }
  GPU_DEVICE float* query_value(const RowValues& x, int64_t row) const {
    return x.data + batch * x.stride_batch + head * x.stride_head + (q_offset + row) * x.stride_row;
  }
  // The entry of an array that has whole row blocks for each sequence.
  GPU_DEVICE float* row_statistic(const RowValues& x, int64_t row) const {
    return x.data + batch * x.stride_batch + head * x.stride_head + (padded_q_offset + row) * x.stride_row;
  }
  // The number of the row block that begins with row 0, counted over all heads and sequences.
  GPU_DEVICE int64_t first_row_block(const Params& p) const {
    const int64_t entry = p.cu_seqlens_q != nullptr ? 0 : batch;
    return (entry * p.num_heads + head) * p.row_blocks + padded_q_offset / kRowBlock;
  }
};

GPU_DEVICE HeadSlice head_slice_of(const Params& p, int32_t batch, int32_t head, int32_t kv_head) {
  HeadSlice head_slice{batch, head, kv_head, 0, 0, p.seqlen_q, p.seqlen_k, 0};
  if (p.cu_seqlens_q != nullptr) {
    head_slice.q_offset = load_global(p.cu_seqlens_q + batch);
    // No more rows than the caller said: the workspace is laid out for that, and nobody adds to the gradients of
    // others.
    head_slice.seqlen_q = min(load_global(p.cu_seqlens_q + batch + 1) - head_slice.q_offset, p.seqlen_q);
    head_slice.k_offset = load_global(p.cu_seqlens_k + batch);
    head_slice.seqlen_k = min(load_global(p.cu_seqlens_k + batch + 1) - head_slice.k_offset, p.seqlen_k);
    // A sequence may end within a row block. One more block for each sequence before leaves room for all of them.
    head_slice.padded_q_offset = (head_slice.q_offset / kRowBlock + batch) * kRowBlock;
  }
  return head_slice;
}

}  // namespace fused_attn::gpu
