// L2 groups: how many heads run side by side, so that the tensors that they share stay in the L2 cache.
#pragma once
#include <algorithm>
#include <cstdint>

#include "workspace_needs.h"

namespace fused_attn::gpu {

// The keys and values of all heads of an L2 group have about this many bytes (forward). With four times as many, all
// would fit into the L2 cache, but programs that share keys then start further apart. Measured on an H100, (32, 16,
// 512, 128): 8 MiB 491 TFLOP/s, 32 MiB 380. From 2048 keys on, both are equal.
constexpr int64_t kL2Bytes = 8 << 20;
// The same for backward: bytes of queries, keys, values and dout. With several blocks of keys, the sums of dq take as
// many bytes again. Measured on an H100, (8, 16, 2048, 128): 20 MiB 490 TFLOP/s, 128 MiB 313. The fused backward reads
// keys and values once, so they count like those of as many keys as queries at most.
constexpr int64_t kBackwardL2Bytes = 12 << 20;

// The heads that run side by side (Params::heads_per_l2_group). head_dim: that of the tensors
inline int32_t heads_per_l2_group(const WorkspaceNeeds& needs, int64_t head_dim) {
  const int64_t group_size = needs.num_heads / needs.num_kv_heads;
  const int64_t row_bytes = head_dim * 2 * 2, kv_bytes = std::max<int64_t>(needs.seqlen_k, 1) * row_bytes;
  const int64_t q_bytes = needs.seqlen_q * row_bytes;
  const int64_t once_read = is_fused_backward(needs) ? std::min(kv_bytes, q_bytes) : kv_bytes;
  const int64_t heads = needs.is_backward ? kBackwardL2Bytes / std::max<int64_t>(once_read + group_size * q_bytes, 1)
                                          : kL2Bytes * group_size / kv_bytes;
  return static_cast<int32_t>(std::clamp<int64_t>(heads, 1, needs.num_heads * needs.batch));
}

}  // namespace fused_attn::gpu
