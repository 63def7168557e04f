// The softmax of a block of queries, over the keys seen so far.
#pragma once
#include "elementary.h"
#include "tiles.h"

namespace fused_attn::cpu {
namespace {

// Probabilities are exp(score - reference). The reference is raised to the maximum of a row's scores only if a score
// exceeds the reference by more than the slack. After the first keys this hardly ever happens, so scores become
// probabilities while they are still in registers.
template <class Policy>
struct RunningSoftmax {
  using Lane = typename Policy::Lane;

  // Probabilities stay below 2^8, so sums are at most 2^8 times as large as with the maximum as the reference.
  static constexpr int kSlackLog2 = 8;

  struct Sum {
    Vec<Lane> row[kBlockVectors<Lane>];    // over the keys before this block
    Vec<Lane> block[kBlockVectors<Lane>];  // over the keys of this block
  };

  Lane to_log2;  // scores times this factor are exponents of 2; positive
  Lane slack;    // how far a score may exceed the reference
  int vectors;   // how many vectors hold queries
  Vec<Lane> reference[kBlockVectors<Lane>];
  Vec<Lane> rescale[kBlockVectors<Lane>];  // the factor for sums over the keys before this block
  Sum sum;                                 // of the probabilities, also of those that dropout drops
  Sum rounded_sum;                         // of the probabilities as rounded for the product, if lanes hold pairs

  RunningSoftmax(Lane scale_to_log2, int num_vectors)
      : to_log2(scale_to_log2), slack(kSlackLog2 / scale_to_log2), vectors(num_vectors) {
    for (int v = 0; v < vectors; ++v) {
      reference[v] = broadcast<Lane>(FloatTraits<Lane>::kLowest);  // finite, so -inf minus the reference is never NaN
      sum.row[v] = rounded_sum.row[v] = Vec<Lane>{};
    }
  }

  // The output is divided by this sum. With the exact sum, rows that one key dominates would lose twice the accuracy.
  const Sum& multiplied_sum() const { return Policy::kPerLane == 1 ? sum : rounded_sum; }

  void begin_block() {
    for (int v = 0; v < vectors; ++v) {
      sum.block[v] = rounded_sum.block[v] = Vec<Lane>{};
      rescale[v] = broadcast<Lane>(1);
    }
  }

  void end_block() {
    for (int v = 0; v < vectors; ++v) {
      sum.row[v] = sum.row[v] * rescale[v] + sum.block[v];
      rounded_sum.row[v] = rounded_sum.row[v] * rescale[v] + rounded_sum.block[v];
    }
  }

  Vec<Lane> ceiling(int v) const { return reference[v] + slack; }

  // Raises the references that maxima[c], of the scores of vector v + c, exceed by more than the slack. `probs` are the
  // block's probabilities so far, of `count` lanes of keys. Tiles that did not reach a vector left garbage there, which
  // stays garbage.
  FA_NOINLINE void raise(const Vec<Lane>* maxima, int v, int columns, Lane* probs, int count) {
    for (int c = 0; c < columns; ++c) {
      const Vec<Lane> old = reference[v + c];
      const Vec<Lane> raised = select<Lane>(maxima[c] > ceiling(v + c), maxima[c], old);
      const Vec<Lane> factor = exp2<Lane>((old - raised) * to_log2);
      reference[v + c] = raised;
      rescale[v + c] *= factor;
      sum.block[v + c] *= factor;
      rounded_sum.block[v + c] *= factor;
      for (int k = 0; k < count; ++k) {
        Lane* target = probs + k * kBlockQ + (v + c) * kLanes<Lane>;
        if constexpr (Policy::kPerLane == 1) {
          store<Lane>(target, load<Lane>(target) * factor);
        } else {
#if defined(__AVX512BF16__)
          store<Lane>(target, scale_pairs(load<Lane>(target), factor));
#endif
        }
      }
    }
  }
};

}  // namespace
}  // namespace fused_attn::cpu
