// The scores of one tile of keys and queries. forward and backward share this code, because backward must compute
// exactly the scores that forward has computed.
#pragma once
#include <type_traits>

#include "amx_products.h"
#include "dropout.h"
#include "key_rows.h"
#include "relative_bias.h"
#include "vec_math.h"

namespace fused_attn::cpu {
namespace {

// The inputs of compute_scores for one block of queries and one block of keys.
template <class Policy>
struct ScoreInputs {
  using Lane = typename Policy::Lane;

  const Lane* query = nullptr;  // query^T [depth][stride]
  int64_t stride = 0;           // the queries of the block, rounded up to whole vectors
  int depth = 0;                // the number of lanes of a row of key
  const KeyBlock* keys = nullptr;
  const char* const* key_rows = nullptr;  // [key of the block]: its row, as lanes
  const Lane* products = nullptr;         // [key of the block][stride]: query . key, if AMX multiplies
  Lane scale = 1;
  Lane softcap = 0;                     // 0 = off
  const Lane* bias = nullptr;           // [key of the block][stride]
  const Lane* key_bias = nullptr;       // [key of the batch entry]
  const Lane* relative_bias = nullptr;  // of query q of the block and key j: relative_bias[q - j]

  // Whether scores are products of query and key without the scale. They are if there is no softcap and no bias. The
  // exponential multiplies its argument by log2(e) in any case, so the factor scale * log2(e) applies the scale at no
  // cost. The scale must be positive, so that the largest score is also the largest logit.
  bool raw = true;
  // Whether prepare_keys multiplies `products` by the scale and adds the dense bias. Then `scale` is 1, and `bias` is
  // null.
  bool adds_bias = false;

  // Whether scores are the products alone, with the bias that has been added to them.
  bool has_no_other_terms() const { return raw || (adds_bias && key_bias == nullptr && relative_bias == nullptr); }

  // The factor that turns scores into logits.
  Lane to_logits() const { return raw ? scale : Lane(1); }
};

// scores[i] = cap * tanh(scores[i] / cap), for `count` scores. Stores the derivatives as well unless `derivative` is
// null. The function is not inlined into compute_scores, because there its code would make the compiler spill the
// accumulators, also in calls without softcap.
template <class Lane>
FA_NOINLINE void apply_softcap(Lane* scores, int count, Lane cap, Lane* derivative) {
  // The factor must be finite, so that a score of 0 stays 0. Denormal numbers count as 0, so a larger cap than kMost
  // would lose scores: with kMost, these are only scores below 1.2e-8 (double: 2.3e-18).
  constexpr Lane kLeast = FloatTraits<Lane>::kLeastNormal, kMost = sizeof(Lane) == 4 ? Lane(1e30) : Lane(1e290);
  cap = cap < kLeast ? kLeast : cap > kMost ? kMost : cap;
  const Lane inverse = Lane(1) / cap;
  for (int i = 0; i < count; i += kLanes<Lane>) {
    const Vec<Lane> t = tanh<Lane>(load<Lane>(scores + i) * inverse);
    store<Lane>(scores + i, t * cap);
    if (derivative != nullptr) store<Lane>(derivative + i, Lane(1) - t * t);
  }
}

// acc = the scores of one tile: kKeys keys from key k of the block on, and kColumns vectors of queries from vector v
// on. The scores of hidden keys are -inf if `partial` is set. With kPlain, the function only computes products.
// `derivative`, if not null, receives the derivative of the softcap, as [kKeys][kColumns] vectors.
template <class Policy, int kColumns, bool kPlain, int kKeys>
FA_INLINE void compute_scores(const ScoreInputs<Policy>& in, int k, int v, bool partial,
                              typename Policy::Lane* derivative, Vec<typename Policy::Lane> (&acc)[kKeys][kColumns]) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  if constexpr (Policy::kUsesAmx) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = load<Lane>(in.products + (k + r) * in.stride + (v + c) * n);
    }
  } else {
    dot_tile<Policy, kKeys, kColumns>(in.key_rows + k, in.query + v * n, in.stride, in.depth, acc);
  }
  if constexpr (kPlain) return;
  if (!in.raw) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] *= in.scale;
    }
  }
  if (in.softcap > 0) {
    alignas(kVectorBytes) Lane scores[kKeys * kColumns * n];
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) store<Lane>(scores + (r * kColumns + c) * n, acc[r][c]);
    }
    apply_softcap<Lane>(scores, kKeys * kColumns * n, in.softcap, derivative);
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] = load<Lane>(scores + (r * kColumns + c) * n);
    }
  }
  if (in.bias != nullptr) {
    const Lane* bias = in.bias + k * in.stride + v * n;
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] += load<Lane>(bias + r * in.stride + c * n);
    }
  }
  if (in.key_bias != nullptr) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      const Vec<Lane> bias = broadcast<Lane>(in.key_bias[in.keys->index[k + r]]);
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] += bias;
    }
  }
  if (in.relative_bias != nullptr) {
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      const Lane* bias = in.relative_bias - in.keys->index[k + r] + v * n;
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[r][c] += load<Lane>(bias + c * n);
    }
  }
  if (partial) {
    const Vec<Lane> hidden = broadcast<Lane>(-FloatTraits<Lane>::kInfinity);
    FA_UNROLL
    for (int r = 0; r < kKeys; ++r) {
      const uint64_t word = in.keys->word[k + r];
      FA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        acc[r][c] = select<Lane>(lanes_of_bits<Lane>(word, (v + c) * n), acc[r][c], hidden);
      }
    }
  }
}

