// The softmax of a block of queries, as far as its keys have been seen.
#pragma once
#include "tiles.h"

namespace fused_attn::cpu {
namespace {

// Probabilities are exp(score - reference). The reference follows the maximum of a row's scores only where one passes it by
// the slack: hardly ever after the first keys, so that scores become probabilities while they are still in registers.
template <class P>
struct RunningSoftmax {
  using Lane = typename P::Lane;

  static constexpr int kSlackLog2 =
      8;  // probabilities stay below 2^8, far from where sums of them would round differently

  Lane to_log2;  // what scores are multiplied by to be exponents of 2; positive
  Lane slack;    // of scores
  int vectors;   // that hold queries
  Vec<Lane> reference[kBlockVectors<Lane>];
  Vec<Lane> row_sum[kBlockVectors<Lane>];    // over the keys before this block
  Vec<Lane> block_sum[kBlockVectors<Lane>];  // over the keys of this block, those that dropout drops too
  Vec<Lane> alpha[kBlockVectors<Lane>];      // what sums over the keys before this block must be multiplied by

  RunningSoftmax(Lane scale, int num_vectors) : to_log2(scale), slack(kSlackLog2 / scale), vectors(num_vectors) {
    for (int v = 0; v < vectors; ++v) {
      reference[v] = broadcast<Lane>(FloatTraits<Lane>::kLowest);  // finite: -inf minus it is -inf, never NaN
      row_sum[v] = Vec<Lane>{};
    }
  }

  void begin_block() {
    for (int v = 0; v < vectors; ++v) {
      block_sum[v] = Vec<Lane>{};
      alpha[v] = broadcast<Lane>(1);
    }
  }

  void end_block() {
    for (int v = 0; v < vectors; ++v) row_sum[v] = row_sum[v] * alpha[v] + block_sum[v];
  }

  Vec<Lane> ceiling(int v) const { return reference[v] + slack; }

  // Lifts the references that maxima[c], of the scores of vector v + c, pass by the slack. `weights` are the block's
  // probabilities so far, of `count` lanes of keys.
  FA_NOINLINE void raise(const Vec<Lane>* maxima, int v, int columns, Lane* weights, int count) {
    for (int c = 0; c < columns; ++c) {
      const Vec<Lane> old = reference[v + c];
      const Vec<Lane> raised = select<Lane>(maxima[c] > ceiling(v + c), maxima[c], old);
      const Vec<Lane> factor = exp2<Lane>((old - raised) * to_log2);
      reference[v + c] = raised;
      alpha[v + c] *= factor;
      block_sum[v + c] *= factor;
      for (int k = 0; k < count; ++k) {
        Lane* p = weights + k * kBlockQ + (v + c) * kLanes<Lane>;
        if constexpr (P::kPerLane == 1) {
          store<Lane>(p, load<Lane>(p) * factor);
        } else {
#if defined(__AVX512BF16__)
          store<Lane>(p, scale_pairs(load<Lane>(p), factor));
#endif
        }
      }
    }
  }
};

}  // namespace
}  // namespace fused_attn::cpu
