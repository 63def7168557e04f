// The emulation's tensor map: what TMA needs to know of a tensor in global memory. The fields are the arguments of
// cuTensorMapEncodeTiled.
#pragma once
#include <cstdint>

namespace fused_attn::emulation {

struct alignas(64) TensorMap {
  static constexpr uint64_t kValid = 0x7e0507ab1ed;

  uint64_t valid = 0;    // kValid once encode_tensor_map has filled in the rest
  char* base = nullptr;  // handle of the first element
  bool is_float32 = false;
  bool is_bf16 = false;
  int element_bytes = 0;
  int rank = 0;
  int64_t sizes[5] = {};
  int64_t stride_bytes[5] = {};  // [0]: element_bytes
  int box[5] = {};               // elements that one instruction moves, in each dimension
  int swizzle_bytes = 0;         // 0, 32, 64, 128
};

}  // namespace fused_attn::emulation
