// From scores to logits: scale, softcap, relative bias, key bias and bias. They change the scores after the product of
// queries and keys, and before the softmax. Forward and backward call the same function, to_logits, so a further
// modification of scores is a further step of to_logits.
//
//   logit = softcap * tanh(scale * score / softcap) + relative bias + key bias + bias
//   logit = scale * score + relative bias + key bias + bias                               (without a softcap)
//
// The first of these steps that is a multiply-add takes the scale as its factor, so scaling costs no instruction of its
// own. Masks come after the logits (visibility.h).
#pragma once
#include <type_traits>

#include "fragments.h"

namespace fused_attn::gpu {

// The query and the key of the entry x[0][0] of a thread's fragment. Entry x[t][j] lies 8 * (j / 2) rows and 8 * t + j
// % 2 columns further on. Rows are queries (QueryRows), or keys where the scores are transposed (KeyRows).
template <bool kRowsAreQueriesOption>
struct FragmentPosition {
  static constexpr bool kRowsAreQueries = kRowsAreQueriesOption;
  int32_t query;
  int32_t key;

  GPU_DEVICE int32_t query_of(int t, int j) const { return query + (kRowsAreQueries ? 8 * (j / 2) : 8 * t + j % 2); }
  GPU_DEVICE int32_t key_of(int t, int j) const { return key + (kRowsAreQueries ? 8 * t + j % 2 : 8 * (j / 2)); }
};
using QueryRows = FragmentPosition<true>;
using KeyRows = FragmentPosition<false>;

// Stands for gradients in a call of to_logits that has none, such as forward's.
struct NoGradients {
  GPU_DEVICE void scale(int, int, float) const {}
};

// The gradients by the logits of a fragment. to_logits multiplies them by the derivative of the softcap, which makes
// them gradients by the scores.
template <int kTiles>
struct LogitGradients {
  float (&x)[kTiles][4];
  GPU_DEVICE void scale(int t, int j, float factor) const { x[t][j] *= factor; }
};

// tanh(x), exact to about 3e-7: ex2.approx and rcp.approx have errors of about 1e-7 each. The instruction tanh.approx
// is less exact.
GPU_DEVICE float tanh_of(float x) {
  constexpr float kTwoLog2E = 2.0f * kLog2E;
  return multiply_add(-2.0f, reciprocal_approx(1.0f + exp2_approx(kTwoLog2E * x)), 1.0f);
}

// A softcap larger than this multiplies the error of tanh_of so much that the probs would show the error.
constexpr float kLargeSoftcap = 256.0f;

// tanh(x) with a relative error of about 1e-7 near 0, too. There, this computes a Taylor polynomial.
GPU_DEVICE float exact_tanh_of(float x) {
  const float square = x * x;
  float sum = multiply_add(square, 62.0f / 2835.0f, -17.0f / 315.0f);
  sum = multiply_add(square, sum, 2.0f / 15.0f);
  sum = multiply_add(square, sum, -1.0f / 3.0f);
  return square < 0.04f ? multiply_add(square * sum, x, x) : tanh_of(x);
}

// Applies the softcap to the scores of this thread, and multiplies gradients by its derivative.
template <int kTiles, class Gradients>
GPU_DEVICE void apply_softcap(const LogitParams& x, float (&scores)[kTiles][4], const Gradients& gradients) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    const auto apply = [&](auto tanh) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) {
        const float y = tanh(scores[t][j] * x.softcap_scale);
        scores[t][j] = x.softcap * y;
        gradients.scale(t, j, 1.0f - y * y);
      }
    };
    // The branch stands within the loop on purpose. Outside of the loop, ptxas would compute the exponentials of all
    // tiles first, for which there are not enough registers.
    if (x.softcap > kLargeSoftcap) {
      apply([](float z) { return exact_tanh_of(z); });
    } else {
      apply([](float z) { return tanh_of(z); });
    }
  }
}

// Multiplies scores by `factor`, and adds the relative bias, which is the same for all entries of a diagonal (key -
// query). The 4 * kTiles entries of a thread lie on only 2 * (kTiles + 1) diagonals: the two entries of tile t in row g
// + 8 lie on the diagonals of the entries of tile t - 1 in row g. So each number of the bias is loaded once.
// bias_of_diagonal_0 points to the bias of key == query.
template <int kTiles, class Position>
GPU_DEVICE void add_relative_bias(const float* bias_of_diagonal_0, float (&scores)[kTiles][4], float factor,
                                  Position at) {
  constexpr int kSign = Position::kRowsAreQueries ? 1 : -1;
  const float* const own = bias_of_diagonal_0 + (at.key - at.query);
  // For each tile, `upper` is the bias of the two entries in row g, and `lower` that of the two entries in row g + 8.
  const auto load_pair = [&](int tile) {
    return Float2{load_global(own + kSign * 8 * tile), load_global(own + kSign * (8 * tile + 1))};
  };
  Float2 lower = load_pair(-1);
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    const Float2 upper = load_pair(t);
    scores[t][0] = multiply_add(scores[t][0], factor, upper.x);
    scores[t][1] = multiply_add(scores[t][1], factor, upper.y);
    scores[t][2] = multiply_add(scores[t][2], factor, lower.x);
    scores[t][3] = multiply_add(scores[t][3], factor, lower.y);
    lower = upper;
  }
}

