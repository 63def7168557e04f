// Host side of the kernels for sm_90a; included by their instantiations alone.
#pragma once
#include <algorithm>
#include <string>

#include "../kernels.h"
#include "../preparation.h"
#include "../tensor_map.h"
#include "backward.h"
#include "forward.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace fused_attn::gpu::sm90 {

inline int multiprocessors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would find it
    throw std::runtime_error(cudaGetErrorString(error));
  }
  return count;
#else
  return 2;  // so that every block takes several tiles
#endif
}

// Panels of `box_rows` rows of x (batch, heads, rows, head_dim).
inline Map map_of(const Rows& x, bool is_bf16, int64_t head_dim, int64_t rows, int64_t heads, int64_t batch,
                  int box_rows) {
  Map map;
  map.head_step = x.stride_head != 0 && heads > 1;
  map.batch_step = x.stride_batch != 0 && batch > 1;
  constexpr int64_t kElementBytes = 2, kAnyStride = 16;  // of a dimension with one entry
  const TensorMapSpec spec{x.data,
                           is_bf16 ? Element::kBf16 : Element::kF16,
                           4,
                           {head_dim, rows, map.head_step ? heads : 1, map.batch_step ? batch : 1},
                           {0, rows > 1 ? x.stride_row * kElementBytes : kAnyStride,
                            map.head_step ? x.stride_head * kElementBytes : kAnyStride,
                            map.batch_step ? x.stride_batch * kElementBytes : kAnyStride},
                           {kPanelColumns, box_rows, 1, 1},
                           static_cast<int>(kPanelRowBytes)};
  if (const std::string error = encode_tensor_map(spec, &map.tensor); !error.empty())
    throw std::runtime_error("a tensor cannot be loaded by TMA: " + error);
  return map;
}

template <int kHeadDim>
void launch_forward(const Params& p, bool is_bf16, Stream stream) {
  const int kv_heads = p.num_heads / p.group_size;
  for_variant(p, is_bf16, [&](auto type, auto has_dropout) {
    using Plan = ForwardPlan<kHeadDim, has_dropout()>;
    const ForwardMaps maps{map_of(p.q, is_bf16, kHeadDim, p.rows_q, p.num_heads, p.batch, Plan::kBlockM),
                           map_of(p.k, is_bf16, kHeadDim, p.rows_k, kv_heads, p.batch, Plan::kBlockN),
                           map_of(p.v, is_bf16, kHeadDim, p.rows_k, kv_heads, p.batch, Plan::kBlockN)};
    LaunchShape shape = shape_of(p.seqlen_q, Plan::kBlockM, p.num_heads, p.batch, Plan::kThreads, Plan::kBytes);
    const int num_tiles = shape.grid_x;
    shape.grid_x = std::min(num_tiles, multiprocessors());
    run_kernel(forward_kernel<decltype(type), kHeadDim, has_dropout()>, shape, stream, p, maps, num_tiles);
  });
}

template <int kHeadDim>
void launch_backward(const Params& p, bool is_bf16, Stream stream) {
  using QueryPlan = QueryGradientPlan<kHeadDim>;
  using KeyPlan = KeyGradientPlan<kHeadDim>;
  const int kv_heads = p.num_heads / p.group_size;
  const auto maps_of = [&](int block_m, int block_n) {
    return BackwardMaps{map_of(p.q, is_bf16, kHeadDim, p.rows_q, p.num_heads, p.batch, block_m),
                        map_of(p.k, is_bf16, kHeadDim, p.rows_k, kv_heads, p.batch, block_n),
                        map_of(p.v, is_bf16, kHeadDim, p.rows_k, kv_heads, p.batch, block_n),
                        map_of(p.dout, is_bf16, kHeadDim, p.rows_q, p.num_heads, p.batch, block_m)};
  };
  for_variant(p, is_bf16, [&](auto type, auto has_dropout) {
    using T = decltype(type);
    run_kernel(delta_kernel<T, kHeadDim>, shape_of(p.seqlen_q, kDeltaRows, p.num_heads, p.batch, kDeltaThreads, 0),
               stream, p);
    if (p.dq.data != nullptr)
      run_kernel(query_gradient_kernel<T, kHeadDim, has_dropout()>,
                 shape_of(p.seqlen_q, QueryPlan::kBlockM, p.num_heads, p.batch, kGradientThreads, QueryPlan::kBytes),
                 stream, p, maps_of(QueryPlan::kBlockM, QueryPlan::kBlockN));
    if (p.dk.data != nullptr || p.dv.data != nullptr)
      run_kernel(key_gradient_kernel<T, kHeadDim, has_dropout()>,
                 shape_of(p.seqlen_k, KeyPlan::kBlockN, kv_heads, p.batch, kGradientThreads, KeyPlan::kBytes), stream,
                 p, maps_of(KeyPlan::kBlockM, KeyPlan::kBlockN));
  });
}

}  // namespace fused_attn::gpu::sm90
