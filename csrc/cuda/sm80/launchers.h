// Launches the kernels for sm_80. Only their instantiations (head_dim_*.cu) include this file.
#pragma once
#include "../kernels.h"
#include "backward.h"
#include "bias_gradient.h"
#include "forward.h"

namespace fused_attn::gpu::sm80 {

// Whether the tensors have fewer columns than the kernels. A call with such tensors needs a general kernel, because
// plain kernels load exactly kHeadDim columns of queries and keys, and kValueDim columns of values.
template <int kHeadDim, int kValueDim>
bool lacks_columns(const Params& p) {
  return p.q.columns != kHeadDim || p.v.columns != kValueDim;
}

// Launches the forward kernel, with the variant for the element type and for what the call needs.
template <int kHeadDim, int kValueDim>
void launch_forward(const Params& p, bool is_bf16, Stream stream) {
  using Plan = ForwardPlan<kHeadDim, kValueDim>;
  const LaunchShape shape = forward_shape_of(p, Plan::kBlockM, Plan::kThreads, Plan::kBytes);
  for_variant(is_bf16, is_general_forward(p) || lacks_columns<kHeadDim, kValueDim>(p), [&](auto type, auto general) {
    using T = decltype(type);
    if (p.pages.table == nullptr) {
      run_kernel(forward_kernel<T, kHeadDim, kValueDim, general()>, shape, stream, p);
    } else {
      run_kernel(paged_forward_kernel<T, kHeadDim, kValueDim>, shape, stream, p);
    }
  });
}

// Launches the kernels for the gradients that are wanted.
template <int kHeadDim, int kValueDim>
void launch_backward(const Params& p, bool is_bf16, Stream stream) {
  using QueryPlan = QueryGradientPlan<kHeadDim, kValueDim>;
  using KeyPlan = KeyGradientPlan<kHeadDim, kValueDim>;
  for_variant(is_bf16, is_general_backward(p) || lacks_columns<kHeadDim, kValueDim>(p), [&](auto type, auto general) {
    using T = decltype(type);
    if (p.dq.data != nullptr)
      run_kernel(query_gradient_kernel<T, kHeadDim, kValueDim, general()>,
                 query_gradient_shape(p, QueryPlan::kBlockM, p.dq_splits, QueryPlan::kThreads, QueryPlan::kBytes),
                 stream, p);
    if (p.dk.data != nullptr || p.dv.data != nullptr)
      run_kernel(
          key_gradient_kernel<T, kHeadDim, kValueDim, general()>,
          key_gradient_shape(p, KeyPlan::kBlockN, p.dk_splits, KeyPlan::kThreads, KeyPlan::kBytes, KeyPlan::kByOffset),
          stream, p);
  });
}

// Launches the kernel for the gradient of a bias.
template <int kHeadDim, int kValueDim>
void launch_bias_gradient(const Params& p, const BiasGradientParams& g, bool is_bf16, Stream stream) {
  using Plan = BiasGradientPlan<kHeadDim, kValueDim>;
  const LaunchShape shape = shape_of_owners(g, Plan::kThreads, Plan::kBytes);
  if (is_bf16) {
    run_kernel(bias_gradient_kernel<bf16_t, kHeadDim, kValueDim>, shape, stream, p, g);
  } else {
    run_kernel(bias_gradient_kernel<f16_t, kHeadDim, kValueDim>, shape, stream, p, g);
  }
}

}  // namespace fused_attn::gpu::sm80
