// Host side of the kernels for sm_90a. Only their instantiations (head_dim_*.cu) include this file.
#pragma once
#include <algorithm>
#include <numeric>
#include <string>

#include "../kernels.h"
#include "../preparation.h"
#include "../tensor_map.h"
#include "backward.h"
#include "bias_gradient.h"
#include "forward.h"
#include "fused_backward.h"
#include "fused_backward_dq.h"
#include "mask_steps.h"

namespace fused_attn::gpu::sm90 {

constexpr int64_t kAnyStride = 16;  // bytes: for a dimension of a tensor map that has one entry

// Makes the tensor map of x (batch, heads, rows, columns). One TMA copy with this map moves a panel: box_rows rows of
// box_columns columns.
inline Map map_of(const Rows& x, bool is_bf16, int64_t rows, int64_t heads, int64_t batch, int box_rows,
                  int box_columns = kPanelColumns) {
  Map map;
  map.head_step = x.stride_head != 0 && heads > 1;
  map.batch_step = x.stride_batch != 0 && batch > 1;
  constexpr int64_t kElementBytes = 2;
  const TensorMapSpec spec{x.data,
                           is_bf16 ? Element::kBf16 : Element::kF16,
                           4,
                           {x.columns, rows, map.head_step ? heads : 1, map.batch_step ? batch : 1},
                           {0, rows > 1 ? x.stride_row * kElementBytes : kAnyStride,
                            map.head_step ? x.stride_head * kElementBytes : kAnyStride,
                            map.batch_step ? x.stride_batch * kElementBytes : kAnyStride},
                           {box_columns, box_rows, 1, 1},
                           2 * box_columns};
  if (const std::string error = encode_tensor_map(spec, &map.tensor); !error.empty())
    throw std::runtime_error("TMA cannot copy a tensor: " + error);
  return map;
}

// Makes the tensor map of a dense bias, of which one copy moves kPanelColumns keys for box_queries queries. The map is
// not used if there is no bias, or if TMA does not accept its strides, or if the type is float: such a tile would take
// twice the memory. Then, the kernels read the bias from global memory.
inline BiasMap bias_map_of(const Params& p, bool is_bf16, int box_queries) {
  const ScoreTensor& bias = p.logits.bias;
  BiasMap map{};
  // In a packed call, rows of the bias count from the beginning of each sequence, and those that TMA copies from the
  // beginning of the tensor.
  if (bias.data == nullptr || p.logits.is_bias_float || bias.stride_key != 1 || p.cu_seqlens_q != nullptr) return map;
  const auto step_of = [](int64_t stride, int32_t entries) { return int32_t{stride != 0 && entries > 1}; };
  map.row_step = step_of(bias.stride_query, p.seqlen_q);
  map.map.head_step = step_of(bias.stride_head, p.num_heads);
  map.map.batch_step = step_of(bias.stride_batch, p.batch);
  const auto entries = [](int32_t step, int32_t count) { return int64_t{step != 0 ? count : 1}; };
  const auto stride_bytes = [](int32_t step, int64_t stride) { return step != 0 ? 2 * stride : kAnyStride; };
  const TensorMapSpec spec{
      const_cast<void*>(bias.data),
      is_bf16 ? Element::kBf16 : Element::kF16,
      4,
      {p.seqlen_k, entries(map.row_step, p.seqlen_q), entries(map.map.head_step, p.num_heads),
       entries(map.map.batch_step, p.batch)},
      {0, stride_bytes(map.row_step, bias.stride_query), stride_bytes(map.map.head_step, bias.stride_head),
       stride_bytes(map.map.batch_step, bias.stride_batch)},
      {kPanelColumns, map.row_step != 0 ? box_queries : 1, 1, 1},
      kPanelRowBytes};
  map.is_used = encode_tensor_map(spec, &map.map.tensor).empty();
  return map;
}

// How many rows of keys or values one TMA copy moves in forward: see ForwardMaps::piece_rows.
inline int piece_rows_of(const Params& p, int block_n) {
  if (p.pages.table == nullptr) return block_n;
  if (p.pages.size % kLeastPieceRows != 0)
    throw std::invalid_argument("key: expected pages of a multiple of " + std::to_string(kLeastPieceRows) +
                                " rows, got " + std::to_string(p.pages.size));
  return std::gcd(p.pages.size, block_n);
}

// Launches the forward kernel, with the variant for the element type and for what the call needs.
template <int kHeadDim, int kValueDim>
void launch_forward(const Params& p, bool is_bf16, Stream stream) {
  const int kv_heads = p.num_heads / p.group_size;
  for_variant(is_bf16, is_general_forward(p), [&](auto type, auto general) {
    using Plan = ForwardPlan<kHeadDim, kValueDim, general()>;
    static_assert(Plan::kBlockM >= kLeastForwardRowsSm90);
    const int piece_rows = piece_rows_of(p, Plan::kBlockN);
    const int key_entries = p.pages.table != nullptr ? p.pages.count : p.batch;
    const ForwardMaps maps{
        map_of(p.q, is_bf16, p.rows_q, p.num_heads, p.batch, Plan::kBlockM),
        map_of(p.k, is_bf16, p.rows_k, kv_heads, key_entries, piece_rows),
        map_of(p.v, is_bf16, p.rows_k, kv_heads, key_entries, piece_rows),
        Plan::kStoresByTma ? map_of(p.out, is_bf16, p.rows_q, p.num_heads, p.batch, kWarpRows) : Map{},
        bias_map_of(p, is_bf16, kConsumerRows),
        piece_rows};
    LaunchShape shape = forward_shape_of(p, Plan::kBlockM, Plan::kThreads, Plan::kBytes);
    if (!maps.bias.is_used) shape.shared_bytes = Plan::kBytesWithoutBias;
    // The kernel is persistent: each multiprocessor runs at most one block of threads, which takes one tile after
    // another until all tiles (blocks of queries of all heads) are done.
    const int num_tiles = shape.grid_x;
    shape.grid_x = std::min(num_tiles, num_multiprocessors());
    run_kernel(forward_kernel<decltype(type), kHeadDim, kValueDim, general()>, shape, stream, p, maps, num_tiles);
  });
}

// Makes the tensor maps of backward, for tiles of block_m queries and block_n keys. Keys and values have panels of
// key_columns columns.
inline BackwardMaps backward_maps_of(const Params& p, bool is_bf16, int block_m, int block_n,
                                     int key_columns = kPanelColumns) {
  const int kv_heads = p.num_heads / p.group_size;
  return {map_of(p.q, is_bf16, p.rows_q, p.num_heads, p.batch, block_m),
          map_of(p.k, is_bf16, p.rows_k, kv_heads, p.batch, block_n, key_columns),
          map_of(p.v, is_bf16, p.rows_k, kv_heads, p.batch, block_n, key_columns),
          map_of(p.dout, is_bf16, p.rows_q, p.num_heads, p.batch, block_m),
          {}};
}

// Launches backward in two kernels, as far as their gradients are wanted: one for dq, one for dk and dv. It is for head
// dims that the fused backward does not support.
template <class T, int kHeadDim, int kValueDim, bool kIsGeneral>
void launch_two_kernels(const Params& p, Stream stream) {
  using QueryPlan = QueryGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  using KeyPlan = KeyGradientPlan<kHeadDim, kValueDim, kIsGeneral>;
  if (p.dq.data != nullptr)
    run_kernel(query_gradient_kernel<T, kHeadDim, kValueDim, kIsGeneral>,
               query_gradient_shape(p, QueryPlan::kBlockM, p.dq_splits, kGradientThreads, QueryPlan::kBytes), stream, p,
               backward_maps_of(p, kIsBf16<T>, QueryPlan::kBlockM, QueryPlan::kBlockN));
  if (p.dk.data != nullptr || p.dv.data != nullptr)
    run_kernel(key_gradient_kernel<T, kHeadDim, kValueDim, kIsGeneral>,
               key_gradient_shape(p, KeyPlan::kBlockN, p.dk_splits, kGradientThreads, KeyPlan::kBytes), stream, p,
               backward_maps_of(p, kIsBf16<T>, KeyPlan::kBlockM, KeyPlan::kBlockN));
}

// Launches the fused backward, and then the kernel that rounds dq, if dq has sums. With a dense mask, another kernel
// lists the steps before.
template <class T, int kHeadDim, bool kIsGeneral>
void launch_fused(const Params& p, Stream stream) {
  using Plan = FusedBackwardPlan<kHeadDim, kIsGeneral>;
  const int num_programs = p.num_listed_key_blocks;
  LaunchShape shape{std::min(num_programs, num_multiprocessors()), 1, 1, kFusedBackwardThreads, Plan::kBytes};
  const LaunchShape rounding = query_gradient_shape(p, Plan::kBlockM, 1, kRoundingThreads, 0);
  if constexpr (kIsGeneral) {
    if (p.mask_steps != nullptr) {
      const int64_t tiles = (int64_t{p.seqlen_q} + Plan::kBlockM - 1) / Plan::kBlockM * p.num_heads * p.batch;
      const int64_t warps = num_programs + (p.mask_turns != nullptr ? tiles : 0);
      constexpr int kWarps = kPreparationThreads / 32;
      run_kernel(list_mask_steps_kernel<Plan::kBlockM>,
                 {static_cast<int>((warps + kWarps - 1) / kWarps), 1, 1, kPreparationThreads, 0}, stream, p,
                 num_programs);
    }
  }
  BackwardMaps maps = backward_maps_of(p, kIsBf16<T>, Plan::kBlockM, Plan::kBlockN, Plan::kKeyPanelColumns);
  maps.bias = bias_map_of(p, kIsBf16<T>, Plan::kBlockM);
  if (!maps.bias.is_used) shape.shared_bytes = Plan::kBytesWithoutBias;
  run_kernel(fused_backward_kernel<T, kHeadDim, kIsGeneral>, shape, stream, p, maps, num_programs);
  if (p.dq_sums != nullptr) run_kernel(round_dq_kernel<T, kHeadDim, kIsGeneral>, rounding, stream, p);
}

// Launches the kernels of backward, if one of their gradients is wanted.
template <int kHeadDim, int kValueDim>
void launch_backward(const Params& p, bool is_bf16, Stream stream) {
  if (p.dq.data == nullptr && p.dk.data == nullptr && p.dv.data == nullptr) return;
  for_variant(is_bf16, is_general_backward(p), [&](auto type, auto general) {
    using T = decltype(type);
    if constexpr (has_fused_backward(kHeadDim)) {
      static_assert(kValueDim == kHeadDim);
      launch_fused<T, kHeadDim, general()>(p, stream);
    } else {
      launch_two_kernels<T, kHeadDim, kValueDim, general()>(p, stream);
    }
  });
}

// Launches the kernel for the gradient of a bias.
template <int kHeadDim, int kValueDim>
void launch_bias_gradient(const Params& p, const BiasGradientParams& g, bool is_bf16, Stream stream) {
  using Plan = BiasGradientPlan<kHeadDim, kValueDim>;
  BackwardMaps maps = backward_maps_of(p, is_bf16, Plan::kBlockM, Plan::kBlockN);
  if (g.is_dense_bias) maps.bias = bias_map_of(p, is_bf16, kConsumerRows);
  LaunchShape shape = shape_of_owners(g, kGradientThreads, Plan::kBytes);
  if (!maps.bias.is_used) shape.shared_bytes = Plan::kBytesWithoutBias;
  if (g.has_entry_of_each_score && g.program_counter != nullptr)
    shape.grid_x = std::min(shape.grid_x, num_multiprocessors());
  if (is_bf16) {
    run_kernel(bias_gradient_kernel<bf16_t, kHeadDim, kValueDim>, shape, stream, p, g, maps);
  } else {
    run_kernel(bias_gradient_kernel<f16_t, kHeadDim, kValueDim>, shape, stream, p, g, maps);
  }
}

}  // namespace fused_attn::gpu::sm90
