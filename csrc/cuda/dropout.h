// Which entries of a fragment survive dropout. One call of Philox decides about eight neighbouring keys of one query
// (philox.h). In a fragment, these eight entries lie in several threads. So these threads divide the calls among them,
// and exchange the resulting bits by shuffles.
#pragma once
#include "../common/philox.h"
#include "fragments.h"

namespace fused_attn::gpu {

// The inputs of Philox that are the same for a whole head.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // in the high half, where numbers are compared
  DropoutOrigin origin;
  int32_t head;
  int32_t batch;

  GPU_DEVICE Dropout(const Params& p, int32_t of_batch, int32_t of_head)
      : seed(static_cast<uint64_t>(load_global(p.dropout_seed))),
        threshold(p.dropout_threshold << 16),
        origin(p.dropout_origin),
        head(of_head + origin.head),
        batch(of_batch + origin.batch) {}
  GPU_DEVICE Dropout(const Params& p, const HeadSlice& head_slice) : Dropout(p, head_slice.batch, head_slice.head) {}

  // Calls Philox once for the eight keys of a group. Bit i of the result is set if key 8 * group + i survives dropout.
  GPU_DEVICE uint32_t draw(int32_t query, int32_t group) const {
    const PhiloxWords words = philox(seed, group + origin.key_group, query + origin.query, head, batch);
    uint32_t bits = 0;
    GPU_UNROLL for (int i = 0; i < 4; ++i) {
      bits |= static_cast<uint32_t>(words.word[i] << 16 >= threshold) << 2 * i;
      bits |= static_cast<uint32_t>(words.word[i] >= threshold) << (2 * i + 1);
    }
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
// are the keys from `first_key` on, a multiple of 8. Four neighbouring threads hold eight keys of two queries in each
// tile. Of two tiles, each of the four threads calls Philox for one query of one tile. All lanes of the warp call this.
template <int kTiles>
GPU_DEVICE DropoutKeep<kTiles> dropout_keep_of_query_rows(const Dropout& dropout, int32_t first_query,
                                                          int32_t first_key, Lane lane) {
  static_assert(kTiles % 2 == 0);
  DropoutKeep<kTiles> dropout_keep;
  const int32_t query = first_query + 8 * (lane.q % 2);
  const int32_t first_group = first_key / kPhiloxKeys + lane.q / 2;
  GPU_UNROLL for (int word = 0; word < (kTiles + 7) / 8; ++word) {
    uint32_t own = 0;
    GPU_NO_UNROLL for (int t = 0; t < min(8, kTiles - 8 * word); t += 2) {  // an unrolled loop would spill registers
      own |= dropout.draw(query, first_group + 8 * word + t) << (4 * t);
    }
    dropout_keep.words[word] = 0;
    GPU_UNROLL for (int m = 0; m < 4; ++m) {
      // Thread m has drawn for entries 2 * (m % 2) and the next one, of tile m / 2 of two. Of the eight bits that it
      // has drawn for them, two belong to the keys of this thread.
      const uint32_t of_m = shuffle(own, 4 * lane.g + m);
      dropout_keep.words[word] |= (of_m >> (2 * lane.q) & 0x03030303u) << (2 * m);
    }
  }
  return dropout_keep;
}

// Computes the bits of a fragment whose rows are keys. `first_key` is the first key of the fragment, a multiple of 16,
// and the columns are the queries from `first_query` on. Eight threads, which differ in g, hold eight keys of two
// queries in each tile, and the same for the keys 8 rows further down. Of two tiles, thread g calls Philox for query
// g % 2, and for the keys that lie 8 * (g / 2 % 2) rows further down, of tile g / 4. All lanes of the warp call this.
template <int kTiles>
GPU_DEVICE DropoutKeep<kTiles> dropout_keep_of_key_rows(const Dropout& dropout, int32_t first_query, int32_t first_key,
                                                        Lane lane) {
  static_assert(kTiles % 2 == 0);
  DropoutKeep<kTiles> dropout_keep;
  const int32_t query = first_query + 2 * lane.q + lane.g % 2 + 8 * (lane.g / 4);
  const int32_t group = first_key / kPhiloxKeys + lane.g / 2 % 2;
  GPU_UNROLL for (int word = 0; word < (kTiles + 7) / 8; ++word) {
    uint32_t own = 0;
    GPU_NO_UNROLL for (int t = 0; t < min(8, kTiles - 8 * word); t += 2) {  // an unrolled loop would spill registers
      own |= dropout.draw(query + 8 * (8 * word + t), group) << (4 * t);
    }
    dropout_keep.words[word] = 0;
    GPU_UNROLL for (int m = 0; m < 8; ++m) {
      // Thread m has drawn for entry m % 4 of tile m / 4 of two: entry j of a tile has query j % 2, and the key
      // 8 * (j / 2) rows further down. Of the eight bits that it has drawn for them, bit g belongs to this thread.
      const uint32_t of_m = shuffle(own, 4 * m + lane.q);
      dropout_keep.words[word] |= (of_m >> lane.g & 0x01010101u) << m;
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
