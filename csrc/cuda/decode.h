// Attention of few queries to many keys, as in decoding against a cache: how rows and keys are divided among programs
// (blocks of threads). decode/kernel.h has the kernel, and merge_splits.h the one that merges the splits.
//
// Query heads of a head group read the same keys, so their queries are rows of the same tile. Row n of a head group is
// query n / group_size of query head n % group_size of the group. A program computes one split of the keys for one tile
// of rows.
#pragma once
#include "kernels.h"
#include "logits.h"
#include "splits.h"

namespace fused_attn::gpu {

constexpr int kMaxDecodeTiles = 2;  // MAX_DECODE_TILES of fused_attn/backends/cuda/splits.py
constexpr int kDecodeRows = 16;     // rows of a tile: those of one mma_m16n8k16
constexpr int kDecodeKeys = 16;     // keys that a warp visits in a step: the inner dimension of one mma_m16n8k16
// Keys are divided in rounds of this many keys, so that all warps of a program (at most four) have a step in a round.
constexpr int kDecodeRound = 4 * kDecodeKeys;

// What the decode kernels get besides Params. Of Params, they do not use what the preparation kernel writes: they read
// padding, mask and relative bias as the caller has given them. So only packed calls launch it, to clear rows of `out`.
struct DecodeParams {
  int32_t row_tiles;       // tiles of rows of the longest sequence
  const uint8_t* padding;  // (B, S), nonzero = padding; null = none
  int64_t padding_stride_batch;
  int64_t padding_stride_key;
  MaskSource mask;
};

// Launches decode_kernel for all tiles and splits. decode/head_dim_*.cu instantiates this function.
template <int kHeadDim>
void launch_decode(const Params& p, const DecodeParams& d, bool is_bf16, Stream stream);

// The keys begin ... end - 1, divided into splits: split n has keys first + n * keys_per_split and the following ones.
struct SplitKeys {
  int32_t begin;
  int32_t end;
  int32_t first;  // `begin`, rounded down to a multiple of kDecodeKeys
  int32_t keys_per_split;
  int32_t used_splits;  // how many splits have a key
};

// Divides the keys that the band shows to the tile of rows from first_row on. The result depends on the lengths of this
// sequence alone, so the bits of a row do not depend on the other sequences of the batch.
GPU_DEVICE SplitKeys split_keys(const Params& p, const HeadSlice& head_slice, int32_t first_row) {
  const int32_t first_query = first_row / p.group_size;
  const int32_t last_query = min((first_row + kDecodeRows - 1) / p.group_size, head_slice.seqlen_q - 1);
  const Diagonals band(p, head_slice);
  SplitKeys keys;
  keys.begin = clamp_to(band.first_key(first_query), 0, head_slice.seqlen_k);
  keys.end = clamp_to(band.last_key(last_query) + 1, keys.begin, head_slice.seqlen_k);
  keys.first = keys.begin / kDecodeKeys * kDecodeKeys;
  const int32_t count = keys.end == keys.begin ? 0 : keys.end - keys.first;
  const int32_t rounds = (count + kDecodeRound - 1) / kDecodeRound;
  keys.keys_per_split = (rounds + p.splits.count - 1) / p.splits.count * kDecodeRound;
  keys.used_splits = count == 0 ? 0 : (count + keys.keys_per_split - 1) / keys.keys_per_split;
  return keys;
}

}  // namespace fused_attn::gpu
