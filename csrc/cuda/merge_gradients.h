// The kernel that adds the parts of gradients (gradient_splits.h).
#pragma once
#include "gradient_splits.h"
#include "head_slice.h"
#include "kernels.h"
#include "tile_scheduler.h"

namespace fused_attn::gpu {

constexpr int kMergeGradientsWarps = 8;

// A gradient whose parts are added.
struct MergedGradient {
  Rows gradient;
  GradientParts parts;
};

// Adds the parts of one row in the order of the splits, and rounds the sum. Each warp has one row. The rows of `first`
// come before those of `second`, which may be null.
template <class T>
GPU_KERNEL void GPU_LAUNCH_BOUNDS((32 * kMergeGradientsWarps), 1)
    merge_gradients_kernel(const GPU_GRID_CONSTANT Params p, const GPU_GRID_CONSTANT MergedGradient first,
                           const GPU_GRID_CONSTANT MergedGradient second, int32_t of_gradient, bool is_of_queries) {
  const MergedGradient& x = block_index_x() >= of_gradient ? second : first;
  const int32_t num_splits = is_of_queries ? p.dq_splits : p.dk_splits;
  const int32_t program = block_index_x() % of_gradient;
  const WorkTile work = is_of_queries ? query_gradient_tile<kMergeGradientsWarps>(p, program, p.seqlen_q)
                                      : key_gradient_tile<kMergeGradientsWarps>(p, program);
  const int32_t row = work.block * kMergeGradientsWarps + thread_index() / 32;
  const HeadSlice head_slice = head_slice_of(p, work.batch, work.head, work.head);
  if (row >= (is_of_queries ? head_slice.seqlen_q : head_slice.seqlen_k)) return;
  const auto row_of = [&](auto type, const Rows& tensor) {
    using Element = decltype(type);
    return is_of_queries ? head_slice.query_row<Element>(tensor, row) : head_slice.key_row<Element>(tensor, row);
  };
  const float* const parts = row_of(float{}, x.parts.rows);
  T* const target = row_of(T{}, x.gradient);
  constexpr int kColumns = 4, kAhead = 4;  // columns of a thread, and loads that are in flight at once
  for (int column = kColumns * this_lane().index; column < x.gradient.columns; column += 32 * kColumns) {
    float sum[kColumns] = {};
    for (int32_t split = 0; split < num_splits; split += kAhead) {
      Float4 part[kAhead];
      GPU_UNROLL for (int i = 0; i < kAhead; ++i) {
        part[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (split + i < num_splits)
          part[i] = load_global(reinterpret_cast<const Float4*>(parts + (split + i) * x.parts.stride_split + column));
      }
      GPU_UNROLL for (int i = 0; i < kAhead; ++i) {
        sum[0] += part[i].x;
        sum[1] += part[i].y;
        sum[2] += part[i].z;
        sum[3] += part[i].w;
      }
    }
    store_global(reinterpret_cast<Vec2*>(target + column), Vec2{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])});
  }
}

// Launches the kernel for the gradients of queries, or of keys and values, if they have parts.
inline void merge_gradients(const Params& p, bool is_of_queries, bool is_bf16, Stream stream) {
  MergedGradient first = is_of_queries ? MergedGradient{p.dq, p.dq_parts} : MergedGradient{p.dk, p.dk_parts};
  MergedGradient second = is_of_queries ? MergedGradient{} : MergedGradient{p.dv, p.dv_parts};
  if (first.parts.rows.data == nullptr) std::swap(first, second);
  if (first.parts.rows.data == nullptr) return;
  const int gradients = second.parts.rows.data == nullptr ? 1 : 2;
  constexpr int kThreads = 32 * kMergeGradientsWarps;
  const LaunchShape shape = is_of_queries ? query_gradient_shape(p, kMergeGradientsWarps, gradients, kThreads, 0)
                                          : key_gradient_shape(p, kMergeGradientsWarps, gradients, kThreads, 0);
  const int32_t of_gradient = shape.grid_x / gradients;
  is_bf16 ? run_kernel(merge_gradients_kernel<bf16_t>, shape, stream, p, first, second, of_gradient, is_of_queries)
          : run_kernel(merge_gradients_kernel<f16_t>, shape, stream, p, first, second, of_gradient, is_of_queries);
}

}  // namespace fused_attn::gpu
