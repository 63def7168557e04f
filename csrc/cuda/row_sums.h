// What the backward kernels know of a query besides its row: the numbers that the delta kernel has prepared.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

struct RowSums {
  float lse_log2;  // what exp2 takes off a score
  float delta;
};

// Of a query that may not exist.
GPU_DEVICE RowSums row_sums(const Params& p, const Place& place, int row) {
  if (row >= place.len_q) return {kInfinity, 0.0f};  // all its weights are 0
  return {load_global(place.query_value(p.lse_log2, row)), load_global(place.query_value(p.delta, row))};
}

// Of a product q @ k^T; 0 where the score has been hidden.
GPU_DEVICE float weight_of(float score, float scale_log2, float lse_log2) {
  return exp2_approx(score * scale_log2 - lse_log2);
}

}  // namespace fused_attn::gpu
