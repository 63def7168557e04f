#include "tensor_map_rules.h"

namespace fused_attn::gpu {
namespace {

constexpr int64_t kMaxSize = int64_t(1) << 32;
constexpr int64_t kMaxStrideBytes = int64_t(1) << 40;
constexpr int kMaxBox = 256;
constexpr int kAlignment = 16;

}  // namespace

std::string tensor_map_error(const TensorMapSpec& spec) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (spec.rank < 1 || spec.rank > TensorMapSpec::kMaxRank) return "rank " + text(spec.rank) + ", expected 1 to 5";
  if (uintptr_t(spec.base) % kAlignment) return "the tensor's address is not a multiple of 16 bytes";
  for (int i = 0; i < spec.rank; i++) {
    const std::string dimension = "dimension " + text(i);
    if (spec.sizes[i] < 1 || spec.sizes[i] > kMaxSize)
      return dimension + ": size " + text(spec.sizes[i]) + ", expected 1 to 2^32";
    if (spec.box[i] < 1 || spec.box[i] > kMaxBox)
      return dimension + ": box of " + text(spec.box[i]) + ", expected 1 to 256";
    if (i == 0) continue;
    if (spec.stride_bytes[i] % kAlignment)
      return dimension + ": stride of " + text(spec.stride_bytes[i]) + " bytes, expected a multiple of 16";
    // A dimension with one index may have any stride. All others need one that moves.
    const bool is_broadcast = spec.stride_bytes[i] == 0 && spec.sizes[i] > 1;
    if (spec.stride_bytes[i] < 0 || spec.stride_bytes[i] >= kMaxStrideBytes || is_broadcast)
      return dimension + ": stride of " + text(spec.stride_bytes[i]) + " bytes, expected less than 2^40, and not 0";
  }
  const int inner_bytes = spec.box[0] * element_bytes(spec.element);
  if (inner_bytes % kAlignment) return "the box's rows have " + text(inner_bytes) + " bytes, expected a multiple of 16";
  const int swizzle = spec.swizzle_bytes;
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128)
    return "swizzle of " + text(swizzle) + " bytes, expected 0, 32, 64 or 128";
  if (swizzle && inner_bytes > swizzle)
    return "the box's rows have " + text(inner_bytes) + " bytes, more than the swizzle's span of " + text(swizzle);
  return "";
}

}  // namespace fused_attn::gpu
