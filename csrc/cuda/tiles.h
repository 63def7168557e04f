// The tile sizes of every kernel, apart from the kernels. Each row says why it was chosen; those of forward on sm_90a
// have been measured.
#pragma once

namespace fused_attn::gpu {

// sm_80: kBlockM queries of a block of kWarps warps, kBlockN keys at a time. All fit the 99 KiB of shared memory that a
// block has on the smaller chips of the family (sm_86, sm_89, sm_120), not only the 163 KiB of sm_80.
template <int kHeadDim>
struct ForwardTileSm80 {
  // 32 rows a warp halve the traffic from shared memory for each multiplication. 64 keys then need more registers than
  // there are, from head dim 128 on, and with dropout from 96 on.
  static constexpr int kWarps = 4, kBlockM = 128, kBlockN = kHeadDim <= 64 ? 64 : 32;
};
template <>
struct ForwardTileSm80<256> {
  // The output takes 128 registers with 16 rows a warp already.
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 64;
};

// The kernel for dq: kBlockM queries of a block, kBlockN keys at a time.
template <int kHeadDim>
struct QueryGradientTileSm80 {
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 64;
};
template <>
struct QueryGradientTileSm80<256> {
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 32;  // 96 KiB with q, dout, k and v
};

// The kernel for dk and dv: kBlockN keys of a block, kBlockM queries at a time.
template <int kHeadDim>
struct KeyGradientTileSm80 {
  // 64 queries need more registers than there are: from head dim 128 on, and with dropout from 96 on.
  static constexpr int kWarps = 4, kBlockM = kHeadDim <= 64 ? 64 : 32, kBlockN = 64;
  static constexpr bool kSplitsGradients = false;
};
template <>
struct KeyGradientTileSm80<256> {
  // Both gradients would take 256 registers: four warps sum dk, four others dv.
  static constexpr int kWarps = 8, kBlockM = 32, kBlockN = 64;
  static constexpr bool kSplitsGradients = true;
};

// sm_90a: kConsumers warpgroups of 64 queries each, kBlockN keys at a time, kStages tiles of keys and as many of values
// in flight, and kQueryStages tiles of queries.
template <int kHeadDim, bool kHasDropout>
struct ForwardTileSm90 {
  static constexpr int kConsumers = 2, kBlockN = 128, kStages = 2, kQueryStages = 2;  // 192 KiB
};
template <bool kHasDropout>
struct ForwardTileSm90<64, kHasDropout> {
  // The output takes 32 registers, which leaves room for a third consumer, unless it has to draw numbers.
  static constexpr int kConsumers = kHasDropout ? 2 : 3, kBlockN = 128, kStages = 3, kQueryStages = 2;
};
template <bool kHasDropout>
struct ForwardTileSm90<256, kHasDropout> {
  // The output takes 128 registers; 192 KiB.
  static constexpr int kConsumers = 2, kBlockN = 64, kStages = 2, kQueryStages = 1;
};

// The fused backward: kBlockM queries at a time, tiles of queries and of dout in flight; and how many tiles of 8 queries
// have their lse (delta) loaded before the products that they belong to are waited for. More do not fit the registers.
// Measured on an H100: two buffers for tiles of dq instead of one, at the cost of two stages of queries, +-1 %.
template <int kHeadDim>
struct FusedBackwardTileSm90 {
  static constexpr int kBlockM = 64, kQStages = 4, kDoutStages = 2, kLseAhead = 4, kDeltaAhead = 4;
};
template <>
struct FusedBackwardTileSm90<64> {
  // 128 queries: each warpgroup then has rows of dq of its own, and reads each key for it once.
  static constexpr int kBlockM = 128, kQStages = 2, kDoutStages = 2, kLseAhead = 4, kDeltaAhead = 2;
};

// The kernel for dq: two consumer warpgroups of 64 queries each, kBlockN keys at a time.
template <int kHeadDim>
struct QueryGradientTileSm90 {
  static constexpr int kBlockN = 64, kStages = 2;
};
template <>
struct QueryGradientTileSm90<256> {
  static constexpr int kBlockN = 64, kStages = 1;  // 192 KiB with q, dout, k and v
};

// The kernel for dk and dv: kBlockM queries at a time, for two consumer warpgroups that have 64 keys each and sum both
// gradients, or have the same 64 keys and sum one gradient each.
template <int kHeadDim>
struct KeyGradientTileSm90 {
  static constexpr int kBlockM = 64, kStages = 2;
  static constexpr bool kSplitsGradients = kHeadDim > 128;  // both would take 256 registers
};

}  // namespace fused_attn::gpu
