// What the backward kernels know of a query besides its row: the numbers that the preparation kernel has written.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

struct RowStatistics {
  float lse_log2;  // what exp2 takes off a score
  float delta;
};

// Of a row of a block that holds queries; of one past the last query as of an empty one, whose probabilities are all 0.
GPU_DEVICE RowStatistics row_statistics(const Params& p, const HeadSlice& head_slice, int row) {
  return {load_global(head_slice.row_statistic(p.lse_log2, row)), load_global(head_slice.row_statistic(p.delta, row))};
}

// Of a product q @ k^T; 0 where the score has been hidden.
GPU_DEVICE float prob_of(float score, float scale_log2, float lse_log2) {
  return exp2_approx(score * scale_log2 - lse_log2);
}

}  // namespace fused_attn::gpu
