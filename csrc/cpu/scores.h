// Scores of one tile of keys: the code that forward and backward share, so that both see the same numbers.
#pragma once
#include "dropout.h"
#include "key_blocks.h"

namespace fused_attn::cpu {
namespace {

FA_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The Toeplitz bias, reversed: the 64 queries from i on see key j under data[i - j + seqlen_k - 1 ...].
template <class Lane>
struct RelativeBias {
  const Lane* data = nullptr;
  int64_t stride_head = 0;
};

// No pair of positions, no bias.
FA_INLINE int64_t relative_columns(const AttentionParams& p) {
  const int64_t columns = p.seqlen_q + p.seqlen_k - 1;
  return columns < 0 ? 0 : columns;
}

// One vector block of queries may reach past seqlen_q.
FA_INLINE int64_t relative_row(const AttentionParams& p) { return round_up(relative_columns(p) + kBlockQ, kCacheLine); }

FA_INLINE int64_t relative_heads(const AttentionParams& p, const TensorView& view) {
  return view.stride_head == 0 ? 1 : p.num_heads;
}

template <class Lane>
int64_t relative_bias_bytes(const AttentionParams& p) {
  if (p.relative_bias.data == nullptr) return 0;
  return relative_heads(p, p.relative_bias) * relative_row(p) * static_cast<int64_t>(sizeof(Lane));
}

template <class Lane>
RelativeBias<Lane> make_relative_bias(const AttentionParams& p, char* memory) {
  RelativeBias<Lane> result;
  if (p.relative_bias.data == nullptr) return result;
  Lane* data = reinterpret_cast<Lane*>(memory);
  const int64_t columns = relative_columns(p);
  const int64_t row = relative_row(p);
  const int64_t heads = relative_heads(p, p.relative_bias);
  for (int64_t h = 0; h < heads; ++h) {
    const Lane* source = row_of<const Lane>(p.relative_bias, 0, h, 0);
    Lane* target = data + h * row;
    for (int64_t c = 0; c < columns; ++c) target[c] = source[(columns - 1 - c) * p.relative_bias.stride_col];
    for (int64_t c = columns; c < row; ++c) target[c] = 0;
  }
  result.data = data;
  result.stride_head = heads == 1 ? 0 : row;
  return result;
}

// Everything that the scores of a query block depend on.
template <class Policy>
struct ScoreInputs {
  using Lane = typename Policy::Lane;

  const Lane* query = nullptr;  // columns [depth][kBlockQ]
  int depth = 0;                // lanes of a key row
  const KeyBlock* keys = nullptr;
  const char* const* key_rows = nullptr;  // of the block's keys
  Lane scale = 1;
  Lane softcap = 0;                     // 0 = off
  const Lane* bias = nullptr;           // [key of the block][kBlockQ]
  const Lane* relative_bias = nullptr;  // of query q and key j: [q - j]

  // Scores are left as plain dot products where nothing is added to them: the scale then joins the exponential's argument
  // at no cost. The maximum of a row must be that of the scaled scores, hence the sign.
  bool raw = true;

