// Replaces the pointers of a Call by handles, for calls whose tensors lie in the memory of a CPU. Kernels can access
// handles only through primitives, which check every access.
#pragma once
#include <type_traits>

#include "cuda/attention.h"
#include "global_memory.h"

namespace fused_attn::gpu {

// The call with handles in place of pointers. Each tensor becomes a buffer, which ends where the last element of the
// tensor ends.
inline Call on_device(Call call) {
  emulation::clear_buffers();
  AttentionParams& p = call.params;
  // Registers `bytes` bytes at `pointer`, and replaces the pointer by the handle.
  const auto use = [](auto*& pointer, int64_t bytes, bool is_writable) {
    if (pointer == nullptr) return;
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer = static_cast<Pointer>(emulation::register_buffer(pointer, bytes, is_writable));
  };
  // The same for a tensor (batch, head, row, column) with strides.
  const auto use_entries = [&](TensorView& view, int64_t entries, int64_t heads, int64_t rows, int64_t columns,
                               int64_t element_bytes, bool is_writable) {
    const int64_t last = (entries - 1) * view.stride_batch + (heads - 1) * view.stride_head +
                         (rows - 1) * view.stride_row + (columns - 1) * view.stride_col;
    use(view.data, (last + 1) * element_bytes, is_writable);
  };
  const auto use_view = [&](TensorView& view, int64_t heads, int64_t rows, int64_t columns, int64_t element_bytes,
                            bool is_writable) {
    use_entries(view, call.batch_entries, heads, rows, columns, element_bytes, is_writable);
  };
  const int64_t heads = p.num_heads, kv_heads = p.num_kv_heads, dim = p.head_dim, value_dim = p.value_dim;
  const int64_t rows_q = call.rows_q, rows_k = call.rows_k;
  const bool is_backward = p.dout.data != nullptr;
  use_view(p.query, heads, rows_q, dim, 2, false);
  const int64_t key_entries = p.block_table != nullptr ? p.num_pages : call.batch_entries;
  use_entries(p.key, key_entries, kv_heads, rows_k, dim, 2, false);
  use_entries(p.value, key_entries, kv_heads, rows_k, value_dim, 2, false);
  use_view(p.out, heads, rows_q, value_dim, 2, !is_backward);
  use_view(p.lse, heads, rows_q, 1, 4, !is_backward);
  use_view(p.row_max, heads, rows_q, 1, 4, true);
  use_view(p.key_padding, 1, 1, p.seqlen_k, 1, false);
  use_view(p.key_ranges, heads, p.seqlen_q, 2 * p.num_ranges, 4, false);
  use_view(p.dout, heads, rows_q, value_dim, 2, false);
  use_view(p.dlse, heads, rows_q, 1, 4, false);
  use_view(p.dquery, heads, rows_q, dim, 2, true);
  use_view(p.dkey, kv_heads, rows_k, dim, 2, true);
  use_view(p.dvalue, kv_heads, rows_k, value_dim, 2, true);
  // The tensors that broadcast to the scores. Their batch entries are sequences, also in a packed call.
  const auto use_scores = [&](TensorView& view, int64_t element_bytes, bool is_writable) {
    const int64_t last = (p.batch - 1) * view.stride_batch + (heads - 1) * view.stride_head +
                         (p.seqlen_q - 1) * view.stride_row + (p.seqlen_k - 1) * view.stride_col;
    use(view.data, (last + 1) * element_bytes, is_writable);
  };
  use_scores(p.mask, 1, false);
  use_scores(p.bias, p.bias_dtype == DType::kFloat32 ? 4 : 2, false);
  use_scores(p.dbias, p.dbias_dtype == DType::kFloat32 ? 4 : 2, true);
  use_scores(p.key_bias, 4, false);
  use_scores(p.dkey_bias, 4, true);
  const int64_t diagonals = p.seqlen_q + p.seqlen_k - 1;
  use(p.relative_bias.data, ((heads - 1) * p.relative_bias.stride_head + diagonals) * 4, false);
  use(p.drelative_bias.data, ((heads - 1) * p.drelative_bias.stride_head + diagonals) * 4, true);
  use(p.sinks.data, ((heads - 1) * p.sinks.stride_head + 1) * 4, false);
  use(p.dsinks.data, ((heads - 1) * p.dsinks.stride_head + 1) * 4, true);
  use(p.dropout_seed_data, sizeof(int64_t), false);
  use(p.cu_seqlens_q, (p.batch + 1) * sizeof(int32_t), false);
  use(p.cu_seqlens_k, (p.batch + 1) * sizeof(int32_t), false);
  use(p.key_lengths, p.batch * sizeof(int32_t), false);
  if (p.block_table != nullptr)
    use(p.block_table, ((p.batch - 1) * p.block_table_stride + p.seqlen_k / p.page_size) * sizeof(int32_t), false);
  use(call.workspace, call.workspace_bytes, true);
  return call;
}

}  // namespace fused_attn::gpu