// Multiplies scores by `factor`, and adds the key bias, of which own_batch is the part for the batch entry. Keys beyond
// the last one get 0.
template <int kTiles, class Position>
GPU_DEVICE void add_key_bias(const float* own_batch, int32_t seqlen_k, float (&scores)[kTiles][4], float factor,
                             Position at) {
  const auto load = [&](int32_t key) { return key < seqlen_k ? load_global(own_batch + key) : 0.0f; };
  if constexpr (Position::kRowsAreQueries) {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      const float of_column[2] = {load(at.key_of(t, 0)), load(at.key_of(t, 1))};
      GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] = multiply_add(scores[t][j], factor, of_column[j % 2]);
    }
  } else {
    const float of_row[2] = {load(at.key_of(0, 0)), load(at.key_of(0, 2))};
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] = multiply_add(scores[t][j], factor, of_row[j / 2]);
    }
  }
}

// Loads one number of the bias, whose type is float or a 16-bit type, as a float.
template <class Element>
GPU_DEVICE float load_float(const Element* p) {
  if constexpr (std::is_same_v<Element, float>) {
    return load_global(p);
  } else {
    return unpack<Element>(load_global(reinterpret_cast<const uint16_t*>(p))).x;
  }
}

// Multiplies scores by `factor`, and adds a bias of any strides, one number at a time. Numbers beyond the last query or
// key are not read, and the scores there stay as they are.
template <class Element, int kTiles, class Position>
GPU_DEVICE void add_bias(const ScoreTensor& bias, const HeadSlice& head_slice, float (&scores)[kTiles][4], float factor,
                         Position at) {
  constexpr bool kRowsAreQueries = Position::kRowsAreQueries;
  const int64_t stride_row = kRowsAreQueries ? bias.stride_query : bias.stride_key;
  const int64_t stride_column = kRowsAreQueries ? bias.stride_key : bias.stride_query;
  const int32_t rows = kRowsAreQueries ? head_slice.seqlen_q - at.query : head_slice.seqlen_k - at.key;
  const int32_t columns = kRowsAreQueries ? head_slice.seqlen_k - at.key : head_slice.seqlen_q - at.query;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    // One pointer moves along the row. Computing an address for every entry would take more registers than there are.
    const Element* next = static_cast<const Element*>(bias.data) + head_slice.batch * bias.stride_batch +
                          head_slice.head * bias.stride_head + at.query * bias.stride_query + at.key * bias.stride_key +
                          8 * r * stride_row;
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
      GPU_UNROLL for (int c = 0; c < 2; ++c) {
        float& score = scores[t][2 * r + c];
        if (8 * r < rows && 8 * t + c < columns)
          score = multiply_add(score, factor, load_float(next + c * stride_column));
      }
      next = keep_computed(next + 8 * stride_column);
    }
  }
}

// Multiplies scores by `factor`, and adds a bias of type float of which each thread can read the two keys of a tile at
// once (LogitParams::has_bias_pairs), which takes half of the loads. Scores beyond the last query or key need not be
// right.
template <int kTiles>
GPU_DEVICE void add_bias_pairs(const ScoreTensor& bias, const HeadSlice& head_slice, float (&scores)[kTiles][4],
                               float factor, QueryRows at) {
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const float* const row = static_cast<const float*>(bias.data) + head_slice.batch * bias.stride_batch +
                             head_slice.head * bias.stride_head + (at.query + 8 * r) * bias.stride_query + at.key;
    const int32_t columns = at.query + 8 * r < head_slice.seqlen_q ? head_slice.seqlen_k - at.key : 0;
    GPU_UNROLL for (int first = 0; first < kTiles; first += 4) {
      // The branch is there for ptxas. Without it, ptxas would load the pairs of all tiles at once, for which there are
      // not enough registers at head dim 256.
      if (8 * first >= columns) break;
      GPU_UNROLL for (int t = first; t < first + 4; ++t) {
        Float2 pair{0.0f, 0.0f};
        if (8 * t < columns) pair = load_global(reinterpret_cast<const Float2*>(row + 8 * t));
        scores[t][2 * r] = multiply_add(scores[t][2 * r], factor, pair.x);
        scores[t][2 * r + 1] = multiply_add(scores[t][2 * r + 1], factor, pair.y);
      }
    }
  }
}

