// The softmax of the two rows that a thread shares with three others, block by block, and without a maximum in most
// blocks.
//
// Probs are relative to a reference: prob = exp(score - reference). The online softmax (Milakov and Gimelshein, arXiv
// 1805.02867) takes the maximum of all scores so far as the reference. But any number near the maximum will do, as long
// as no prob overflows. So the probs of a block are first computed with the reference as it is. Only if their sum is
// too large is the maximum of the block computed, and the reference raised. While the reference stays, no sum has to be
// rescaled.
#pragma once
#include "fragments.h"

namespace fused_attn::gpu {

// Stands for DropoutKeep where there is no dropout: every prob survives.
struct NoDropout {
  GPU_DEVICE bool has(int, int) const { return true; }
};

// The state of the softmax of two rows. The four threads that share the rows hold the same references, and each sums
// its own columns.
struct LazySoftmax {
  // The largest sum of the probs of one thread in a block. At most this size, each prob is also finite in float16.
  static constexpr float kLargestSum = 4096.0f;
  // An offset is a reference times scale_log2, rounded. try_probs subtracts the offset from exponents. Up to this size,
  // the rounding error of an offset is at most 1/4, and offset_error corrects for it in the end. Beyond this size, the
  // error may be of any size.
  static constexpr float kLargestOffset = 4194304.0f;

  float reference[2];  // a score; -inf as long as the row has seen no key
  // The sum over this thread's columns alone. NaN if every result of the row is NaN, or if none is wanted.
  float row_sum[2];

  GPU_DEVICE void init() {
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      reference[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
  }

  // Tells that no result of row r is wanted. The row then never asks for another reference, so it does not change how
  // the other rows of the warp are rounded.
  GPU_DEVICE void ignore(int r) { row_sum[r] = kNaN; }

  // Computes the probs of a block with the current references, rounded as left factors of the next product. All lanes
  // of a warp call this. Returns false, and changes no sum, if some row of the warp needs another reference, or has too
  // large an offset. No reference helps a row whose sum is NaN.
  template <class T, int kTiles, class AnyDropoutKeep>
  GPU_DEVICE bool try_probs(const float (&scores)[kTiles][4], float scale_log2, const AnyDropoutKeep& dropout_keep,
                            uint32_t (&probs)[kTiles / 2][4]) {
    float offset[2], sum[2];
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      offset[r] = reference[r] * scale_log2;
      if (!is_small(offset[r])) offset[r] = -kInfinity;  // probabilities become +inf, or NaN
    }
    compute_probs<T>(dropout_keep, probs, sum,
                     [&](int t, int j) { return multiply_add(scores[t][j], scale_log2, -offset[j / 2]); });
    if (warp_any(needs_reference(0, sum[0]) || needs_reference(1, sum[1]))) return false;
    GPU_UNROLL for (int r = 0; r < 2; ++r) row_sum[r] += sum[r];
    return true;
  }

  // Raises the references to the maxima of the block, and computes the probs with them. The caller has to multiply acc
  // by `rescale`.
  template <class T, int kTiles, class AnyDropoutKeep>
  GPU_DEVICE void raise_and_compute_probs(const float (&scores)[kTiles][4], float scale_log2,
                                          const AnyDropoutKeep& dropout_keep, uint32_t (&probs)[kTiles / 2][4],
                                          float (&rescale)[2]) {
    float finite[2], error[2], sum[2];
    GPU_UNROLL for (int r = 0; r < 2; ++r) {
      float raised = reference[r];
      GPU_UNROLL for (int t = 0; t < kTiles; ++t) raised = fmaxf(raised, fmaxf(scores[t][2 * r], scores[t][2 * r + 1]));
      raised = row_maximum(raised);
      finite[r] = finite_reference(raised);
      error[r] = offset_error(raised, scale_log2);
      rescale[r] = factor_between(reference[r], raised, scale_log2);
      reference[r] = raised;
    }
    // try_probs would compute the same numbers. This way of computing them is right for scores of any size.
    compute_probs<T>(dropout_keep, probs, sum, [&](int t, int j) {
      return multiply_add(scores[t][j] - finite[j / 2], scale_log2, error[j / 2]);
    });
    GPU_UNROLL for (int r = 0; r < 2; ++r) row_sum[r] = row_sum[r] * rescale[r] + sum[r];
  }

