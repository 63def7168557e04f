// Which block of which head a program works on, and where that head's rows lie.
#pragma once
#include "params.h"
#include "primitives.h"

namespace fused_attn::gpu {

// One sequence (or batch entry) and head.
struct Place {
  int32_t batch;
  int32_t head;
  int32_t kv_head;
  int32_t first_q;  // first row of the sequence in a packed tensor, else 0
  int32_t first_k;
  int32_t len_q;
  int32_t len_k;
  int32_t first_sum;  // first row of the sequence in arrays of whole row blocks (kRowBlock)

  template <class T>
  GPU_DEVICE T* query_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch * x.stride_batch + head * x.stride_head + (first_q + row) * x.stride_row;
  }
  template <class T>
  GPU_DEVICE T* key_row(const Rows& x, int64_t row) const {
    return static_cast<T*>(x.data) + batch * x.stride_batch + kv_head * x.stride_head + (first_k + row) * x.stride_row;
  }
  GPU_DEVICE float* query_value(const RowValues& x, int64_t row) const {
    return x.data + batch * x.stride_batch + head * x.stride_head + (first_q + row) * x.stride_row;
  }
  // Of an array that has whole row blocks for each sequence.
  GPU_DEVICE float* row_sum(const RowValues& x, int64_t row) const {
    return x.data + batch * x.stride_batch + head * x.stride_head + (first_sum + row) * x.stride_row;
  }
  // The number, over all heads and sequences, of the row block that begins with row 0.
  GPU_DEVICE int64_t first_row_block(const Params& p) const {
    const int64_t entry = p.cu_seqlens_q != nullptr ? 0 : batch;
    return (entry * p.num_heads + head) * p.row_blocks + first_sum / kRowBlock;
  }
};

GPU_DEVICE Place place_of(const Params& p, int32_t batch, int32_t head, int32_t kv_head) {
  Place place{batch, head, kv_head, 0, 0, p.seqlen_q, p.seqlen_k, 0};
  if (p.cu_seqlens_q != nullptr) {
    place.first_q = load_global(p.cu_seqlens_q + batch);
    // No more than the caller said: what follows is laid out for that, and other rows have nobody to add to them.
    place.len_q = min(load_global(p.cu_seqlens_q + batch + 1) - place.first_q, p.seqlen_q);
    place.first_k = load_global(p.cu_seqlens_k + batch);
    place.len_k = min(load_global(p.cu_seqlens_k + batch + 1) - place.first_k, p.seqlen_k);
    // Sequences end within row blocks: one more block for each leaves room for all that come before.
    place.first_sum = (place.first_q / kRowBlock + batch) * kRowBlock;
  }
  return place;
}

struct Work {
  int32_t block;
  int32_t head;
  int32_t batch;
};

// Programs are numbered so that the heads of a section run side by side, and their keys and values stay in the L2
// cache. Within a section the longest blocks start first (the last ones where causal queries are tiled, the first ones
// where keys are), so that only short ones are left when the multiprocessors run out of work.
GPU_DEVICE Work scheduled_work(int32_t program, int32_t num_blocks, int32_t num_heads, int32_t batch,
                               int32_t heads_per_section, bool last_first) {
  const int32_t total_heads = num_heads * batch;
  heads_per_section = min(heads_per_section, total_heads);  // or the product below could pass 2^31
  const int32_t section = program / (heads_per_section * num_blocks);
  const int32_t first_head = section * heads_per_section;
  const int32_t heads_here = min(heads_per_section, total_heads - first_head);
  const int32_t within = program - first_head * num_blocks;
  int32_t block = within / heads_here;
  const int32_t head = first_head + within % heads_here;
  if (last_first) block = num_blocks - 1 - block;
  return {block, head % num_heads, head / num_heads};
}

}  // namespace fused_attn::gpu
