// Launches the decode kernel. Only its instantiations (head_dim_*.cu) include this file. The kernel uses instructions
// of sm_80 only, also on later GPUs.
#pragma once
#include "kernel.h"

namespace fused_attn::gpu {

template <int kHeadDim>
void launch_decode(const Params& p, const DecodeParams& d, bool is_bf16, Stream stream) {
  using Plan = DecodePlan<kHeadDim>;
  const LaunchShape shape =
      shape_of(d.row_tiles * p.splits.count, 1, p.num_heads / p.group_size, p.batch, Plan::kThreads, Plan::kBytes);
  is_bf16 ? run_kernel(decode_kernel<bf16_t, kHeadDim>, shape, stream, p, d)
          : run_kernel(decode_kernel<f16_t, kHeadDim>, shape, stream, p, d);
}

}  // namespace fused_attn::gpu