// probs = 2^exponent. They will be rounded to Policy::Storage, so the exponential is only as exact as this type
// requires.
template <class Policy>
FA_INLINE Vec<typename Policy::Lane> prob_of(Vec<typename Policy::Lane> exponent) {
#if defined(__AVX512BF16__)
  if constexpr (Policy::kPerLane == 2) return exp2_to_round(exponent);
#endif
  return exp2<typename Policy::Lane, Policy::kCoarseExp>(exponent);
}

// Calls put(i, column i) for all 2 n columns of n rows of bfloat16, where n is the number of lanes. Pairs of elements
// are transposed, and converted to lanes then: this takes half of the shuffles.
template <class Put>
FA_INLINE void transpose_pairs(const BFloat16* rows, int64_t stride_row, const Put& put) {
  constexpr int n = kLanes<float>;
  Vec<float> block[n];
  FA_UNROLL
  for (int j = 0; j < n; ++j) memcpy(&block[j], rows + j * stride_row, sizeof(block[j]));
  transpose<float>(block);
  FA_UNROLL
  for (int i = 0; i < n; ++i) {
    const IntVec<float> bits = reinterpret_cast<IntVec<float>>(block[i]);
    put(2 * i, reinterpret_cast<Vec<float>>(bits << 16));
    put(2 * i + 1, reinterpret_cast<Vec<float>>(bits & ~0xffff));
  }
}

// Copies the dense bias of a block of keys and queries, transposed, to tile[key of the block][stride]. The entries of
// queries that do not exist are zero. With kAdds, the tile holds products, which become tile * scale + bias. There are
// three branches:
//
//   stride_row is 0                    all queries share one bias, so the function broadcasts a number to each row
//   stride_col is 1, contiguous keys   the function loads whole vectors of keys, and transposes them
//   otherwise                          the function loads one number at a time; not with kAdds
template <class Lane, class Storage, bool kAdds>
FA_NOINLINE void load_bias_tile(const TensorView& view, const QueryBlock& queries, const KeyBlock& keys, Lane scale,
                                Lane* tile) {
  constexpr int n = kLanes<Lane>;
  const int nq = queries.count;
  const int64_t stride = round_up(nq, n);
  const Storage* base = rows_of<const Storage>(view, queries);
  const auto put = [&](int k, int64_t q, Vec<Lane> bias) {
    Lane* const target = tile + k * stride + q;
    store<Lane>(target, kAdds ? load<Lane>(target) * scale + bias : bias);
  };
  if (view.stride_row == 0) {
    for (int k = 0; k < keys.count; ++k) {
      const Lane x = load_scalar<Lane>(base + keys.index[k] * view.stride_col);
      for (int q = 0; q < stride; q += n) put(k, q, broadcast<Lane>(x));
    }
  } else if (view.stride_col == 1 && keys.contiguous) {
    base += keys.index[0];
    for (int q = 0; q < nq; q += n) {
      int k = 0;
      if constexpr (kSame<Storage, BFloat16>) {
        for (; q + n <= nq && k + 2 * n <= keys.count; k += 2 * n) {
          transpose_pairs(base + q * view.stride_row + k, view.stride_row,
                          [&](int i, Vec<Lane> column) { put(k + i, q, column); });
        }
      }
      for (; k < keys.count; k += n) {
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
        for (int i = 0; i < n; ++i) put(k + i, q, block[i]);
      }
    }
  } else if constexpr (!kAdds) {
    for (int k = 0; k < keys.count; ++k) {
      Lane* row = tile + k * stride;
      const Storage* column = base + keys.index[k] * view.stride_col;
      for (int q = 0; q < nq; ++q) row[q] = load_scalar<Lane>(column + q * view.stride_row);
      for (int64_t q = nq; q < stride; ++q) row[q] = 0;
    }
  }
}