  // After the last block: computes the factor that turns acc into the output of row r, and the log-sum-exp of the row.
  // An empty row gets the factor 0 and the log-sum-exp -inf.
  GPU_DEVICE void finish(int r, float scale, float scale_log2, float& factor, float& lse) const {
    finish_row(reference[r], row_total(row_sum[r]), scale, scale_log2, factor, lse);
  }

  // The same for a row whose sum over all columns is `total`.
  static GPU_DEVICE void finish_row(float reference, float total, float scale, float scale_log2, float& factor,
                                    float& lse) {
    const bool is_empty = reference == -kInfinity && total == 0.0f;  // if all scores are NaN, the total is NaN
    factor = is_empty ? 0.0f : 1.0f / total;
    lse = is_empty ? -kInfinity
                   : multiply_add(reference, scale, (log2_approx(total) - offset_error(reference, scale_log2)) * kLn2);
  }

  // The factor that turns sums relative to the reference `lower` into sums relative to the reference `higher`. It is 0
  // if `lower` is -inf, because such sums are sums over no key.
  static GPU_DEVICE float factor_between(float lower, float higher, float scale_log2) {
    return exp2_approx((lower - finite_reference(higher)) * scale_log2 +
                       (offset_error(higher, scale_log2) - offset_error(lower, scale_log2)));
  }

 private:
  // Whether row r needs another reference, because the probs of a block add up to `sum`. An offset that is too large
  // makes `sum` +inf or NaN.
  GPU_DEVICE bool needs_reference(int r, float sum) const { return !(sum <= kLargestSum) && row_sum[r] == row_sum[r]; }

  // -inf - -inf is NaN. So a row that has seen no key uses 0 as its reference, and its probs become 0.
  static GPU_DEVICE float finite_reference(float reference) { return reference == -kInfinity ? 0.0f : reference; }

  static GPU_DEVICE bool is_small(float offset) { return offset <= kLargestOffset && offset >= -kLargestOffset; }

  // The exponent of the factor by which the probs of try_probs are off, because the offset was rounded.
  static GPU_DEVICE float offset_error(float reference, float scale_log2) {
    const float offset = reference * scale_log2;
    return is_small(offset) ? multiply_add(reference, scale_log2, -offset) : 0.0f;
  }

  // Computes all probs of a block as exp2 of `exponent(t, j)`, their sums over this thread's columns, and the rounded
  // left factors. Dropped probs count in the sums, but are 0 in the left factors.
  template <class T, int kSteps, class AnyDropoutKeep, class Exponent>
  static GPU_DEVICE void compute_probs(const AnyDropoutKeep& dropout_keep, uint32_t (&probs)[kSteps][4],
                                       float (&sum)[2], Exponent exponent) {
    sum[0] = sum[1] = 0.0f;
    GPU_UNROLL for (int k = 0; k < kSteps; ++k) {
      float pair[2][4];
      GPU_UNROLL for (int half = 0; half < 2; ++half) {
        const int t = 2 * k + half;
        GPU_UNROLL for (int j = 0; j < 4; ++j) {
          const float prob = exp2_approx(exponent(t, j));
          sum[j / 2] += prob;
          pair[half][j] = dropout_keep.has(t, j) ? prob : 0.0f;
        }
      }
      left_factor<T>(probs[k], pair, 0);
    }
  }
};

// The largest scores of two rows, or NaN if a score is NaN. LazySoftmax does not know them: its references are only near
// them.
struct RowMaxima {
  float value[2];  // of this thread's columns alone

  GPU_DEVICE void init() { value[0] = value[1] = -kInfinity; }

  template <int kTiles>
  GPU_DEVICE void add(const float (&scores)[kTiles][4]) {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) value[j / 2] = max_or_nan(value[j / 2], scores[t][j]);
    }
  }

  // The largest logit of row r, if a score times `scale` is a logit. All lanes of a warp call this.
  GPU_DEVICE float of_row(int r, float scale) const {
    const float of_pair = max_or_nan(value[r], shuffle_xor(value[r], 1));
    return max_or_nan(of_pair, shuffle_xor(of_pair, 2)) * scale;
  }
};

// Adds exp(sink) to the denominator of a finished row: changes the row's factor and log-sum-exp. An empty row stays
// empty.
GPU_DEVICE void join_sink(float sink, float& factor, float& lse) {
  if (lse == -kInfinity) return;
  const float larger = fmaxf(lse, sink);
  const float keys = exp2_approx((lse - larger) * kLog2E), all = keys + exp2_approx((sink - larger) * kLog2E);
  factor *= keys / all;
  lse = multiply_add(log2_approx(all), kLn2, larger);
}

}  // namespace fused_attn::gpu
