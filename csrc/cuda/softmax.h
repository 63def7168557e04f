// The online softmax (Milakov and Gimelshein, arXiv 1805.02867) of the two rows that a thread shares with three others.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

struct OnlineSoftmax {
  float row_max[2];  // of the scores before scaling; -inf: nothing seen yet
  float row_sum[2];  // of this thread's columns alone

  GPU_DEVICE void init() {
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      row_max[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
  }

  // Turns scores into weights, relative to the new maximum. `rescale` makes up for the old one in what was summed
  // before.
  template <int kTiles>
  GPU_DEVICE void update(float (&scores)[kTiles][4], float scale_log2, float (&rescale)[2]) {
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      float new_max = row_max[r];
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) new_max =
          fmaxf(new_max, fmaxf(scores[t][2 * r], scores[t][2 * r + 1]));
      new_max = row_maximum(new_max);
      const float offset = finite_offset(new_max, scale_log2);
      rescale[r] = exp2_approx(row_max[r] * scale_log2 - offset);
      row_max[r] = new_max;
      float sum = 0.0f;
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
        GPU_UNROLL for (int j = 2 * r; j < 2 * r + 2; ++j) {
          scores[t][j] = exp2_approx(scores[t][j] * scale_log2 - offset);
          sum += scores[t][j];
        }
      }
      row_sum[r] = row_sum[r] * rescale[r] + sum;
    }
  }

  // (factor for the output, log-sum-exp) of row r, once all is summed. A row that saw nothing: (0, -inf).
  GPU_DEVICE void finish(int r, float scale_log2, float& factor, float& lse) {
    const float total = row_total(row_sum[r]);
    const bool is_empty = row_max[r] == -kInfinity;
    factor = is_empty ? 0.0f : 1.0f / total;
    lse = is_empty ? -kInfinity : (row_max[r] * scale_log2 + log2_approx(total)) * kLn2;
  }

 private:
  // -inf - -inf is NaN: rows that have seen nothing take 0 for their maximum, and weights exp2(-inf) = 0.
  static GPU_DEVICE float finite_offset(float max, float scale_log2) {
    return max == -kInfinity ? 0.0f : max * scale_log2;
  }
};

}  // namespace fused_attn::gpu
