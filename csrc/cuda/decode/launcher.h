// Launches the decode kernels. Only their instantiations (head_dim_*.cu) include this file. The kernels use instructions
// of sm_80 only, also on later GPUs.
#pragma once
#include "kernel.h"

namespace fused_attn::gpu {

template <class T, int kHeadDim>
void launch_decode_for_type(const Params& p, const DecodeParams& d, Stream stream) {
  using Plan = DecodePlan<kHeadDim>;
  const int64_t programs = int64_t{d.row_tiles} * d.num_splits * (p.num_heads / p.group_size) * p.batch;
  const int64_t rows = int64_t{p.batch} * p.num_heads * p.seqlen_q;
  if (std::max(programs, rows) >= int64_t{1} << 31)
    throw std::length_error("the problem needs more blocks than a grid may have");
  run_kernel(decode_kernel<T, kHeadDim>, {static_cast<int>(programs), 1, 1, Plan::kThreads, Plan::kBytes}, stream, p, d);
  if (d.num_splits > 1)
    run_kernel(merge_splits_kernel<T>, {static_cast<int>(rows), 1, 1, kMergeThreads, kMergeBytes}, stream, p, d);
}

template <int kHeadDim>
void launch_decode(const Params& p, const DecodeParams& d, bool is_bf16, Stream stream) {
  is_bf16 ? launch_decode_for_type<bf16_t, kHeadDim>(p, d, stream)
          : launch_decode_for_type<f16_t, kHeadDim>(p, d, stream);
}

}  // namespace fused_attn::gpu
