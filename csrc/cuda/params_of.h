// From Call and Pieces to the arguments of the kernels: Params, and DecodeParams for the decode kernels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../common/philox.h"
#include "decode.h"
#include "hardware.h"
#include "l2_groups.h"
#include "params.h"
#include "tiles.h"
#include "workspace.h"
#include "workspace_needs.h"

namespace fused_attn::gpu {

// A tensor of AttentionParams in the type that the kernels read.
inline Rows rows_of(const TensorView& x, int64_t columns) {
  return {x.data, x.stride_batch, x.stride_head, x.stride_row, static_cast<int32_t>(columns)};
}

inline ScoreTensor scores_of(const TensorView& x) {
  return {x.data, x.stride_batch, x.stride_head, x.stride_row, x.stride_col};
}

inline MaskSource mask_source_of(const AttentionParams& a) {
  const TensorView& x = a.key_ranges;
  return {scores_of(a.mask),
          {static_cast<const int32_t*>(x.data), x.stride_batch, x.stride_head, x.stride_row,
           static_cast<int32_t>(a.num_ranges)}};
}

inline RowValues values_of(const TensorView& x) {
  return {static_cast<float*>(x.data), x.stride_batch, x.stride_head, x.stride_row};
}

// Where Philox begins to number the entries of the scores.
inline DropoutOrigin dropout_origin_of(const AttentionParams& a) {
  const fused_attn::DropoutOrigin& x = a.dropout_origin;
  return {static_cast<int32_t>(x.batch), static_cast<int32_t>(x.head), static_cast<int32_t>(x.query),
          static_cast<int32_t>(x.key / kPhiloxKeys)};
}

constexpr double kLog2EExact = 1.44269504088896340736;

// What happens to scores in this call. `relative_bias` is the piece of the workspace with the padded copy.
inline LogitParams logits_of(const AttentionParams& a, const float* relative_bias) {
  LogitParams x{};
  // LazySoftmax takes the largest score of a row as its reference, which is right only if the scale is positive. With
  // another scale, to_logits multiplies the scores by the scale first.
  const bool is_scale_positive = static_cast<float>(a.scale) > 0.0f;
  x.is_plain = is_scale_positive && a.softcap == 0.0 && a.relative_bias.data == nullptr && a.key_bias.data == nullptr &&
               a.bias.data == nullptr;
  if (a.softcap != 0.0) {
    const double softcap = std::clamp(a.softcap, 1e-30, 1e30);  // a float, and so is the quotient
    x.softcap_scale = static_cast<float>(a.scale / softcap);
    x.softcap = static_cast<float>(softcap);
  }
  if (relative_bias != nullptr) {
    const int64_t stride_head = a.seqlen_q + a.seqlen_k - 1 + 2 * kRelativeBiasMargin;
    x.relative_bias = relative_bias + kRelativeBiasMargin;
    x.relative_bias_stride_head = a.relative_bias.stride_head == 0 ? 0 : stride_head;
  }
  x.key_bias = static_cast<const float*>(a.key_bias.data);
  x.key_bias_stride_batch = a.key_bias.stride_batch;
  x.bias = scores_of(a.bias);
  x.is_bias_float = a.bias_dtype == DType::kFloat32;
  x.has_bias_rows = !x.is_bias_float && has_aligned_groups(a.bias, a.seqlen_k, 8, 16);
  x.has_bias_pairs = x.is_bias_float && has_aligned_groups(a.bias, a.seqlen_k, 2, 8);
  return x;
}

// The parts of a gradient (batch entries, heads, rows, columns), which lie one after another in `piece`.
inline GradientParts parts_of(float* piece, int32_t num_splits, int64_t entries, int64_t heads, int64_t rows,
                              int64_t columns) {
  if (num_splits == 1) return {};
  const int64_t stride_head = rows * columns, stride_batch = heads * stride_head;
  return {{piece, entries == 1 ? 0 : stride_batch, stride_head, columns, static_cast<int32_t>(columns)},
          entries * stride_batch};
}

// Whether the blocks of threads of forward need a counter to share the tiles of queries evenly (Params::tile_counter).
// Each tile has large_splits programs. They need no counter if all tiles take equally long, or if each block has one
// tile at most. The counter has to be reset, and without other work for the preparation kernel this takes a launch.
inline bool shares_tiles(const AttentionParams& a, int64_t large_splits) {
  const bool has_equal_tiles = a.band_left == kUnbounded && a.band_right == kUnbounded && a.cu_seqlens_q == nullptr &&
                               a.key_padding.data == nullptr && a.key_lengths == nullptr && mask_entries(a) == 0;
  return !has_equal_tiles &&
         ceil_div(a.seqlen_q, kLeastForwardRowsSm90) * a.num_heads * a.batch * large_splits > num_multiprocessors();
}

// Whether a query may see no key. The host knows the band, but not what padding, lengths, offsets and masks hold. There
// is a key.
inline bool may_see_no_key(const AttentionParams& a, const Params& p) {
  if (a.cu_seqlens_k != nullptr || a.key_padding.data != nullptr || a.key_lengths != nullptr || mask_entries(a) != 0 ||
      p.band_from_end)
    return true;
  const bool first_query_sees = p.last_diagonal >= 0, last_query_sees = p.first_diagonal <= a.seqlen_k - a.seqlen_q;
  return !first_query_sees || !last_query_sees;
}

// Fills in Params: sizes in 32 bits, tensors, and pieces of the workspace.
inline Params params_of(const Call& call, const WorkspaceNeeds& needs, const Pieces& pieces) {
  const AttentionParams& a = call.params;
  Params p{};
  p.batch = static_cast<int32_t>(a.batch);
  p.num_heads = static_cast<int32_t>(a.num_heads);
  p.group_size = static_cast<int32_t>(a.num_heads / a.num_kv_heads);
  p.seqlen_q = static_cast<int32_t>(a.seqlen_q);
  p.seqlen_k = static_cast<int32_t>(a.seqlen_k);
  p.rows_q = static_cast<int32_t>(call.rows_q);
  p.rows_k = static_cast<int32_t>(call.rows_k);
  p.heads_per_l2_group = heads_per_l2_group(needs, a.head_dim);
  p.q = rows_of(a.query, a.head_dim);
  p.k = rows_of(a.key, a.head_dim);
  p.v = rows_of(a.value, a.value_dim);
  p.out = rows_of(a.out, a.value_dim);
  p.lse = values_of(a.lse);
  p.row_max = values_of(a.row_max);
  p.scale = static_cast<float>(a.scale);
  p.scale_log2 = static_cast<float>(a.scale * kLog2EExact);
  p.logits = logits_of(a, pieces.relative_bias);
  p.softmax_scale = p.logits.is_plain ? p.scale : 1.0f;
  p.softmax_scale_log2 = p.logits.is_plain ? p.scale_log2 : kLog2E;
  p.mask = pieces.mask;
  p.mask.entries_per_head = mask_has_heads(a) ? 1 : 0;
  p.mask.entries_per_batch = mask_has_batch(a) ? static_cast<int32_t>(mask_has_heads(a) ? a.num_heads : 1) : 0;
  p.sinks = static_cast<const float*>(a.sinks.data);
  p.first_diagonal = static_cast<int32_t>(std::clamp<int64_t>(a.band_offset - a.band_left, -kMaxRows, kMaxRows));
  p.last_diagonal = static_cast<int32_t>(std::clamp<int64_t>(a.band_offset + a.band_right, -kMaxRows, kMaxRows));
  p.band_from_end = a.band_from_end;
  p.cu_seqlens_q = a.cu_seqlens_q;
  p.cu_seqlens_k = a.cu_seqlens_k;
  p.pages = {a.block_table, a.block_table_stride, static_cast<int32_t>(a.page_size), static_cast<int32_t>(a.num_pages)};
  p.key_lengths = a.key_lengths;
  p.query_tiles = pieces.query_tiles;
  p.num_query_tiles = pieces.num_query_tiles;
  p.splits = pieces.large_splits;
  p.valid_keys = pieces.valid_keys;
  p.valid_words = pieces.valid_words;
  p.dropout_seed = a.has_dropout ? a.dropout_seed_data : nullptr;
  p.dropout_threshold = a.dropout_threshold;
  p.dropout_scale = static_cast<float>(a.dropout_scale);
  p.dropout_origin = dropout_origin_of(a);
  p.dout = rows_of(a.dout, a.value_dim);
  p.dlse = values_of(a.dlse);
  p.dq = rows_of(a.dquery, a.head_dim);
  p.dk = rows_of(a.dkey, a.head_dim);
  p.dv = rows_of(a.dvalue, a.value_dim);
  p.dsinks = static_cast<float*>(a.dsinks.data);
  p.dq_splits = needs.gradient_splits.dq;
  p.dk_splits = needs.gradient_splits.dk;
  p.dq_parts = parts_of(pieces.dq_parts, p.dq_splits, call.batch_entries, a.num_heads, call.rows_q, a.head_dim);
  p.dk_parts = parts_of(pieces.dk_parts, p.dk_splits, call.batch_entries, a.num_kv_heads, call.rows_k, a.head_dim);
  p.dv_parts = parts_of(pieces.dv_parts, p.dk_splits, call.batch_entries, a.num_kv_heads, call.rows_k, a.value_dim);
  p.row_blocks = pieces.row_blocks;
  const int64_t stride_head = int64_t{p.row_blocks} * kRowBlock;
  const int64_t stride_batch = a.cu_seqlens_q != nullptr ? 0 : a.num_heads * stride_head;
  p.lse_log2 = {pieces.lse_log2, stride_batch, stride_head, 1};
  p.delta = {pieces.delta, stride_batch, stride_head, 1};
  p.dq_sums_log2 = pieces.dq_sums_log2;
  p.dq_sums = pieces.dq_sums;
  p.dq_turns = pieces.dq_turns;
  p.clears_dq = is_fused_backward(needs) && needs.wants_dquery && !sums_dq(needs) && may_see_no_key(a, p);
  p.key_ranks = pieces.key_ranks;
  p.key_blocks = pieces.key_blocks;
  p.mask_steps = pieces.mask_steps;
  p.mask_turns = pieces.mask_turns;
  p.num_key_blocks = static_cast<int32_t>(ceil_div(a.seqlen_k, kKeyBlock));
  // To find a sequence by offsets takes longer than to return at once, which a program does behind the end of its
  // sequence. So a few such programs are no reason. None of the two times has been measured.
  p.finds_queries_by_offset =
      needs.is_backward && needs.is_packed && 2 * p.row_blocks <= a.batch * ceil_div(a.seqlen_q, kRowBlock);
  p.finds_keys_by_offset = needs.is_backward && finds_keys_by_offset(needs);
  if (pieces.key_blocks != nullptr) {
    const int64_t listed = listed_key_blocks(needs);
    if (listed >= int64_t{1} << 31) throw std::length_error("the problem needs more blocks than a grid may have");
    p.num_listed_key_blocks = static_cast<int32_t>(listed);
  }
  if (pieces.tile_counter != nullptr && (needs.is_backward || shares_tiles(a, p.splits.count)))
    p.tile_counter = pieces.tile_counter;
  p.program_counter = pieces.program_counter;
  return p;
}

// The arguments of the decode kernels besides Params. Changes `p` where these kernels read what the caller has given,
// and not what preparation kernels have made of it, and to the longest sequence that they compute.
inline DecodeParams decode_params_of(const AttentionParams& a, const Pieces& pieces, Params& p) {
  DecodeParams d{};
  p.splits = pieces.decode_splits;
  p.seqlen_q = std::min(p.seqlen_q, p.splits.most_queries);
  // The kernels find diagonal 0 in column seqlen_q - 1. The bias of the caller has it in column a.seqlen_q - 1.
  p.logits.relative_bias = static_cast<const float*>(a.relative_bias.data);
  if (p.logits.relative_bias != nullptr) p.logits.relative_bias += a.seqlen_q - p.seqlen_q;
  p.logits.relative_bias_stride_head = a.relative_bias.stride_head;
  d.row_tiles = static_cast<int32_t>(ceil_div(int64_t{p.seqlen_q} * p.group_size, kDecodeRows));
  d.padding = static_cast<const uint8_t*>(a.key_padding.data);
  d.padding_stride_batch = a.key_padding.stride_batch;
  d.padding_stride_key = a.key_padding.stride_col;
  d.mask = mask_source_of(a);
  return d;
}

}  // namespace fused_attn::gpu
