// Host code of the gradients of biases and sinks: plans that divide tiles of scores among programs, and functions that
// launch the kernels. BiasGradientParams says what owners and splits are.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

#include "../../common/attention_params.h"
#include "../bias_gradient.h"

namespace fused_attn::gpu {

// If there are few owners, their tiles are split so that there are about this many programs. The number is the same on
// every device, because it decides the order of additions, and so the last bits of the result.
constexpr int64_t kBiasGradientPrograms = 256;

// The sizes of a tile of scores in bias_gradient_kernel.
struct BiasGradientTile {
  int32_t queries;
  int32_t keys;
};

// What the plans depend on.
struct BiasGradientSizes {
  int64_t batch;
  int64_t num_heads;
  int64_t seqlen_q;
  int64_t seqlen_k;
  BiasGradientTile tile;
};

// Returns into how many parts the tiles of each owner are split. `tiles` is the number of tiles of one owner.
inline int32_t splits_of(int64_t owners, int64_t tiles) {
  const int64_t wanted = (kBiasGradientPrograms + owners - 1) / owners;
  return static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tiles, 1)));
}

// Begins a plan: returns parameters that have the numbers of blocks of queries and of keys, and zeros otherwise.
inline BiasGradientParams blocks_of(const BiasGradientSizes& sizes) {
  BiasGradientParams g{};
  g.query_blocks = static_cast<int32_t>((sizes.seqlen_q + sizes.tile.queries - 1) / sizes.tile.queries);
  g.key_blocks = static_cast<int32_t>((sizes.seqlen_k + sizes.tile.keys - 1) / sizes.tile.keys);
  return g;
}

// The plan for a dense bias. `shape` is the shape of the gradient: 1 in a dimension that the bias broadcasts along.
inline BiasGradientParams plan_dense(const BiasGradientSizes& sizes, const std::array<int64_t, 4>& shape) {
  BiasGradientParams g = blocks_of(sizes);
  g.sums_batch = shape[0] != sizes.batch;
  g.sums_heads = shape[1] != sizes.num_heads;
  g.sums_queries = shape[2] != sizes.seqlen_q;
  g.sums_keys = shape[3] != sizes.seqlen_k;
  g.has_entry_of_each_score = !g.sums_queries && !g.sums_keys;
  // A dimension that the gradient has multiplies the number of owners. A dimension that the gradient is summed over
  // multiplies the number of tiles of each owner.
  int64_t owners = 1, tiles = 1;
  (g.sums_batch ? tiles : owners) *= sizes.batch;
  (g.sums_heads ? tiles : owners) *= sizes.num_heads;
  (g.sums_queries ? tiles : owners) *= g.query_blocks;
  (g.sums_keys ? tiles : owners) *= g.key_blocks;
  if (std::max(owners, tiles) >= int64_t{1} << 31)
    throw std::length_error("the gradient of the bias needs more than 2^31 tiles");
  g.owners = static_cast<int32_t>(owners);
  g.tiles_of_owner = static_cast<int32_t>(tiles);
  g.splits = splits_of(owners, tiles);
  g.stride_split = shape[0] * shape[1] * shape[2] * shape[3];
  return g;
}

// The plan for a relative bias. An owner is a diagonal of tiles of one head.
inline BiasGradientParams plan_relative(const BiasGradientSizes& sizes) {
  const BiasGradientTile& tile = sizes.tile;
  BiasGradientParams g = blocks_of(sizes);
  g.is_relative = true;
  // A diagonal of tiles has the tiles with the same (first key - first query). In blocks of keys, this difference goes
  // from -(query_blocks - 1) * (tile.queries / tile.keys) up to key_blocks - 1.
  g.diagonals = (g.query_blocks - 1) * (tile.queries / tile.keys) + g.key_blocks;
  const int64_t owners = sizes.num_heads * g.diagonals;
  if (std::max(owners, sizes.batch * g.query_blocks) >= int64_t{1} << 31)
    throw std::length_error("the gradient of the relative bias needs more than 2^31 tiles");
  g.owners = static_cast<int32_t>(owners);
  // No diagonal has more tiles than one for each block of queries of each batch entry.
  g.splits = splits_of(owners, sizes.batch * g.query_blocks);
  g.stride_split = owners * (tile.queries + tile.keys);  // see BiasGradientParams::sums
  return g;
}