// Multiplies scores by `factor`, and adds a bias of type T whose rows can be read 16 bytes at a time
// (LogitParams::has_bias_rows), which takes an eighth of the loads. Of four tiles, each of the four threads of a row
// reads the eight keys of one tile. The threads then exchange what they have read, so that each has its two keys of all
// four tiles.
template <class T, int kTiles>
GPU_DEVICE void add_bias_rows(const ScoreTensor& bias, const HeadSlice& head_slice, float (&scores)[kTiles][4],
                              float factor, QueryRows at) {
  const Lane lane = this_lane();
  const int32_t own_key = at.key - 2 * lane.q + 8 * lane.q;
  GPU_UNROLL for (int r = 0; r < 2; ++r) {
    const T* next = static_cast<const T*>(bias.data) + head_slice.batch * bias.stride_batch +
                    head_slice.head * bias.stride_head + (at.query + 8 * r) * bias.stride_query + own_key;
    GPU_UNROLL for (int t = 0; t < kTiles; t += 4) {
      Vec4 read{0, 0, 0, 0};
      if (at.query + 8 * r < head_slice.seqlen_q && own_key + 8 * t < head_slice.seqlen_k)
        read = load_global(reinterpret_cast<const Vec4*>(next));
      uint32_t words[4] = {read.x, read.y, read.z, read.w};
      exchange_in_row(words, lane);
      GPU_UNROLL for (int i = 0; i < 4; ++i) {
        const Float2 pair = unpack<T>(words[i]);
        scores[t + i][2 * r] = multiply_add(scores[t + i][2 * r], factor, pair.x);
        scores[t + i][2 * r + 1] = multiply_add(scores[t + i][2 * r + 1], factor, pair.y);
      }
      next = keep_computed(next + 32);
    }
  }
}

// Stands for a tile of the bias in shared memory, in a call of to_logits that has none. Then, to_logits reads the bias
// from global memory.
struct NoBiasTile {
  GPU_DEVICE bool is_used() const { return false; }
  template <int kTiles>
  GPU_DEVICE void add(float (&)[kTiles][4], float) const {}
};

// Turns the scores of a thread's fragment into logits, in place. Backward passes the gradients by the logits, before
// their factor prob: to_logits multiplies them by the derivative of the softcap. Forward passes NoGradients. If there
// is nothing but the scale (is_plain), scores stay as they are, and the softmax multiplies by p.softmax_scale_log2. If
// bias_tile is used, it has the bias of this fragment, and `add` multiplies the scores by a factor and adds the bias.
template <class T, int kTiles, class Position, class Gradients, class BiasTile = NoBiasTile>
GPU_DEVICE void to_logits(const Params& p, HeadSlice head_slice, float (&scores)[kTiles][4], Position at,
                          const Gradients& gradients, const BiasTile& bias_tile = {}) {
  const LogitParams& x = p.logits;
  if (x.is_plain) return;
  // Without keep_computed, the compiler would compute parts of the addresses below before the kernel's loop over
  // blocks, and keep them in registers all the time.
  at.query = keep_computed(at.query);
  at.key = keep_computed(at.key);
  head_slice.batch = keep_computed(head_slice.batch);
  if (x.softcap != 0.0f) apply_softcap(x, scores, gradients);
  float factor = x.softcap != 0.0f ? 1.0f : p.scale;
  if (x.relative_bias != nullptr) {
    const float* const own_head = x.relative_bias + head_slice.head * x.relative_bias_stride_head;
    add_relative_bias(own_head + p.seqlen_q - 1, scores, factor, at);
    factor = 1.0f;
  }
  if (x.key_bias != nullptr) {
    add_key_bias(x.key_bias + head_slice.batch * x.key_bias_stride_batch, head_slice.seqlen_k, scores, factor, at);
    factor = 1.0f;
  }
  if (x.bias.data == nullptr) {
    if (factor != 1.0f) scale_rows(scores, {factor, factor});
    return;
  }
  if (bias_tile.is_used()) return bias_tile.add(scores, factor);
  if constexpr (Position::kRowsAreQueries) {
    if (x.has_bias_rows) return add_bias_rows<T>(x.bias, head_slice, scores, factor, at);
    if (x.has_bias_pairs) return add_bias_pairs(x.bias, head_slice, scores, factor, at);
  }
  x.is_bias_float ? add_bias<float>(x.bias, head_slice, scores, factor, at)
                  : add_bias<T>(x.bias, head_slice, scores, factor, at);
}

}  // namespace fused_attn::gpu
