// The product of few rows with a weight, as in a decoding step: the time is that of reading the weight once. A product
// in blocks, which is best for many rows, first copies the weight into another order.
#pragma once
#include "decode_block.h"
#include "layer_norm.h"
#include "linear_tiles.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// y = x . weight^T + bias, for x (rows, in), weight (out, in), bias (out,) or null, y (rows, out), all contiguous. A
// vector holds neighbouring input features, so rows of weight are read without a copy. Beside them, those of the next
// block are prefetched: with weights that are in no cache of the core, one row took 0.7 to 0.8 of the time.
template <class Policy>
void project(const typename Policy::Storage* x, int64_t rows, int64_t in, const typename Policy::Storage* weight,
             const typename Policy::Storage* bias, int64_t out, int num_threads, typename Policy::Storage* y) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  if (LinearTiles<Policy>::fits(rows, in, out)) {
    return LinearTiles<Policy>::project(x, rows, in, weight, bias, out, num_threads, y);
  }
  const int features = static_cast<int>(in);
  const int64_t row_lanes = round_up(Policy::lanes_for(features), n);
  const Buffer memory(rows * row_lanes * static_cast<int64_t>(sizeof(Lane)));
  Lane* lanes = reinterpret_cast<Lane*>(memory.data());
  for (int64_t r = 0; r < rows; ++r) {
    read_query<Policy>(x + r * in, features, lanes + r * row_lanes);
  }
  const int64_t blocks = (out + n - 1) / n;
  const double flops = 2.0 * static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out);
  parallel_for(choose_threads(num_threads, blocks, flops), blocks, [&](int64_t block, int) {
    const int64_t first = block * n;
    const int count = out - first < n ? static_cast<int>(out - first) : n;
    const Storage *weights[n], *next[n];
    for (int i = 0; i < n; ++i) {
      const auto row = [&](int64_t feature) { return weight + (feature < out ? feature : out - 1) * in; };
      weights[i] = row(first + i);
      next[i] = row(first + n + i);
    }
    const Vec<Lane> offset = bias != nullptr ? load_as<Lane>(bias + first, count) : Vec<Lane>{};
    Lane sums[kMostQueries<Lane> * kScoreRow<Lane>];
    visit_in_passes<Lane>(rows, [&](int64_t r, auto queries) {
      constexpr int kQueries = decltype(queries)::value;
      multiply_keys<Policy, kQueries>(lanes + r * row_lanes, row_lanes, {weights, 0}, count, features,
                                      {r == 0 ? next : nullptr, 0}, Lane(1), sums);
      for (int q = 0; q < kQueries; ++q) {
        store_as<Lane>(y + (r + q) * out + first, load<Lane>(sums + q * kScoreRow<Lane>) + offset, count);
      }
    });
  });
}

// Runs the product of LinearParams.
template <class Policy>
void linear_with_policy(const LinearParams& p) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const auto data = [](const void* pointer) { return static_cast<const Storage*>(pointer); };
  FinishParams finish = p.finish;
  Storage* const out = static_cast<Storage*>(finish.out);
  project<Policy>(data(p.x), finish.rows, p.in, data(p.weight), data(finish.bias), finish.features, finish.num_threads,
                  out);
  finish.x = out;
  finish.bias = nullptr;  // is in the product already
  finish_rows<Lane, Storage>(finish);
}

}  // namespace
}  // namespace fused_attn::cpu