// How many floats the sums of a plan need in the workspace. A dense bias with one split needs none, because its
// programs write the gradient itself.
inline int64_t sum_floats(const BiasGradientParams& g) {
  return g.is_relative || g.splits > 1 ? g.splits * g.stride_split : 0;
}

// launch_bias_gradient of one head dim.
using BiasGradientLauncher = void (*)(const Params&, const BiasGradientParams&, bool is_bf16, Stream);

// The shape of a launch with one thread for each entry of a gradient.
inline LaunchShape shape_of_sums(int64_t entries) {
  const int64_t programs = (entries + kSumThreads - 1) / kSumThreads;
  if (programs >= int64_t{1} << 31) throw std::length_error("the gradient needs more blocks than a grid may have");
  return {static_cast<int>(programs), 1, 1, kSumThreads, 0};
}

// Launches the kernels that compute the gradient of a dense bias. With several splits, programs write to the workspace,
// and a second kernel adds up the splits.
inline void sum_dense(const Params& p, BiasGradientParams g, const TensorView& gradient, DType gradient_dtype,
                      const std::array<int64_t, 4>& shape, float* workspace, BiasGradientLauncher launch, bool is_bf16,
                      Stream stream) {
  const bool is_split = g.splits > 1, is_gradient_rounded = gradient_dtype != DType::kFloat32;
  const TensorView sums =
      is_split ? TensorView{workspace, shape[3] * shape[2] * shape[1], shape[3] * shape[2], shape[3], 1} : gradient;
  g.sums = sums.data;
  g.is_rounded = !is_split && is_gradient_rounded;
  g.has_pieces = has_aligned_groups(sums, shape[3], g.is_rounded ? 8 : 2, g.is_rounded ? 16 : 8);
  g.stride_batch = sums.stride_batch;
  g.stride_head = sums.stride_head;
  g.stride_query = sums.stride_row;
  g.stride_key = sums.stride_col;
  launch(p, g, is_bf16, stream);
  if (!is_split) return;
  BiasSumParams sum{g.splits, g.stride_split, workspace, gradient.data, {}, {}};
  std::copy(shape.begin(), shape.end(), sum.sizes);
  const int64_t strides[4] = {gradient.stride_batch, gradient.stride_head, gradient.stride_row, gradient.stride_col};
  std::copy(strides, strides + 4, sum.strides);
  const auto run = [&](auto* kernel) { run_kernel(kernel, shape_of_sums(g.stride_split), stream, sum); };
  if (!is_gradient_rounded) {
    run(sum_bias_splits_kernel<float>);
  } else if (is_bf16) {
    run(sum_bias_splits_kernel<bf16_t>);
  } else {
    run(sum_bias_splits_kernel<f16_t>);
  }
}

// Launches the two kernels that compute the gradient of a relative bias. The first kernel sums along the diagonals of
// each owner's tiles. A diagonal of the scores passes through the tiles of several owners, and the second kernel adds
// up the sums of these owners.
inline void sum_relative(const Params& p, BiasGradientParams g, const BiasGradientTile& tile,
                         const TensorView& gradient, float* workspace, BiasGradientLauncher launch, bool is_bf16,
                         Stream stream) {
  g.sums = workspace;
  launch(p, g, is_bf16, stream);
  DiagonalSumParams sum{};
  sum.g = g;
  sum.tile_queries = tile.queries;
  sum.tile_keys = tile.keys;
  sum.heads = gradient.stride_head == 0 ? 1 : p.num_heads;
  sum.heads_of_row = p.num_heads / sum.heads;
  sum.columns = int64_t{p.seqlen_q} + p.seqlen_k - 1;
  sum.seqlen_q = p.seqlen_q;
  sum.gradient = static_cast<float*>(gradient.data);
  sum.stride_head = gradient.stride_head;
  run_kernel(sum_diagonals_kernel, shape_of_sums(sum.heads * sum.columns), stream, sum);
}

// Launches the kernel that computes the gradients of the sinks, one block of threads for each head.
inline void sum_sinks(const Params& p, Stream stream) {
  run_kernel(sum_sink_gradients_kernel, {p.num_heads, 1, 1, kSumThreads, kSumThreads * 4}, stream, p);
}

}  // namespace fused_attn::gpu
