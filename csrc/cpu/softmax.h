// The online softmax of a block of queries: its state after some of the keys.
#pragma once
#include "float_parts.h"
#include "tiles.h"
#include "vec_math.h"

namespace fused_attn::cpu {
namespace {

// Reference and sums of each row of a block of queries. probs are exp(score - reference). The reference of a row is
// raised, to the largest score, only if a score exceeds the reference by more than `slack`. After the first keys this
// is rare. So a kernel can compute the probs of a tile while its scores are in registers, without a pass that searches
// the maximum of the whole block of keys.
template <class Policy>
struct RunningSoftmax {
  using Lane = typename Policy::Lane;

  // A score may exceed the reference so far that its prob is 2^16. Nothing overflows, also after summation, unless the
  // largest value, times the number of keys with about the largest score, reaches 2^112. With logits whose standard
  // deviation is 2 to 8, a slack of 2^8 raised references so often that calls with AMX took up to 1.1 times as long.
  static constexpr int kSlackLog2 = 16;

  // Sums of probs for each query.
  struct Sum {
    Vec<Lane> row[kBlockVectors<Lane>];    // over the keys of all blocks before the current one
    Vec<Lane> block[kBlockVectors<Lane>];  // over the keys of the current block
  };

  Lane to_log2;     // the factor that turns scores into exponents of 2; positive
  Lane slack;       // by how much a score may exceed the reference
  int vectors;      // the number of vectors that hold queries
  bool tracks_max;  // whether the caller wants the largest score of each row, which the reference is only near
  Vec<Lane> reference[kBlockVectors<Lane>];
  Vec<Lane> row_max[kBlockVectors<Lane>];  // the largest score so far, if tracks_max
  Vec<Lane> rescale[kBlockVectors<Lane>];  // the factor for sums over earlier blocks, because references have risen
  Sum sum;                                 // of probs before dropout
  Sum rounded_sum;                         // of probs rounded to bfloat16, if lanes hold pairs

  // Starts with no keys.
  RunningSoftmax(Lane scale_to_log2, int num_vectors, bool wants_max)
      : to_log2(scale_to_log2), slack(kSlackLog2 / scale_to_log2), vectors(num_vectors), tracks_max(wants_max) {
    for (int v = 0; v < vectors; ++v) {
      reference[v] = broadcast<Lane>(FloatTraits<Lane>::kLowest);  // finite, because -inf - (-inf) is NaN
      if (tracks_max) row_max[v] = broadcast<Lane>(-FloatTraits<Lane>::kInfinity);
      sum.row[v] = rounded_sum.row[v] = Vec<Lane>{};
    }
  }

  // The sum that the output is divided by. The product with values uses rounded probs, so their sum must be of rounded
  // probs as well: where one key has nearly all of the probability, the rounding errors of both cancel.
  const Sum& multiplied_sum() const { return Policy::kPerLane == 1 ? sum : rounded_sum; }

  // Must be called before the tiles of a block of keys.
  void begin_block() {
    for (int v = 0; v < vectors; ++v) {
      sum.block[v] = rounded_sum.block[v] = Vec<Lane>{};
      rescale[v] = broadcast<Lane>(1);
    }
  }

  // Must be called after the tiles of a block of keys: adds the sums of the block to those of earlier blocks.
  void end_block() {
    for (int v = 0; v < vectors; ++v) {
      sum.row[v] = sum.row[v] * rescale[v] + sum.block[v];
      rounded_sum.row[v] = rounded_sum.row[v] * rescale[v] + rounded_sum.block[v];
    }
  }

  // Takes the scores of a tile, whose first vector of queries is v, into account for row_max.
  template <int kColumns>
  void track_max(const Vec<Lane> (&scores)[kTileKeys][kColumns], int v) {
    FA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FA_UNROLL
      for (int r = 0; r < kTileKeys; ++r) row_max[v + c] = max<Lane>(scores[r][c], row_max[v + c]);
    }
  }

  // The largest scores for which the references of vector v need not rise.
  Vec<Lane> ceiling(int v) const { return reference[v] + slack; }

  // Raises the references of the rows in which a score exceeds the ceiling. maxima[c] are the largest scores of vector
  // v + c. Multiplies the sums of these rows, and the probs of the current block so far (the first `count` lanes of
  // keys), by the factor that the new reference requires. Probs of tiles that skipped a vector are not initialised, and
  // nobody reads them.
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
        Lane* target = probs + k * factor_stride<Policy>(vectors * kLanes<Lane>) + (v + c) * kLanes<Lane>;
        if constexpr (Policy::kParts == 0) {
          store<Lane>(target, load<Lane>(target) * factor);
        } else if constexpr (Policy::kParts > 1) {
#if defined(__AMX_BF16__)
          scale_pairs_of_parts(factor, part_lanes<Policy>(vectors * kLanes<Lane>), target);
#endif
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
