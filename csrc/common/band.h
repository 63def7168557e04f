// The band of visible keys, which describes causal masks and sliding windows, for host and device code.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace fused_attn {
namespace {  // internal linkage, because each instruction set compiles a copy of these functions that only it can run

// Key j is visible to query i if -left <= j - (i + offset) <= right. A side without a bound is kUnbounded
// (attention_params.h), a number so small that the sums below do not overflow.
struct Band {
  int64_t left;
  int64_t right;
  int64_t offset;

  // The first and the last key that query i sees. The caller must clip them to [0, seqlen_k).
  FUSED_ATTN_HOST_DEVICE int64_t first_key(int64_t i) const { return i + offset - left; }
  FUSED_ATTN_HOST_DEVICE int64_t last_key(int64_t i) const { return i + offset + right; }

  // The first and the last query that see key j. The caller must clip them to [0, seqlen_q).
  FUSED_ATTN_HOST_DEVICE int64_t first_query(int64_t j) const { return j - offset - right; }
  FUSED_ATTN_HOST_DEVICE int64_t last_query(int64_t j) const { return j - offset + left; }

  // Whether every query of [i_first, i_last] sees every key of [j_first, j_last].
  FUSED_ATTN_HOST_DEVICE bool all_visible(int64_t i_first, int64_t i_last, int64_t j_first, int64_t j_last) const {
    return first_key(i_last) <= j_first && j_last <= last_key(i_first);
  }
};

}  // namespace
}  // namespace fused_attn
