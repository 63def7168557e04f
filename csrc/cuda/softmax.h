// The softmax of the two rows that a thread shares with three others, block by block and without a maximum in most of
// them. Weights are relative to a row's offset. The online softmax (Milakov and Gimelshein, arXiv 1805.02867) takes the
// maximum of all scores so far, but any number near it will do, as long as no weight overflows. So a block's weights are
// tried with the offset as it is. Only where their sum is too large are the maxima looked for and the offset raised.
// While the offset stays, nothing that was summed before has to be rescaled.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

// Keeps every weight: dropout where there is none.
struct KeepAll {
  GPU_DEVICE bool has(int, int) const { return true; }
};

struct LazySoftmax {
  // Of one thread's weights in a block. Each of them is then finite in float16, too.
  static constexpr float kLargestSum = 4096.0f;

  float offset[2];   // of scores times scale_log2; -inf: nothing seen yet
  float row_sum[2];  // of this thread's columns alone

  GPU_DEVICE void init() {
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      offset[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
  }

  // The weights of a block, rounded, as left factors of the next product. Returns false, and adds nothing to the sums,
  // if a row of the warp needs another offset.
  template <class T, int kTiles, class Keep>
  GPU_DEVICE bool try_weigh(const float (&scores)[kTiles][4], float scale_log2, const Keep& keep,
                            uint32_t (&weights)[kTiles / 2][4]) {
    float sum[2];
    weigh<T>(scores, scale_log2, offset, keep, weights, sum);
    // Also where a sum is NaN: the first visible score of a row, less -inf, is +inf, and a hidden one NaN.
    if (warp_any(!(sum[0] <= kLargestSum && sum[1] <= kLargestSum))) return false;
    GPU_UNROLL for (int r = 0; r < 2; ++r) row_sum[r] += sum[r];
    return true;
  }

  // Likewise, after it has raised the offsets to the maxima of the block. `rescale` makes up for the old offsets in what
  // was summed before.
  template <class T, int kTiles, class Keep>
  GPU_DEVICE void raise_and_weigh(const float (&scores)[kTiles][4], float scale_log2, const Keep& keep,
                                  uint32_t (&weights)[kTiles / 2][4], float (&rescale)[2]) {
    float finite[2], sum[2];
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      float max = -kInfinity;
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) max = fmaxf(max, fmaxf(scores[t][2 * r], scores[t][2 * r + 1]));
      const float raised = fmaxf(offset[r], row_maximum(max) * scale_log2);
      // -inf - -inf is NaN: rows that have seen nothing take 0, and weights exp2(-inf) = 0.
      finite[r] = raised == -kInfinity ? 0.0f : raised;
      rescale[r] = exp2_approx(offset[r] - finite[r]);
      offset[r] = raised;
    }
    weigh<T>(scores, scale_log2, finite, keep, weights, sum);
    GPU_UNROLL for (int r = 0; r < 2; ++r) row_sum[r] = row_sum[r] * rescale[r] + sum[r];
  }

  // (factor for the output, log-sum-exp) of row r, once all is summed. A row that saw nothing: (0, -inf).
  GPU_DEVICE void finish(int r, float& factor, float& lse) const {
    const float total = row_total(row_sum[r]);
    const bool is_empty = offset[r] == -kInfinity;
    factor = is_empty ? 0.0f : 1.0f / total;
    lse = is_empty ? -kInfinity : (offset[r] + log2_approx(total)) * kLn2;
  }

 private:
  // One rounding between score and exponent: of two, the first would be off by whole numbers for scores of millions.
  template <class T, int kTiles, class Keep>
  static GPU_DEVICE void weigh(const float (&scores)[kTiles][4], float scale_log2, const float (&relative_to)[2],
                               const Keep& keep, uint32_t (&weights)[kTiles / 2][4], float (&sum)[2]) {
    sum[0] = sum[1] = 0.0f;
    GPU_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
      float pair[2][4];
      GPU_UNROLL for (int half = 0; half < 2; ++half) {
        const int t = 2 * k + half;
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          const float weight = exp2_approx(multiply_add(scores[t][j], scale_log2, -relative_to[j / 2]));
          sum[j / 2] += weight;
          pair[half][j] = keep.has(t, j) ? weight : 0.0f;
        }
      }
      left_factor<T>(weights[k], pair, 0);
    }
  }
};

}  // namespace fused_attn::gpu