// Multiplies the products of a block of keys and queries by the scale, and adds the dense bias. A bias that cannot be
// loaded as vectors goes through `tile`: to add one number at a time takes longer.
template <class Lane, class Storage>
void add_bias_to_products(const TensorView& view, const QueryBlock& queries, const KeyBlock& keys, Lane scale,
                          Lane* tile, Lane* products) {
  if (view.stride_row == 0 || (view.stride_col == 1 && keys.contiguous)) {
    load_bias_tile<Lane, Storage, true>(view, queries, keys, scale, products);
    return;
  }
  load_bias_tile<Lane, Storage, false>(view, queries, keys, scale, tile);
  const int64_t count = keys.count * round_up(queries.count, kLanes<Lane>);
  for (int64_t i = 0; i < count; i += kLanes<Lane>) {
    store<Lane>(products + i, load<Lane>(products + i) * scale + load<Lane>(tile + i));
  }
}

// Prefetches the address + offset. The sum is one of numbers, because it may lie behind the allocation, and C++ does
// not allow a pointer to do so. The empty assembly keeps the prefetch: GCC takes a function that only prefetches for
// one without effect, and deletes its calls. kWrites: the bytes will be written.
template <bool kWrites = false>
FA_INLINE void prefetch_bytes(const void* address, size_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + offset), kWrites, 2);
  asm volatile("");
}

// Prefetches `count` rows of `dim` elements, from `first` on, which will be written. Rows without gaps between them
// need no prefetch: the processor's own prefetchers follow them.
template <class Storage>
FA_INLINE void prefetch_rows(const Storage* first, int64_t stride_row, int64_t count, int dim) {
  if (stride_row <= dim) return;
  constexpr int64_t kBytes = sizeof(Storage);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t byte = 0; byte < dim * kBytes; byte += kCacheLine)
      prefetch_bytes</*kWrites=*/true>(first, j * stride_row * kBytes + byte);
  }
}

// Prefetches the elements of a block of queries and of the keys [key_begin, key_end) in `view`, a tensor with an
// element of `element_bytes` for each score: part number `part` of `parts`.
//
// Of elements that are read, only rows that lie in a page of memory each need this: the processor's own prefetchers
// follow about 32 pages, and a block has 64 queries. Forward with a dense bias, 8192 queries and keys takes 0.77 of the
// time in bfloat16 (AMX), and 0.87 in float32 (AVX-512). With 1024 queries and keys and a bias in bfloat16, whose rows
// share pages, it would take 1.07 of the time.
//
// Elements that are written lie in no cache of the core, so rows of any distance need this.
// Backward with the gradient of a dense bias, 8 heads of 1024 queries and keys, takes 0.88 of the time in bfloat16, and
// 0.90 in float32 (AMX); 512 queries and keys take 0.92 and 0.96.
template <bool kWrites = false>
FA_INLINE void prefetch_scores(const TensorView& view, int64_t element_bytes, const QueryBlock& queries,
                               int64_t key_begin, int64_t key_end, int part, int parts) {
  constexpr int64_t kPage = 4096;
  if (view.data == nullptr || view.stride_col != 1 || (!kWrites && view.stride_row * element_bytes < kPage)) return;
  const int64_t bytes = (key_end - key_begin) * element_bytes;
  const int64_t end = queries.count * (part + 1) / parts;
  for (int64_t q = queries.count * part / parts; q < end; ++q) {
    const int64_t offset = queries.b * view.stride_batch + queries.h * view.stride_head +
                           (queries.begin + q) * view.stride_row + key_begin;
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine)
      prefetch_bytes<kWrites>(view.data, offset * element_bytes + byte);
  }
}