  // What scores are multiplied by to become logits.
  Lane to_logits() const { return raw ? scale : Lane(1); }
};

// x -> cap * tanh(x / cap) for `count` lanes; stores the derivative if it is wanted.
// Out of line: inside the tile it would spill the accumulators of all the tiles that have no softcap.
template <class Lane>
FA_NOINLINE void apply_softcap(Lane* scores, int count, Lane cap, Lane* derivative) {
  for (int i = 0; i < count; i += kLanes<Lane>) {
    const Vec<Lane> t = tanh<Lane>(load<Lane>(scores + i) / cap);
    store<Lane>(scores + i, t * cap);
    if (derivative != nullptr) store<Lane>(derivative + i, Lane(1) - t * t);
  }
}

// Scores of keys [k, k + kTileKeys) of the block and kColumns vectors of queries from vector v on. A plain tile compiles
// without any modifier. `derivative` receives the softcap's derivative, [kTileKeys][kColumns] vectors, if not null.
template <class Policy, int kColumns, bool kPlain>
FA_INLINE void compute_scores(const ScoreInputs<Policy>& in, int k, int v, bool partial,
                              typename Policy::Lane* derivative,
                              Vec<typename Policy::Lane> (&acc)[kTileKeys][kColumns]) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  dot_tile<Policy, kTileKeys, kColumns>(in.key_rows + k, in.query + v * n, kBlockQ, in.depth, acc);
  if constexpr (kPlain) return;
  if (!in.raw) {
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] *= in.scale;
    }
  }
  if (in.softcap > 0) {
    alignas(kVectorBytes) Lane scores[kTileKeys * kColumns * n];
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) store<Lane>(scores + (r * kColumns + c) * n, acc[r][c]);
    }
    apply_softcap<Lane>(scores, kTileKeys * kColumns * n, in.softcap, derivative);
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = load<Lane>(scores + (r * kColumns + c) * n);
    }
  }
  if (in.bias != nullptr) {
    const Lane* bias = in.bias + k * kBlockQ + v * n;
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] += load<Lane>(bias + r * kBlockQ + c * n);
    }
  }
  if (in.relative_bias != nullptr) {
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      const Lane* bias = in.relative_bias - in.keys->index[k + r] + v * n;
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] += load<Lane>(bias + c * n);
    }
  }
  if (partial) {
    const Vec<Lane> hidden = broadcast<Lane>(-FloatTraits<Lane>::kInfinity);
    FA_UNROLL
    for (int r = 0; r < kTileKeys; ++r) {
      const uint64_t word = in.keys->word[k + r];
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        acc[r][c] = select<Lane>(lanes_of_bits<Lane>(word, (v + c) * n), acc[r][c], hidden);
      }
    }
  }
}

// 2^exponent as exactly as Policy::Storage, to which it will be rounded, can tell.
template <class Policy>
FA_INLINE Vec<typename Policy::Lane> prob_of(Vec<typename Policy::Lane> exponent) {
#if defined(__AVX512BF16__)
  if constexpr (Policy::kPerLane == 2) return exp2_to_round(exponent);
#endif
  return exp2<typename Policy::Lane, Policy::kCoarseExp>(exponent);
}

// Rows of the block's keys as `rows` of lanes: in place where memory already holds lanes, else converted into `scratch`
// (rows of round_up(dim, lanes) lanes). Sets kTileKeys pointers behind the last key as well.
template <class Policy>
FA_NOINLINE void find_rows(const typename Policy::Storage* base, int64_t stride_row, const KeyBlock& keys, int dim,
                           typename Policy::Lane* scratch, const char** rows) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  if (Policy::kPerLane == 1 ? !Policy::kConverts : dim % 2 == 0) {
    for (int k = 0; k < keys.count; ++k) rows[k] = reinterpret_cast<const char*>(base + keys.index[k] * stride_row);
  } else {
    const int lanes = Policy::lanes_for(dim);
    const int64_t row = round_up(lanes, n);
    for (int k = 0; k < keys.count; ++k) {
      const typename Policy::Storage* source = base + keys.index[k] * stride_row;
      for (int d = 0; d < lanes; d += n) store<Lane>(scratch + k * row + d, load_lanes<Policy>(source, d, dim));
      rows[k] = reinterpret_cast<const char*>(scratch + k * row);
    }
  }
  for (int k = keys.count; k < keys.count + kTileKeys; ++k) rows[k] = rows[keys.count - 1];
}

// Rows of one head for sums over its keys: as find_rows finds them, or pairs of neighbouring keys interleaved when lanes
// hold pairs. A thread caches such pairs for the next blocks of queries as long as the rows begin at the same address:
// then they are the same rows, since one call has one stride between rows. A block that begins at an odd key, or has
// holes, is interleaved each time.
template <class Policy>
struct SummedRows {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;

  static constexpr int64_t kMaxCachedBytes = int64_t{1} << 20;  // what a second-level cache holds

  const char** rows;            // of the block's keys (pairs)
  Lane* block;                  // the block's rows, if memory does not hold them and they are not cached
  int64_t pairs;                // that can be cached; 0: none are
  Lane* cached;                 // [pair of keys 2 i, 2 i + 1][dim, padded]
  uint8_t* is_cached;           // [pair]
  const Storage** cached_base;  // in the scratch, too, since a thread's scratch is handed on as constant

