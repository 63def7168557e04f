// The launchers of all kernels. Each head dim has an instantiation of its own (sm80/*.cu, sm90/*.cu).
#pragma once
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "hardware.h"
#include "params.h"

namespace fused_attn::gpu {

// A cudaStream_t, in a header that code without CUDA's headers includes.
using Stream = void*;

// Launches a kernel, and throws std::runtime_error if that fails.
template <class Kernel, class... Arguments>
void run_kernel(Kernel kernel, const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  const std::string error = launch(kernel, shape, stream, arguments...);
  if (!error.empty()) throw std::runtime_error(error);
}

// The shape of a launch with one block of threads for each `block` rows of each head of each batch entry. If several
// share this work, `batch` is to be multiplied by their number.
inline LaunchShape shape_of(int32_t rows, int block, int32_t heads, int32_t batch, int threads, int shared_bytes) {
  const int64_t programs = (int64_t{rows} + block - 1) / block * heads * batch;
  if (programs >= int64_t{1} << 31) throw std::length_error("the problem needs more blocks than a grid may have");
  return {static_cast<int>(programs), 1, 1, threads, shared_bytes};
}

// The shape of a launch of backward: a block of threads for each tile of `block` queries (query_gradient_tile), or keys
// (key_gradient_tile), of each head. Several, `splits`, may share a tile.
inline LaunchShape query_gradient_shape(const Params& p, int block, int32_t splits, int threads, int shared_bytes) {
  return p.finds_queries_by_offset
             ? shape_of(p.row_blocks * kRowBlock, block, p.num_heads, splits, threads, shared_bytes)
             : shape_of(p.seqlen_q, block, p.num_heads, p.batch * splits, threads, shared_bytes);
}
inline LaunchShape key_gradient_shape(const Params& p, int block, int32_t splits, int threads, int shared_bytes,
                                      bool by_offset = true) {
  const int32_t kv_heads = p.num_heads / p.group_size, row_blocks = p.rows_k / kRowBlock + p.batch;
  return by_offset && p.finds_keys_by_offset
             ? shape_of(row_blocks * kRowBlock, block, kv_heads, splits, threads, shared_bytes)
             : shape_of(p.seqlen_k, block, kv_heads, p.batch * splits, threads, shared_bytes);
}

// The shape of a launch of forward: a block of threads for each split of each tile of `block` queries. A packed call
// has at most rows_q / block tiles, and one more for each sequence, whose last tile may have fewer rows.
inline LaunchShape forward_shape_of(const Params& p, int block, int threads, int shared_bytes) {
  int64_t tiles = (int64_t{p.seqlen_q} + block - 1) / block * p.batch;
  if (p.query_tiles != nullptr) tiles = std::min(tiles, int64_t{p.rows_q} / block + p.batch);
  if (tiles >= int64_t{1} << 31) throw std::length_error("the problem needs more blocks than a grid may have");
  return shape_of(static_cast<int32_t>(tiles), 1, p.num_heads, /*batch=*/p.splits.count, threads, shared_bytes);
}

// Whether backward, or forward, needs a general kernel. Each large kernel is compiled twice. The plain kernel supports
// key padding, a band and sinks, which join a row once, behind its last key. The general kernel supports all that a
// call may ask for, as branches that all threads of a block take alike. It is slower than the plain kernel, and needs
// more registers. row_max and pages need a general kernel in forward only: backward reads no row_max, and pages have no
// gradients. Nor does backward read sinks: the log-sum-exp contains their share of the denominator.
inline bool is_general_backward(const Params& p) {
  return !p.logits.is_plain || p.mask.map != nullptr || p.dropout_seed != nullptr;
}
inline bool is_general_forward(const Params& p) {
  return is_general_backward(p) || p.row_max.data != nullptr || p.pages.table != nullptr;
}

// Turns run-time values into template arguments: calls f(T{}, std::bool_constant<flag>{}), where T is bf16_t or f16_t.
template <class F>
void for_variant(bool is_bf16, bool flag, F f) {
  if (is_bf16) {
    flag ? f(bf16_t{}, std::true_type{}) : f(bf16_t{}, std::false_type{});
  } else {
    flag ? f(f16_t{}, std::true_type{}) : f(f16_t{}, std::false_type{});
  }
}

// Whether backward for sm_90a has a fused kernel for this head dim. With a larger head dim, the accumulators of dk and
// dv do not fit into registers.
constexpr bool has_fused_backward(int64_t head_dim) { return head_dim <= 128; }

// The launchers of each architecture. head_dim_*.cu instantiates them.
namespace sm80 {
template <int kHeadDim, int kValueDim = kHeadDim>
void launch_forward(const Params& p, bool is_bf16, Stream stream);
template <int kHeadDim, int kValueDim = kHeadDim>
void launch_backward(const Params& p, bool is_bf16, Stream stream);
}  // namespace sm80

namespace sm90 {
template <int kHeadDim, int kValueDim = kHeadDim>
void launch_forward(const Params& p, bool is_bf16, Stream stream);
template <int kHeadDim, int kValueDim = kHeadDim>
void launch_backward(const Params& p, bool is_bf16, Stream stream);
}  // namespace sm90

}  // namespace fused_attn::gpu
