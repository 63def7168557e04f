// Which entries of a fragment survive dropout. One call of Philox decides about four neighbouring keys of one query
// (philox.h). In a fragment, these four entries lie in several threads. So these threads divide the calls among them,
// and exchange the resulting bits by shuffles.
#pragma once
#include "../common/philox.h"
#include "fragments.h"

namespace fused_attn::gpu {

// The inputs of Philox that are the same for a whole head.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  int32_t head;
  int32_t batch;

  GPU_DEVICE Dropout(const Params& p, int32_t of_batch, int32_t of_head)
      : seed(static_cast<uint64_t>(load_global(p.dropout_seed))),
        threshold(p.dropout_threshold),
        head(of_head),
        batch(of_batch) {}
  GPU_DEVICE Dropout(const Params& p, const HeadSlice& head_slice) : Dropout(p, head_slice.batch, head_slice.head) {}

  // Calls Philox once for four keys of one query. Bit i of the result is set if key 4 * group + i survives dropout.
  GPU_DEVICE uint32_t draw(int32_t query, int32_t group) const {
    const PhiloxWords words = philox(seed, group, query, head, batch);
    uint32_t bits = 0;
    GPU_UNROLL for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(words.word[i] >= threshold) << i;
    return bits;
  }
};

// Which entries of a thread's fragment survive dropout: bit 4 * (t % 8) + j of word t / 8 belongs to entry x[t][j].
template <int kTiles>
struct DropoutKeep {
  uint32_t words[(kTiles + 7) / 8];

  GPU_DEVICE bool has(int t, int j) const { return (words[t / 8] >> (4 * (t % 8) + j)) & 1; }
};

// Computes the bits of a fragment whose rows are queries. `first_query` is this thread's first query, and the columns
// are the keys from `first_key` on, a multiple of 8. Two neighbouring threads hold four keys of two queries in each
// tile. Each of the two threads calls Philox for one of these queries. All lanes of the warp call this.
template <int kTiles>
GPU_DEVICE DropoutKeep<kTiles> dropout_keep_of_query_rows(const Dropout& dropout, int32_t first_query,
                                                          int32_t first_key, Lane lane) {
  DropoutKeep<kTiles> dropout_keep;
  const bool is_odd = lane.q & 1;
  GPU_UNROLL for (int word = 0; word < (kTiles + 7) / 8; ++word) {
    uint32_t own = 0;
    GPU_NO_UNROLL for (int t = 0; t < min(8, kTiles - 8 * word); ++t) {  // an unrolled loop would spill registers
      const int32_t group = first_key / 4 + 2 * (8 * word + t) + lane.q / 2;
      own |= dropout.draw(first_query + (is_odd ? 8 : 0), group) << (4 * t);
    }
    // Four bits of a word belong to the four keys of a tile. An even thread has the entries of keys 0 and 1 (mask 3),
    // and an odd thread has those of keys 2 and 3 (mask C), both for two queries: bits 0 and 1 of four are for the
    // first query, bits 2 and 3 for the second one.
    const uint32_t other = shuffle_xor(own, 1);
    dropout_keep.words[word] =
        is_odd ? (other & 0xCCCCCCCCu) >> 2 | (own & 0xCCCCCCCCu) : (own & 0x33333333u) | (other & 0x33333333u) << 2;
  }
  return dropout_keep;
}

// Computes the bits of a fragment whose rows are keys. `first_key` is the first key of the fragment, a multiple of 16,
// and the columns are the queries from `first_query` on. Four threads hold four keys (g - g % 4 and the next three) of
// two queries, and the same for the keys 8 rows further down. Thread m of the four calls Philox for query m % 2, and
// for the keys that lie 8 * (m / 2) rows further down. All lanes of the warp call this.
template <int kTiles>
GPU_DEVICE DropoutKeep<kTiles> dropout_keep_of_key_rows(const Dropout& dropout, int32_t first_query, int32_t first_key,
                                                        Lane lane) {
  DropoutKeep<kTiles> dropout_keep;
  const int32_t m = lane.g % 4;
  GPU_UNROLL for (int word = 0; word < (kTiles + 7) / 8; ++word) {
    uint32_t own = 0;
    GPU_NO_UNROLL for (int t = 0; t < min(8, kTiles - 8 * word); ++t) {  // an unrolled loop would spill registers
      const int32_t query = first_query + 8 * (8 * word + t) + 2 * lane.q + m % 2;
      own |= dropout.draw(query, first_key / 4 + lane.g / 4 + 2 * (m / 2)) << (4 * t);
    }
    dropout_keep.words[word] = 0;
    GPU_UNROLL for (int j = 0; j < 4; ++j) {
      // Entry j needs what the lane whose m is j has drawn, and of that the bit of this thread's key m.
      const uint32_t of_j = shuffle(own, 4 * (lane.g - m + j) + lane.q);
      dropout_keep.words[word] |= (of_j >> m & 0x11111111u) << j;
    }
  }
  return dropout_keep;
}

// Applies dropout to a fragment, in place: entries that survive are multiplied by `factor`, all others become 0. With
// factor dropout_scale, this turns gradients by the probs after dropout into gradients by the probs before. With factor
// 1, it drops probs.
template <int kTiles>
GPU_DEVICE void drop(float (&x)[kTiles][4], const DropoutKeep<kTiles>& dropout_keep, float factor) {
  GPU_UNROLL for (int t = 0; t < kTiles; ++t) {
    GPU_UNROLL for (int j = 0; j < 4; ++j) x[t][j] = dropout_keep.has(t, j) ? x[t][j] * factor : 0.0f;
  }
}

}  // namespace fused_attn::gpu