  void layout(Arena& arena, const AttentionParams& p, int dim, int64_t visits) {
    const int64_t row = round_up(dim, kLanes<Lane>);
    pairs = Policy::kPerLane == 2 && visits > 1 ? (p.seqlen_k + 1) / 2 : 0;
    if (pairs * row * static_cast<int64_t>(sizeof(Lane)) > kMaxCachedBytes) pairs = 0;
    rows = arena.take<const char*>(kBlockK + kTileKeys);
    block = arena.take<Lane>(Policy::kConverts || Policy::kPerLane == 2 ? (kBlockK + kTileKeys) * row : 0);
    cached = arena.take<Lane>(pairs * row);
    is_cached = arena.take<uint8_t>(pairs);
    cached_base = arena.take<const Storage*>(1);
    if (cached_base != nullptr) *cached_base = nullptr;
  }

  FA_NOINLINE void find(const Storage* base, int64_t stride_row, const KeyBlock& keys, int dim) const {
    if constexpr (Policy::kPerLane == 1) {
      find_rows<Policy>(base, stride_row, keys, dim, block, rows);
    } else {
#if defined(__AVX512BF16__)
      const int64_t row = round_up(dim, kLanes<Lane>);
      const auto source = [&](int k) { return reinterpret_cast<const uint16_t*>(base + keys.index[k] * stride_row); };
      const bool caches = pairs > 0 && keys.contiguous && keys.index[0] % 2 == 0 && keys.count % 2 == 0;
      if (caches && *cached_base != base) {
        memset(is_cached, 0, pairs);
        *cached_base = base;
      }
      for (int k = 0; k < keys.count; k += 2) {
        const int64_t pair = keys.index[k] / 2;
        Lane* target = caches ? cached + pair * row : block + k / 2 * row;
        if (!caches || is_cached[pair] == 0) {
          interleave_rows(source(k), k + 1 < keys.count ? source(k + 1) : nullptr, dim, target);
        }
        if (caches) is_cached[pair] = 1;
        rows[k / 2] = reinterpret_cast<const char*>(target);
      }
#endif
    }
  }
};

// Fills tile[key of the block][kBlockQ] with the bias, zero for queries that do not exist.
template <class Lane, class Storage>
FA_NOINLINE void load_bias_tile(const TensorView& view, int64_t b, int64_t h, int64_t q_begin, int nq,
                                const KeyBlock& keys, Lane* tile) {
  constexpr int n = kLanes<Lane>;
  const Storage* base = row_of<const Storage>(view, b, h, q_begin);
  if (view.stride_row == 0) {
    for (int k = 0; k < keys.count; ++k) {
      const Lane x = load_scalar<Lane>(base + keys.index[k] * view.stride_col);
      const Vec<Lane> row = broadcast<Lane>(x);
      for (int q = 0; q < kBlockQ; q += n) store<Lane>(tile + k * kBlockQ + q, row);
    }
  } else if (view.stride_col == 1 && keys.contiguous) {
    base += keys.index[0];
    for (int q = 0; q < nq; q += n) {
      for (int k = 0; k < keys.count; k += n) {
        Vec<Lane> block[n];
        const int count = keys.count - k;
        if (q + n <= nq && count >= n) {
          FA_UNROLL
          for (int i = 0; i < n; ++i) block[i] = load_as<Lane>(base + (q + i) * view.stride_row + k);
        } else {
          FA_UNROLL
          for (int i = 0; i < n; ++i) {
            block[i] = Vec<Lane>{};
            if (q + i < nq) block[i] = load_as<Lane>(base + (q + i) * view.stride_row + k, count);
          }
        }
        transpose<Lane>(block);
        FA_UNROLL
        for (int i = 0; i < n; ++i) store<Lane>(tile + (k + i) * kBlockQ + q, block[i]);
      }
    }
  } else {
    for (int k = 0; k < keys.count; ++k) {
      Lane* row = tile + k * kBlockQ;
      const Storage* column = base + keys.index[k] * view.stride_col;
      for (int q = 0; q < nq; ++q) row[q] = load_scalar<Lane>(column + q * view.stride_row);
      for (int q = nq; q < kBlockQ; ++q) row[q] = 0;
    }
  }
}

