// The rows of one sequence in a packed tensor, its band, blocks of queries, groups of query heads, the address of a row
// in a TensorView, and the sink of a head.
#pragma once
#include "../common/attention_params.h"
#include "../common/band.h"
#include "vec_math.h"

namespace fused_attn::cpu {
namespace {

// One sequence of the batch: its lengths, the rows of the tensors at which it begins, and the diagonal of its band. The
// first two offsets are 0 unless the call is packed.
struct Sequence {
  int64_t q_offset;
  int64_t k_offset;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t band_offset;
};

// Sequence number b of the batch.
FA_INLINE Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s = {0, 0, p.seqlen_q, p.seqlen_k, p.band_offset};
  if (p.cu_seqlens_q != nullptr) {
    s.q_offset = p.cu_seqlens_q[b];
    s.seqlen_q = (p.query_ends != nullptr ? p.query_ends[b] : p.cu_seqlens_q[b + 1]) - s.q_offset;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_offset = p.cu_seqlens_k[b];
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.k_offset;
  }
  if (p.key_lengths != nullptr) s.seqlen_k = p.key_lengths[b];
  if (p.band_from_end) s.band_offset += s.seqlen_k - s.seqlen_q;
  return s;
}

// The band of a sequence.
FA_INLINE Band band_of(const AttentionParams& p, const Sequence& seq) {
  return {p.band_left, p.band_right, seq.band_offset};
}

// Neighbouring queries of one head: [begin, begin + count) of head h of batch entry b. The numbers count from the first
// query of the sequence.
struct QueryBlock {
  int64_t b;
  int64_t h;
  int64_t begin;
  int count;
};

// The number of query heads that read one kv head.
FA_INLINE int64_t group_size_of(const AttentionParams& p) { return p.num_heads / p.num_kv_heads; }

// The kv head that query head h reads.
FA_INLINE int64_t kv_head_of(const AttentionParams& p, int64_t h) { return h / group_size_of(p); }

// The address of the first element of row (b, h, row) of a view.
template <class T>
FA_INLINE T* row_of(const TensorView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(view.data) + (b * view.stride_batch + h * view.stride_head + row * view.stride_row);
}

// The address of the first query of a block in a view whose rows count from the first query of the sequence. Those of
// masks and biases do.
template <class T>
FA_INLINE T* rows_of(const TensorView& view, const QueryBlock& queries) {
  return row_of<T>(view, queries.b, queries.h, queries.begin);
}

// The same in a view of a tensor that a packed call packs, such as query and out.
template <class T>
FA_INLINE T* rows_of(const TensorView& view, const Sequence& seq, const QueryBlock& queries) {
  return row_of<T>(view, queries.b, queries.h, seq.q_offset + queries.begin);
}

// The logit that is added to the denominators of head h. Without sinks, it is -inf.
template <class Lane>
FA_INLINE Lane sink_of(const AttentionParams& p, int64_t h) {
  return p.sinks.data != nullptr ? *row_of<const Lane>(p.sinks, 0, h, 0) : -FloatTraits<Lane>::kInfinity;
}

}  // namespace
}  // namespace fused_attn::cpu