// The size of an element of a dense bias or of its gradient, whose type is the one of the inputs or the one of lanes.
template <class Policy>
FA_INLINE int64_t bias_element_bytes(const AttentionParams& p, DType dtype) {
  return dtype == p.dtype ? sizeof(typename Policy::Storage) : sizeof(typename Policy::Lane);
}

// Prefetches, part by part, for the queries of one block: what the next block of keys will read of the dense mask and
// of the dense bias, and where the current block of keys will write the gradient of the dense bias.
template <class Policy>
class MaskPrefetcher {
 public:
  // `keys` is the current block. It may be the last one of the keys up to `key_end`.
  MaskPrefetcher(const AttentionParams& p, const QueryBlock& queries, const KeyBlock& keys, int64_t key_end)
      : p_(p), queries_(queries), first_key_(keys.index[0]), next_begin_(keys.index[keys.count - 1] + 1) {
    next_end_ = key_end - next_begin_ < kBlockK ? key_end : next_begin_ + kBlockK;
    reads_ = next_begin_ < next_end_ && (p.mask.data != nullptr || p.bias.data != nullptr);
    writes_ = p.dbias.data != nullptr && p.dbias.stride_row != 0 && keys.contiguous;
  }

  // Prefetches part number `part` of `parts`.
  void prefetch(int part, int parts) const {
    if (reads_) {
      prefetch_scores(p_.mask, 1, queries_, next_begin_, next_end_, part, parts);
      prefetch_scores(p_.bias, bias_element_bytes<Policy>(p_, p_.bias_dtype), queries_, next_begin_, next_end_, part,
                      parts);
    }
    if (writes_) {
      prefetch_scores</*kWrites=*/true>(p_.dbias, bias_element_bytes<Policy>(p_, p_.dbias_dtype), queries_, first_key_,
                                        next_begin_, part, parts);
    }
  }

 private:
  const AttentionParams& p_;
  QueryBlock queries_;
  int64_t first_key_;              // of the current block
  int64_t next_begin_, next_end_;  // the keys of the next block
  bool reads_, writes_;
};

// Half of a typical second-level cache.
constexpr int64_t kCachedBytes = int64_t{1} << 20;

// The size of all keys and values of the call.
template <class Storage>
FA_INLINE int64_t key_value_bytes(const AttentionParams& p) {
  const int64_t row = (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(Storage));
  return p.batch * p.num_kv_heads * p.seqlen_k * row;
}

// The largest stride of a block of queries of the call.
template <class Lane>
FA_INLINE int64_t largest_stride(const AttentionParams& p) {
  return p.seqlen_q < kBlockQ ? round_up(p.seqlen_q, kLanes<Lane>) : kBlockQ;
}

// The memory for what depends on the current block of keys, in forward and in backward.
template <class Policy>
struct KeyScratch {
  using Lane = typename Policy::Lane;

  KeyBlock* keys;               // the current block
  RowsToMultiply<Policy> rows;  // the rows of its keys
  Lane* bias;                   // [key of the block][stride]
  Lane* products;               // [key of the block][stride]: query . key, if AMX multiplies; see adds_bias
  LaneInt<Lane>* dropout_keep;  // [key of the block][stride]: -1 = keep, 0 = drop
  VectorRange* ranges;          // [tile]: the vectors of queries that see a key of the tile

