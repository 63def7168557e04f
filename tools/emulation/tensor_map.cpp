#include "tensor_map.h"

#include "cuda/tensor_map.h"

namespace fused_attn::gpu {

std::string encode_tensor_map(const TensorMapSpec& spec, TensorMap* map) {
  const std::string error = tensor_map_error(spec);
  if (!error.empty()) return error;
  *map = TensorMap{};
  map->valid = TensorMap::kValid;
  map->base = static_cast<char*>(spec.base);
  map->is_float32 = spec.element == Element::kF32;
  map->is_bf16 = spec.element == Element::kBf16;
  map->element_bytes = element_bytes(spec.element);
  map->rank = spec.rank;
  for (int i = 0; i < spec.rank; i++) {
    map->sizes[i] = spec.sizes[i];
    map->stride_bytes[i] = i == 0 ? map->element_bytes : spec.stride_bytes[i];
    map->box[i] = spec.box[i];
  }
  map->swizzle_bytes = spec.swizzle_bytes;
  return "";
}

}  // namespace fused_attn::gpu
