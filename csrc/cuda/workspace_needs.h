// From Call to WorkspaceNeeds: what the caller wants, in numbers and flags, and what several steps of a call ask about
// them.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

#include "attention.h"
#include "bias_gradient/plan.h"
#include "decode.h"
#include "kernels.h"

namespace fused_attn::gpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the masks of the caller differ among batch entries, and among heads.
inline bool mask_has_batch(const AttentionParams& a) {
  return a.mask.stride_batch != 0 || a.key_ranges.stride_batch != 0;
}
inline bool mask_has_heads(const AttentionParams& a) {
  return a.mask.stride_head != 0 || a.key_ranges.stride_head != 0;
}

// How many different masks (batch entry, head) the dense mask and the ranges of keys make; 0 without both.
inline int64_t mask_entries(const AttentionParams& a) {
  if (a.mask.data == nullptr && a.key_ranges.data == nullptr) return 0;
  return (mask_has_batch(a) ? a.batch : 1) * (mask_has_heads(a) ? a.num_heads : 1);
}

// How many heads the relative bias has: 0 without one, 1 if all heads share it.
inline int64_t relative_bias_heads(const AttentionParams& a) {
  if (a.relative_bias.data == nullptr) return 0;
  return a.relative_bias.stride_head == 0 ? 1 : a.num_heads;
}

// Fills in WorkspaceNeeds, in the order of its fields. head_dim: the one that the kernels are compiled for, which may
// be larger than that of the tensors. Sums in the workspace have as many columns.
inline WorkspaceNeeds needs_of(const Call& call, bool is_backward, int64_t head_dim) {
  const AttentionParams& a = call.params;
  WorkspaceNeeds needs;
  needs.architecture = call.architecture;
  needs.is_backward = is_backward;
  needs.batch = a.batch;
  needs.batch_entries = call.batch_entries;
  needs.num_heads = a.num_heads;
  needs.num_kv_heads = a.num_kv_heads;
  needs.rows_q = call.rows_q;
  needs.rows_k = call.rows_k;
  needs.seqlen_q = a.seqlen_q;
  needs.seqlen_k = a.seqlen_k;
  needs.head_dim = head_dim;
  needs.value_dim = a.value_dim;
  needs.is_packed = a.cu_seqlens_q != nullptr;
  needs.has_key_padding = a.key_padding.data != nullptr;
  needs.mask_entries = mask_entries(a);
  needs.relative_bias_heads = relative_bias_heads(a);
  needs.splits = call.splits;
  needs.gradient_splits = call.gradient_splits;
  needs.wants_dquery = a.dquery.data != nullptr;
  needs.wants_dkey = a.dkey.data != nullptr;
  needs.wants_dvalue = a.dvalue.data != nullptr;
  if (a.dbias.data != nullptr)
    needs.dbias_shape = {a.dbias.stride_batch == 0 ? 1 : a.batch, a.dbias.stride_head == 0 ? 1 : a.num_heads,
                         a.dbias.stride_row == 0 ? 1 : a.seqlen_q, a.dbias.stride_col == 0 ? 1 : a.seqlen_k};
  needs.wants_dkey_bias = a.dkey_bias.data != nullptr;
  needs.wants_drelative_bias = a.drelative_bias.data != nullptr;
  return needs;
}

// Whether backward runs the fused kernel of sm_90a (sm90/fused_backward.h). A call may want none of the gradients that
// this kernel computes, for example only the gradient of a bias.
inline bool is_fused_backward(const WorkspaceNeeds& needs) {
  return needs.is_backward && (needs.wants_dquery || needs.wants_dkey || needs.wants_dvalue) &&
         needs.architecture == 90 && has_fused_backward(needs.head_dim);
}

// Whether the fused backward adds up dq in the workspace. With one block of keys, it writes dq itself.
inline bool sums_dq(const WorkspaceNeeds& needs) {
  return is_fused_backward(needs) && needs.wants_dquery && needs.seqlen_k > kKeyBlock;
}

// If both kinds of forward kernels run, the decode kernels compute the sequences with at most this many queries, and
// the large kernels the others. 0 = the large kernels compute all of them.
inline int64_t few_queries(const WorkspaceNeeds& needs) {
  if (needs.splits.decode == 0) return 0;
  return kMaxDecodeTiles * kDecodeRows * needs.num_kv_heads / std::max<int64_t>(needs.num_heads, 1);
}

inline BiasGradientSizes bias_gradient_sizes(const WorkspaceNeeds& needs, BiasGradientTile tile) {
  return {needs.batch, needs.num_heads, needs.seqlen_q, needs.seqlen_k, tile};
}

// The shape of the gradient of a key bias: that of a dense bias that heads and queries share.
inline std::array<int64_t, 4> dkey_bias_shape(const WorkspaceNeeds& needs) {
  return {needs.batch, 1, 1, needs.seqlen_k};
}

}  // namespace fused_attn::gpu
