// Makes tensor maps: descriptions of a tensor (address, sizes, strides, box) that TMA instructions take. Host code.
#pragma once
#include <string>

#include "hardware.h"
#include "tensor_map_rules.h"

namespace fused_attn::gpu {

// Writes the tensor map to `map` and returns an empty text, or returns what the hardware does not accept.
std::string encode_tensor_map(const TensorMapSpec& spec, TensorMap* map);

}  // namespace fused_attn::gpu
