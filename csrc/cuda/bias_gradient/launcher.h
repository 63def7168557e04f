// Launches the kernel for gradients of biases. Only its instantiations (head_dim_*.cu) include this file. The kernel
// uses instructions of sm_80 only, also on later GPUs.
#pragma once
#include "../sm80/bias_gradient.h"

namespace fused_attn::gpu {

template <int kHeadDim>
void launch_bias_gradient(const Params& p, const BiasGradientParams& g, bool is_bf16, Stream stream) {
  using Plan = sm80::BiasGradientPlan<kHeadDim>;
  constexpr BiasGradientTile kTile = bias_gradient_tile(kHeadDim);
  static_assert(Plan::kBlockM == kTile.queries && Plan::kBlockN == kTile.keys);
  const int64_t programs = int64_t{g.owners} * g.splits;
  if (programs >= int64_t{1} << 31) throw std::length_error("the bias needs more blocks than a grid may have");
  const LaunchShape shape{static_cast<int>(programs), 1, 1, Plan::kThreads, Plan::kBytes};
  if (is_bf16) {
    run_kernel(sm80::bias_gradient_kernel<bf16_t, kHeadDim>, shape, stream, p, g);
  } else {
    run_kernel(sm80::bias_gradient_kernel<f16_t, kHeadDim>, shape, stream, p, g);
  }
}

}  // namespace fused_attn::gpu