// What both directions hold for a block of keys.
template <class Policy>
struct KeyScratch {
  using Lane = typename Policy::Lane;

  KeyBlock* keys;
  const char** key_rows;
  Lane* key_lanes;              // converted keys, if they must be converted
  Lane* bias;                   // [kBlockK + kTileKeys][kBlockQ]
  LaneInt<Lane>* dropout_keep;  // [kBlockK + kTileKeys][kBlockQ]
  VectorRange* ranges;          // per tile

  static constexpr int64_t kRows = kBlockK + kTileKeys;

  void layout(Arena& arena, const AttentionParams& p) {
    keys = arena.take<KeyBlock>(1);
    key_rows = arena.take<const char*>(kRows);
    const bool converts = Policy::kConverts || p.head_dim % Policy::kPerLane != 0;
    key_lanes = arena.take<Lane>(
        converts ? kRows * round_up(Policy::lanes_for(static_cast<int>(p.head_dim)), kLanes<Lane>) : 0);
    const int64_t tile = round_up(kRows, kLanes<Lane>) * kBlockQ;
    bias = arena.take<Lane>(p.bias.data != nullptr ? tile : 0);
    dropout_keep = arena.take<LaneInt<Lane>>(p.has_dropout ? tile : 0);
    ranges = arena.take<VectorRange>(kBlockK / kTileKeys);
    // The rows behind the last valid key are read by the last tile and then masked away: they must only be initialised.
    if (bias != nullptr && p.bias.data != nullptr) memset(bias, 0, tile * sizeof(Lane));
    if (dropout_keep != nullptr && p.has_dropout) memset(dropout_keep, 0, tile * sizeof(LaneInt<Lane>));
  }
};

// The parts of ScoreInputs that depend on the call and the head alone.
template <class Policy>
ScoreInputs<Policy> score_inputs(const AttentionParams& p, const RelativeBias<typename Policy::Lane>& relative,
                                 int64_t h, int64_t q_begin) {
  using Lane = typename Policy::Lane;
  ScoreInputs<Policy> in;
  in.depth = Policy::lanes_for(static_cast<int>(p.head_dim));
  in.scale = static_cast<Lane>(p.scale);
  in.softcap = static_cast<Lane>(p.softcap);
  if (relative.data != nullptr) {
    in.relative_bias = relative.data + h * relative.stride_head + q_begin + p.seqlen_k - 1;
  }
  // Not a scale so small that it, as a lane, is zero or denormal: a hidden score would become -inf * 0.
  in.raw = p.scale > 1e-30 && !(p.softcap > 0) && p.bias.data == nullptr && p.relative_bias.data == nullptr;
  return in;
}

// Finds the key rows, the bias and the dropout decisions of the block in `scratch`.
template <class Policy>
FA_INLINE void prepare_keys(const AttentionParams& p, const Sequence& seq, int64_t b, int64_t h, int64_t q_begin,
                            int nq, const KeyScratch<Policy>& scratch, ScoreInputs<Policy>& in) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const KeyBlock& keys = *scratch.keys;
  const int64_t kv_head = h / (p.num_heads / p.num_kv_heads);
  find_rows<Policy>(row_of<const Storage>(p.key, b, kv_head, seq.k_offset), p.key.stride_row, keys,
                    static_cast<int>(p.head_dim), scratch.key_lanes, scratch.key_rows);
  in.keys = &keys;
  in.key_rows = scratch.key_rows;
  if (p.bias.data != nullptr) {
    if (p.bias_dtype == p.dtype) {
      load_bias_tile<Lane, Storage>(p.bias, b, h, q_begin, nq, keys, scratch.bias);
    } else {
      load_bias_tile<Lane, Lane>(p.bias, b, h, q_begin, nq, keys, scratch.bias);
    }
    in.bias = scratch.bias;
  }
  if (p.has_dropout) make_dropout_keep(p, b, h, q_begin, keys, scratch.dropout_keep);
}

}  // namespace
}  // namespace fused_attn::cpu
