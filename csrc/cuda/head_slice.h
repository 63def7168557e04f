// Where the rows of one head lie in tensors, in packed problems and in others.
#pragma once
#include "hardware.h"
#include "params.h"

namespace fused_attn::gpu {

GPU_DEVICE int32_t clamp_to(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

// One head of one batch entry, or of one packed sequence: its indices, offsets and lengths.
struct HeadSlice {
  int32_t batch;  // index of the batch entry, or of the packed sequence
  int32_t head;
  int32_t kv_head;
  int32_t q_offset;  // first row of the sequence in a packed tensor, else 0
  int32_t k_offset;  // the same for keys
  int32_t seqlen_q;
  int32_t seqlen_k;
  // First row of the sequence in arrays that have whole row blocks (kRowBlock) for each sequence.
  int32_t padded_q_offset;

  // What is added to both diagonals of the band.
  GPU_DEVICE int32_t diagonal_shift(const Params& p) const { return p.band_from_end ? seqlen_k - seqlen_q : 0; }

  // query_row returns the address of row `row` of this head in a tensor with a row for each query. key_row does the
  // same for the key head, in a tensor with a row for each key.
  template <class T>
  GPU_DEVICE T* query_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch * x.stride_batch + head * x.stride_head + (q_offset + row) * x.stride_row;
  }
  template <class T>
  GPU_DEVICE T* key_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch * x.stride_batch + kv_head * x.stride_head + (k_offset + row) * x.stride_row;
  }
  // Address of the number that belongs to query `row`, in a tensor like lse.
  GPU_DEVICE float* query_value(const RowValues& x, int64_t row) const {
    return x.data + batch * x.stride_batch + head * x.stride_head + (q_offset + row) * x.stride_row;
  }
  // Address of the number that belongs to query `row`, in an array of the workspace that has whole row blocks for each
  // sequence.
  GPU_DEVICE float* row_statistic(const RowValues& x, int64_t row) const {
    return x.data + batch * x.stride_batch + head * x.stride_head + (padded_q_offset + row) * x.stride_row;
  }
  // The number of the row block that begins with query 0 of this head slice, counted over all heads and sequences.
  GPU_DEVICE int64_t first_row_block(const Params& p) const {
    const int64_t entry = p.cu_seqlens_q != nullptr ? 0 : batch;
    return (entry * p.num_heads + head) * p.row_blocks + padded_q_offset / kRowBlock;
  }
};

// What the table of a batch entry says about the page of a key.
GPU_DEVICE int32_t listed_page(const Pages& pages, int32_t batch, int32_t key) {
  return load_global(pages.table + batch * pages.stride_batch + key / pages.size);
}
// The page that a number of the table stands for: the nearest one that exists.
GPU_DEVICE int32_t existing_page(const Pages& pages, int32_t listed) { return clamp_to(listed, 0, pages.count - 1); }

// The offset of a sequence, or the nearest one within a tensor of `rows` rows. cu_seqlens is read on the GPU only, so
// it may hold any numbers.
GPU_DEVICE int32_t offset_in(const int32_t* cu_seqlens, int32_t sequence, int32_t rows) {
  return clamp_to(load_global(cu_seqlens + sequence), 0, rows);
}

// The first row block of a sequence of a packed tensor, if each sequence begins a row block of its own. A sequence may
// end within a row block. So each one before this one may take one block more than its rows fill, and the result
// follows from the offset alone.
GPU_DEVICE int32_t first_row_block_of(const int32_t* cu_seqlens, int32_t sequence, int32_t rows) {
  return offset_in(cu_seqlens, sequence, rows) / kRowBlock + sequence;
}

// Fills in the head slice of a batch entry or sequence. Reads cu_seqlens in packed problems, and key_lengths. Whatever
// these hold, the rows of the head slice lie within the tensors and the workspace.
GPU_DEVICE HeadSlice head_slice_of(const Params& p, int32_t batch, int32_t head, int32_t kv_head) {
  HeadSlice head_slice{batch, head, kv_head, 0, 0, p.seqlen_q, p.seqlen_k, 0};
  if (p.cu_seqlens_q != nullptr) {
    head_slice.q_offset = offset_in(p.cu_seqlens_q, batch, p.rows_q);
    head_slice.seqlen_q = clamp_to(offset_in(p.cu_seqlens_q, batch + 1, p.rows_q) - head_slice.q_offset, 0, p.seqlen_q);
    head_slice.padded_q_offset = first_row_block_of(p.cu_seqlens_q, batch, p.rows_q) * kRowBlock;
  }
  if (p.cu_seqlens_k != nullptr) {
    head_slice.k_offset = offset_in(p.cu_seqlens_k, batch, p.rows_k);
    head_slice.seqlen_k = clamp_to(offset_in(p.cu_seqlens_k, batch + 1, p.rows_k) - head_slice.k_offset, 0, p.seqlen_k);
  }
  if (p.key_lengths != nullptr) head_slice.seqlen_k = clamp_to(load_global(p.key_lengths + batch), 0, p.seqlen_k);
  return head_slice;
}

}  // namespace fused_attn::gpu
