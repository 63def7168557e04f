// The tile sizes of every kernel, in a table apart from the kernels. Comments say why a size was chosen. The sizes of
// the plain forward kernels on sm_90a have been measured, except for head dim 192.
#pragma once

namespace fused_attn::gpu {

// The shared memory that a block of threads may have on the smaller chips of the family of sm_80 (sm_86, sm_89 and
// sm_120). The tiles of all kernels for sm_80 fit into it. sm_80 itself has 163 KiB.
constexpr int kMostSharedBytesSm80 = 99 * 1024;

// Forward on sm_80: a block of threads has kWarps warps and kBlockM queries, and visits kBlockN keys at a time.
template <int kHeadDim>
struct ForwardTileSm80 {
  // A warp has 32 queries instead of 16, so that each multiplication reads half as much shared memory. With head dim
  // 128, or with dropout and head dim 96, 64 keys would then need more registers than there are.
  static constexpr int kWarps = 4, kBlockM = 128, kBlockN = kHeadDim <= 64 ? 64 : 32;
};
template <>
struct ForwardTileSm80<256> {
  // Even with only 16 queries for each warp, acc takes 128 registers of each thread. So a block has fewer queries.
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 64;
};

// The kernel for dq: a block has kBlockM queries, and visits kBlockN keys at a time.
template <int kHeadDim>
struct QueryGradientTileSm80 {
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 64;
};
template <>
struct QueryGradientTileSm80<256> {
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 32;  // 96 KiB with q, dout, k and v
};

// The kernel for dk and dv: a block has kBlockN keys, and visits kBlockM queries at a time.
template <int kHeadDim>
struct KeyGradientTileSm80 {
  // With head dim 128, or with dropout and head dim 96, 64 queries would need more registers than there are.
  static constexpr int kWarps = 4, kBlockM = kHeadDim <= 64 ? 64 : 32, kBlockN = 64;
  static constexpr bool kSplitsGradients = false;
};
template <>
struct KeyGradientTileSm80<192> {
  // With values of head dim 128, both gradients would take 160 registers of each thread, and ptxas spilled some. So
  // four warps sum dk, and four other warps sum dv.
  static constexpr int kWarps = 8, kBlockM = 64, kBlockN = 64;
  static constexpr bool kSplitsGradients = true;
};
template <>
struct KeyGradientTileSm80<256> {
  // Both gradients would take 256 registers. So they are split in the same way.
  static constexpr int kWarps = 8, kBlockM = 32, kBlockN = 64;
  static constexpr bool kSplitsGradients = true;
};

// The kernel for the gradient of a bias: a block of threads sums one tile of gradients, of kBlockM queries and kBlockN
// keys, over many tiles of scores of this size. A larger tile reads less of the inputs for each product.
template <int kHeadDim>
struct BiasGradientTileSm80 {
  static constexpr int kWarps = 8, kBlockM = 128, kBlockN = 64;
};
template <>
struct BiasGradientTileSm80<96> {
  // With this head dim, four threads load the chunks of a row (TileLayout::kGroup). 8 warps would load 64 rows at once,
  // but copy_rows allows at most 32.
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 64;
};
template <>
struct BiasGradientTileSm80<192> {
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 64;  // 80 KiB with values of head dim 128
};
template <>
struct BiasGradientTileSm80<256> {
  static constexpr int kWarps = 4, kBlockM = 64, kBlockN = 32;  // 96 KiB with q, dout, k and v
};

// Forward on sm_90a: kConsumers warpgroups have 64 queries each, and visit kBlockN keys at a time. Shared memory holds
// kStages tiles of keys, as many tiles of values, and kQueryStages tiles of queries. For a dense bias, there are
// kBiasStages tiles of 64 queries for each consumer.
template <int kHeadDim, bool kIsGeneral>
struct ForwardTileSm90 {
  static constexpr int kConsumers = 2, kBlockN = 128, kStages = 2, kQueryStages = 2;  // 192 KiB
  static constexpr int kBiasStages = 1;                                               // 32 KiB
};
template <bool kIsGeneral>
struct ForwardTileSm90<64, kIsGeneral> {
  // acc takes 32 registers. This leaves room for a third consumer. In a general kernel there is no room, because its
  // consumers compute dropout and load biases.
  static constexpr int kConsumers = kIsGeneral ? 2 : 3, kBlockN = 128, kStages = 3, kQueryStages = 2;
  static constexpr int kBiasStages = 2;
};
template <bool kIsGeneral>
struct ForwardTileSm90<192, kIsGeneral> {
  // For values with head dim 128: the tiles take 208 KiB. In a general kernel, those of 128 keys leave no room for a
  // bias. With 64 keys, all take 144 KiB.
  static constexpr int kConsumers = 2, kBlockN = kIsGeneral ? 64 : 128, kStages = 2, kQueryStages = 1;
  static constexpr int kBiasStages = 1;
};
template <bool kIsGeneral>
struct ForwardTileSm90<256, kIsGeneral> {
  // acc takes 128 registers, and the tiles take 192 KiB. Those of a bias take 16 KiB. With two stages of them, ptxas
  // spilled 8 bytes, so there is one.
  static constexpr int kConsumers = 2, kBlockN = 64, kStages = 2, kQueryStages = 1, kBiasStages = 1;
};

// Keys in pages are loaded in pieces of at least this many rows on sm_90a: eight rows, after which the pattern of TMA's
// swizzle repeats. So the size of a page has to be a multiple of this number.
constexpr int kLeastPieceRows = 8;

// The queries of a consumer, because wgmma multiplies 64 rows, and those of a tile of forward on sm_90a.
constexpr int kConsumerRows = 64;
template <int kHeadDim, bool kIsGeneral>
constexpr int kForwardRowsSm90 = kConsumerRows * ForwardTileSm90<kHeadDim, kIsGeneral>::kConsumers;

// A tile of forward on sm_90a has at least this many queries.
constexpr int kLeastForwardRowsSm90 = 128;

// The queries that the fused backward visits at a time. With 128 queries, the two warpgroups can divide the rows of a
// tile of dq between them, and each reads the keys once for its rows. For larger head dims, and for what a general
// kernel does, there are too few registers for 128 queries.
constexpr int fused_backward_rows(int head_dim, bool is_general) { return head_dim == 64 && !is_general ? 128 : 64; }

// The fused backward visits kBlockM queries at a time. Shared memory holds kQStages tiles of queries and kDoutStages
// tiles of dout. Of the lse (delta) of a tile, 8 * kLseAhead (8 * kDeltaAhead) numbers are loaded before the kernel
// waits for the product that needs them. More do not fit into registers. An alternative was measured on an H100: two
// buffers for tiles of dq instead of one, at the cost of two stages of queries, is within 1 %. In a general kernel, a
// tile of the bias comes with each tile of dout. With head dims above 64, these tiles take the memory of two stages of
// queries. So two stages are left, also in calls without a bias. How fast two are has not been measured.
template <int kHeadDim, bool kIsGeneral>
struct FusedBackwardTileSm90 {
  static constexpr int kBlockM = fused_backward_rows(kHeadDim, kIsGeneral), kDoutStages = 2;
  static constexpr int kQStages = kIsGeneral && kHeadDim > 64 ? 2 : 4, kLseAhead = 4, kDeltaAhead = 4;
};
template <>
struct FusedBackwardTileSm90<64, false> {
  static constexpr int kBlockM = fused_backward_rows(64, false);
  static constexpr int kQStages = 2, kDoutStages = 2, kLseAhead = 4, kDeltaAhead = 2;
};

// Backward in two kernels, with head dims above 128. In the kernel for dq, two consumer warpgroups have 64 queries
// each, and visit kBlockN keys at a time.
template <int kHeadDim, bool kIsGeneral>
struct QueryGradientTileSm90 {
  static constexpr int kBlockN = 64, kStages = 1;  // 192 KiB with q, dout, k and v
};
template <bool kIsGeneral>
struct QueryGradientTileSm90<192, kIsGeneral> {
  static constexpr int kBlockN = 64, kStages = 2;  // 160 KiB with values of head dim 128
};
template <>
struct QueryGradientTileSm90<256, true> {
  // dq takes 128 registers. This leaves too few for the scores of 64 keys and for what is added to them.
  static constexpr int kBlockN = 32, kStages = 2;
};

// The kernel for dk and dv visits kBlockM queries at a time. Both gradients would take 256 registers. So its two
// consumer warpgroups have the same 64 keys, and each sums one gradient, which takes 128 registers. This leaves too few
// for what a general kernel does with the scores of 64 queries.
template <int kHeadDim, bool kIsGeneral>
struct KeyGradientTileSm90 {
  static constexpr int kBlockM = kIsGeneral ? 32 : 64, kStages = 2;
};
template <bool kIsGeneral>
struct KeyGradientTileSm90<192, kIsGeneral> {
  // dk takes 96 registers, and dv 64 with values of head dim 128. So a general kernel has room for 64 queries, too.
  static constexpr int kBlockM = 64, kStages = 2;
};

// The kernel for the gradient of a bias: a block of threads sums one tile of gradients, of kBlockM queries and kBlockN
// keys, over many tiles of scores of this size. Shared memory holds kSlots slots, of which a tile of scores takes two.
// An estimate for an H100, with head dim 128 and many tiles for each block, without the reads of the bias: a tile of
// scores needs 128 KiB for 8.4 million operations. The L2 cache gives about 42 bytes in a nanosecond to each
// multiprocessor, which makes 360 TFLOP/s.
template <int kHeadDim>
struct BiasGradientTileSm90 {
  static constexpr int kBlockM = 128, kBlockN = 128, kSlots = kHeadDim == 64 ? 4 : 3;  // 128 or 192 KiB
};
template <>
struct BiasGradientTileSm90<192> {
  static constexpr int kBlockM = 128, kBlockN = 128, kSlots = 2;  // 192 KiB
};
template <>
struct BiasGradientTileSm90<256> {
  static constexpr int kBlockM = 128, kBlockN = 64, kSlots = 2;  // 192 KiB
};

}  // namespace fused_attn::gpu
