// A whole self-attention module for few rows in one call: input projection, attention, output projection. With so few
// rows, calling the operators of torch one by one takes longer than the arithmetic.
#pragma once
#include "decode.h"
#include "forward.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// y = x . weight^T + bias, for x (rows, in), weight (out, in), bias (out,) or null, y (rows, out), all contiguous. A
// vector holds neighbouring input features, so rows of weight are read without a copy. For many rows, a product in
// blocks with transposed weights would be faster.
template <class Policy>
void project(const typename Policy::Storage* x, int64_t rows, int64_t in, const typename Policy::Storage* weight,
             const typename Policy::Storage* bias, int64_t out, int num_threads, typename Policy::Storage* y) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const int features = static_cast<int>(in);
  // Convert the rows of x to lanes, which multiply_keys (decode.h) reads.
  const int64_t row_lanes = round_up(Policy::lanes_for(features), n);
  const Buffer memory(rows * row_lanes * static_cast<int64_t>(sizeof(Lane)));
  Lane* lanes = reinterpret_cast<Lane*>(memory.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int d = 0; d < Policy::lanes_for(features); d += n) {
      store<Lane>(lanes + r * row_lanes + d, load_lanes<Policy>(x + r * in, d, features));
    }
  }
  // Each item computes one vector of output features for all rows. In the last block, copies of the last row of weight
  // take the place of rows that do not exist.
  const int64_t blocks = (out + n - 1) / n;
  const double flops = 2.0 * static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out);
  parallel_for(choose_threads(num_threads, blocks, flops), blocks, [&](int64_t block, int) {
    const int64_t first = block * n;
    const int count = out - first < n ? static_cast<int>(out - first) : n;
    const Storage* weights[n];
    for (int i = 0; i < n; ++i) weights[i] = weight + (first + (i < count ? i : count - 1)) * in;
    const Vec<Lane> offset = bias != nullptr ? load_as<Lane>(bias + first, count) : Vec<Lane>{};
    alignas(kVectorBytes) Lane sums[n];
    for (int64_t r = 0; r < rows; ++r) {
      multiply_keys<Policy, /*kPrefetch=*/false>(lanes + r * row_lanes, weights, count, features, /*scale=*/Lane(1),
                                                 /*ahead=*/0, sums);
      store_as<Lane>(y + r * out + first, load<Lane>(sums) + offset, count);
    }
  });
}

// Runs the module: projects x to query, key and value, attends, and projects the result to m.out.
template <class Policy>
void self_attention_with_policy(const SelfAttentionParams& m) {
  using Storage = typename Policy::Storage;
  AttentionParams p = m.attention;
  const int64_t rows = p.batch * p.seqlen_q;
  const int64_t query_width = p.num_heads * p.head_dim;
  const int64_t key_width = p.num_kv_heads * p.head_dim;
  const int64_t width = query_width + 2 * key_width;
  const auto data = [](const void* pointer) { return static_cast<const Storage*>(pointer); };

  Storage *projected, *attended;
  const Buffer memory([&](Arena& arena) {
    projected = arena.take<Storage>(rows * width);
    attended = arena.take<Storage>(rows * query_width);
  });

  project<Policy>(data(m.x), rows, m.features, data(m.in_weight), data(m.in_bias), width, p.num_threads, projected);
  const auto heads_from = [&](int64_t column) {
    return TensorView{projected + column, p.seqlen_q * width, p.head_dim, width, 1};
  };
  p.query = heads_from(0);
  p.key = heads_from(query_width);
  p.value = heads_from(query_width + key_width);
  p.out = {attended, p.seqlen_q * query_width, p.head_dim, query_width, 1};
  forward_with_policy<Policy>(p);
  project<Policy>(attended, rows, query_width, data(m.out_weight), data(m.out_bias), m.features, p.num_threads,
                  static_cast<Storage*>(m.out));
}

}  // namespace
}  // namespace fused_attn::cpu
