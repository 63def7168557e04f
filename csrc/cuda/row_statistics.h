// What the backward kernels know of a query besides its row: the numbers that the preparation kernel has written.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

struct RowStatistics {
  float lse_log2;  // the exponent of a probability is scale_log2 * score - lse_log2
  float delta;
};

// A row past the last query counts as an empty row, whose probabilities are all 0.
GPU_DEVICE RowStatistics row_statistics(const Params& p, const HeadSlice& head_slice, int row) {
  return {load_global(head_slice.row_statistic(p.lse_log2, row)), load_global(head_slice.row_statistic(p.delta, row))};
}

// The probability that belongs to a product q @ k^T. It is 0 where the score has been hidden.
GPU_DEVICE float prob_of(float score, float scale_log2, float lse_log2) {
  return exp2_approx(score * scale_log2 - lse_log2);
}

}  // namespace fused_attn::gpu
