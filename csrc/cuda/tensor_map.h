// Makes tensor maps, by which TMA knows a tensor. Host code.
#pragma once
#include <string>

#include "hardware.h"
#include "tensor_map_rules.h"

namespace fused_attn::gpu {

// Returns what is wrong, or an empty text; then `map` is ready.
std::string encode_tensor_map(const TensorMapSpec& spec, TensorMap* map);

}  // namespace fused_attn::gpu
