// From scores to logits: all that may happen to an entry of the scores between the product with the keys and the
// softmax. Forward and backward call the same function, so a further modification of scores is a further step of it.
//
//   logit = softcap * tanh(scale * score / softcap) + relative bias + bias      (without a softcap: scale * score + ...)
//
// Logits are in units of log2: exp2(logit - reference) needs no factor then. Masks come afterwards (visibility.h).
#pragma once
#include <type_traits>

#include "fragments.h"

namespace fused_attn::gpu {

// Which query and which key the entry x[0][0] of a thread's fragment belongs to. Entry x[t][j] lies 8 * (j / 2) rows
// and 8 * t + j % 2 columns further on.
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

// Takes the place of the gradients that the derivative of the softcap is multiplied into, where there are none.
struct NoGradients {
  GPU_DEVICE void scale(int, int, float) const {}
};

// The gradients by the logits of a fragment. Their product with the derivative of the softcap is the gradient by the
// scores.
template <int kTiles>
struct LogitGradients {
  float (&x)[kTiles][4];
  GPU_DEVICE void scale(int t, int j, float factor) const { x[t][j] *= factor; }
};

// Exact to about 1e-7, unlike tanh.approx.
GPU_DEVICE float tanh_of(float x) {
  constexpr float kTwoLog2E = 2.0f * kLog2E;
  return 1.0f - 2.0f / (1.0f + exp2_approx(kTwoLog2E * x));
}

template <int kTiles, class Gradients>
GPU_DEVICE void apply_softcap(const LogitParams& p, float (&scores)[kTiles][4], const Gradients& gradients) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) {
      const float x = tanh_of(scores[t][j] * p.softcap_scale);
      scores[t][j] = p.softcap_log2 * x;
      gradients.scale(t, j, 1.0f - x * x);
    }
  }
}

// Entries of one diagonal have the same bias. A thread's 4 * kTiles entries lie on 2 * (kTiles + 1) diagonals: those
// of tile t, row g + 8, are those of tile t - 1, row g.
template <int kTiles, class Position>
GPU_DEVICE void add_relative_bias(const float* bias_of_diagonal_0, float (&logits)[kTiles][4], Position at) {
  constexpr int kSign = Position::kRowsAreQueries ? 1 : -1;
  const float* const own = bias_of_diagonal_0 + (at.key - at.query);
  float bias[kTiles + 1][2];
  GPU_UNROLL for (int u = 0; u <= kTiles; ++u) {
    GPU_UNROLL for (int c = 0; c < 2; ++c) bias[u][c] = load_global(own + kSign * (8 * (u - 1) + c));
  }
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) logits[t][j] += bias[t + 1 - j / 2][j % 2];
  }
}

// A number of type float or T, as a float.
template <class Element>
GPU_DEVICE float load_float(const Element* p) {
  if constexpr (std::is_same_v<Element, float>) {
    return load_global(p);
  } else {
    return unpack<Element>(load_global(reinterpret_cast<const uint16_t*>(p))).x;
  }
}

// Adds the entries of a tensor in memory. Entries beyond the last query or key are not read.
template <class Element, int kTiles, class Position>
GPU_DEVICE void add_bias(const ScoreTensor& bias, const HeadSlice& head_slice, float (&logits)[kTiles][4],
                         Position at) {
  const Element* const own = static_cast<const Element*>(bias.data) + head_slice.batch * bias.stride_batch +
                             head_slice.head * bias.stride_head + at.query * bias.stride_query +
                             at.key * bias.stride_key;
  constexpr bool kRowsAreQueries = Position::kRowsAreQueries;
  const int64_t stride_row = kRowsAreQueries ? bias.stride_query : bias.stride_key;
  const int64_t stride_column = kRowsAreQueries ? bias.stride_key : bias.stride_query;
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) {
      const bool exists = at.query_of(t, j) < head_slice.seqlen_q && at.key_of(t, j) < head_slice.seqlen_k;
      if (exists) {
        const float x = load_float(own + 8 * (j / 2) * stride_row + (8 * t + j % 2) * stride_column);
        logits[t][j] = multiply_add(x, kLog2E, logits[t][j]);
      }
    }
  }
}

// Turns scores into logits, in place, and multiplies gradients by the derivative of the softcap. If the logits are
// plain, scores stay as they are, and p.softmax_scale_log2 is the factor that is missing.
template <class T, int kTiles, class Position, class Gradients>
GPU_DEVICE void to_logits(const Params& p, const HeadSlice& head_slice, float (&scores)[kTiles][4], Position at,
                          const Gradients& gradients) {
  const LogitParams& x = p.logits;
  if (x.is_plain) return;
  if (x.softcap_log2 != 0.0f) {
    apply_softcap(x, scores, gradients);
  } else {
    GPU_UNROLL for (int t = 0; t < kTiles; ++t) { GPU_UNROLL for (int j = 0; j < 4; ++j) scores[t][j] *= p.scale_log2; }
  }
  if (x.relative_bias != nullptr)
    add_relative_bias(x.relative_bias + head_slice.head * x.relative_bias_stride_head + p.seqlen_q - 1, scores, at);
  if (x.bias.data != nullptr) {
    x.is_bias_float ? add_bias<float>(x.bias, head_slice, scores, at) : add_bias<T>(x.bias, head_slice, scores, at);
  }
}

}  // namespace fused_attn::gpu
