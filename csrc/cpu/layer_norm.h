// Biases, residual connections and layer norms, which follow or precede the products of a module.
#pragma once
#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace fused_attn::cpu {
namespace {

// Writes residual + relu(x + bias) to out, n elements, without what is null or off.
template <class Lane, class Storage>
void finish_sum(const Storage* x, const Storage* bias, bool relu, const Storage* residual, int64_t n, Storage* out) {
  for (int64_t i = 0; i < n; i += kLanes<Lane>) {
    const int count = n - i < kLanes<Lane> ? static_cast<int>(n - i) : kLanes<Lane>;
    Vec<Lane> sum = load_as<Lane>(x + i, count);
    if (bias != nullptr) sum += load_as<Lane>(bias + i, count);
    if (relu) sum = max<Lane>(Vec<Lane>{}, sum);  // of NaN: NaN
    if (residual != nullptr) sum += load_as<Lane>(residual + i, count);
    store_as<Lane>(out + i, sum, count);
  }
}

// Normalises the row x to mean 0 and variance 1, and writes norm.weight * row + norm.bias to out, which may be x (Ba et
// al., 2016).
template <class Lane, class Storage>
void normalise_row(const Storage* x, int64_t features, const LayerNormParams& norm, Storage* out) {
  constexpr int n = kLanes<Lane>;
  const auto* const weight = static_cast<const Storage*>(norm.weight);
  const auto* const bias = static_cast<const Storage*>(norm.bias);
  const auto count_at = [&](int64_t i) { return features - i < n ? static_cast<int>(features - i) : n; };
  Vec<Lane> sum = {};
  for (int64_t i = 0; i < features; i += n) sum += load_as<Lane>(x + i, count_at(i));
  const Lane mean = sum_lanes<Lane>(sum) / static_cast<Lane>(features);
  const auto centred_at = [&](int64_t i, Lane rest) {
    Vec<Lane> centred = load_as<Lane>(x + i, count_at(i)) - mean - rest;
    for (int lane = count_at(i); lane < n; ++lane) centred[lane] = 0;  // no feature, so no part of the variance
    return centred;
  };
  // The mean is rounded. Where it is far larger than the spread of the row, its rounding would be a part of the result.
  // So the mean of what is left is subtracted, too.
  Vec<Lane> left = {};
  for (int64_t i = 0; i < features; i += n) left += centred_at(i, 0);
  const Lane rest = sum_lanes<Lane>(left) / static_cast<Lane>(features);
  Vec<Lane> squares = {};
  for (int64_t i = 0; i < features; i += n) squares += centred_at(i, rest) * centred_at(i, rest);
  const Lane variance = sum_lanes<Lane>(squares) / static_cast<Lane>(features);
  const Lane factor = static_cast<Lane>(1 / __builtin_sqrt(static_cast<double>(variance) + norm.eps));
  for (int64_t i = 0; i < features; i += n) {
    const int count = count_at(i);
    Vec<Lane> y = centred_at(i, rest) * factor * load_as<Lane>(weight + i, count);
    if (bias != nullptr) y += load_as<Lane>(bias + i, count);
    store_as<Lane>(out + i, y, count);
  }
}

// Runs the work of FinishParams.
template <class Lane, class Storage>
void finish_rows(const FinishParams& p) {
  const bool has_norm = p.norm.weight != nullptr;
  const bool has_sum = p.bias != nullptr || p.relu || p.residual != nullptr;
  if (!has_sum && !has_norm && p.x == p.out) return;
  const auto row_of = [&](const void* tensor, int64_t r) {
    return tensor == nullptr ? nullptr : static_cast<const Storage*>(tensor) + r * p.features;
  };
  constexpr double kFlopsOfElement = 10;
  const double flops = kFlopsOfElement * static_cast<double>(p.rows) * static_cast<double>(p.features);
  parallel_for(choose_threads(p.num_threads, p.rows, flops), p.rows, [&](int64_t r, int) {
    const Storage* row = row_of(p.x, r);
    Storage* const target = static_cast<Storage*>(p.out) + r * p.features;
    if (has_sum || !has_norm) {
      finish_sum<Lane>(row, row_of(p.bias, 0), p.relu, row_of(p.residual, r), p.features, target);
      row = target;
    }
    if (has_norm) normalise_row<Lane>(row, p.features, p.norm, target);
  });
}

}  // namespace
}  // namespace fused_attn::cpu