  // Takes the memory of all arrays out of the arena. `visits`: as for SummedRows.
  void layout(Arena& arena, const AttentionParams& p, int64_t visits) {
    keys = arena.take<KeyBlock>(1);
    rows.layout(arena, p, static_cast<int>(p.head_dim), visits);
    const int64_t tile = round_up(kBlockRows, kLanes<Lane>) * largest_stride<Lane>(p);
    products = arena.take<Lane>(Policy::kUsesAmx ? tile : 0);
    bias = arena.take<Lane>(p.bias.data != nullptr ? tile : 0);
    dropout_keep = arena.take<LaneInt<Lane>>(p.has_dropout ? tile : 0);
    ranges = arena.take<VectorRange>(kBlockK / kTileKeys);
    // The last tile reads rows behind the last key of the block, and hides their scores. Any numbers will do in these
    // rows, but the memory must be initialised.
    if (bias != nullptr && p.bias.data != nullptr) memset(bias, 0, tile * sizeof(Lane));
    if (dropout_keep != nullptr && p.has_dropout) memset(dropout_keep, 0, tile * sizeof(LaneInt<Lane>));
  }
};

// The ScoreInputs of one block of queries, but for the query and for what prepare_keys sets.
template <class Policy>
ScoreInputs<Policy> score_inputs(const AttentionParams& p, const RelativeBias<typename Policy::Lane>& relative,
                                 const QueryBlock& queries) {
  using Lane = typename Policy::Lane;
  ScoreInputs<Policy> in;
  in.stride = round_up(queries.count, kLanes<Lane>);
  in.depth = Policy::lanes_for(static_cast<int>(p.head_dim));
  in.scale = static_cast<Lane>(p.scale);
  in.softcap = static_cast<Lane>(p.softcap);
  if (relative.data != nullptr) {
    in.relative_bias = relative.data + queries.h * relative.stride_head + queries.begin + p.seqlen_k - 1;
  }
  // A tiny scale is zero or denormal as a lane, and would turn a hidden score into -inf * 0, which is NaN.
  in.raw = p.scale > 1e-30 && !(p.softcap > 0) && p.bias.data == nullptr && p.key_bias.data == nullptr &&
           p.relative_bias.data == nullptr;
  in.adds_bias = Policy::kUsesAmx && p.bias.data != nullptr && !(p.softcap > 0);
  if (in.adds_bias) in.scale = 1;
  return in;
}

// Prepares the current block of keys for compute_scores: puts its rows, its bias and its dropout bits into the scratch,
// and sets the pointers in `in`. With AMX, multiplies the keys by in.query.
template <class Policy>
FA_INLINE void prepare_keys(const AttentionParams& p, const Sequence& seq, const QueryBlock& queries,
                            const KeyScratch<Policy>& scratch, ScoreInputs<Policy>& in) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  const KeyBlock& keys = *scratch.keys;
  const int64_t kv_head = kv_head_of(p, queries.h);
  const int head_dim = static_cast<int>(p.head_dim);
  scratch.rows.find(row_source<Storage>(p, p.key, seq, queries.b, kv_head), keys, head_dim);
  in.keys = &keys;
  if constexpr (Policy::kUsesAmx) {
    multiply_keys_by_columns<Policy>(scratch.rows, keys.count, head_dim, in.query, in.stride, scratch.products);
    in.products = scratch.products;
  } else {
    in.key_rows = scratch.rows.rows;
  }
  if (p.bias.data != nullptr) {
    const auto load_bias = [&](auto* element) {
      using Element = std::remove_pointer_t<decltype(element)>;
      const Lane scale = static_cast<Lane>(p.scale);
      if constexpr (Policy::kUsesAmx) {
        if (in.adds_bias) {
          add_bias_to_products<Lane, Element>(p.bias, queries, keys, scale, scratch.bias, scratch.products);
          return;
        }
      }
      load_bias_tile<Lane, Element, false>(p.bias, queries, keys, scale, scratch.bias);
      in.bias = scratch.bias;
    };
    if (p.bias_dtype == p.dtype) {
      load_bias(static_cast<Storage*>(nullptr));  // the pointer selects the type of the elements
    } else {
      load_bias(static_cast<Lane*>(nullptr));
    }
  }
  if (p.key_bias.data != nullptr) in.key_bias = row_of<const Lane>(p.key_bias, queries.b, 0, 0);
  if (p.has_dropout) make_dropout_keep(p, queries, keys, scratch.dropout_keep);
}

}  // namespace
}  // namespace fused_attn::cpu
