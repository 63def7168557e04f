// The row statistics: the numbers of each query that backward needs besides its rows of tensors. The preparation kernel
// has written them.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

// The row statistics of one query.
struct RowStatistics {
  float lse_log2;  // the exponent of a probability is scale_log2 * score - lse_log2
  float delta;     // rowsum(dout * out) - dlse
};

// Loads the row statistics of query `row`. A row past the last query counts as an empty row, whose probs are all 0.
GPU_DEVICE RowStatistics row_statistics(const Params& p, const HeadSlice& head_slice, int row) {
  return {load_global(head_slice.row_statistic(p.lse_log2, row)), load_global(head_slice.row_statistic(p.delta, row))};
}

// The prob that belongs to a score: exp2(score * scale_log2 - lse_log2). A hidden score is -inf, and gives 0.
GPU_DEVICE float prob_of(float score, float scale_log2, float lse_log2) {
  return exp2_approx(score * scale_log2 - lse_log2);
}

}  // namespace fused_attn::gpu
