// What a tensor map is made of, and what the hardware does not accept about a tensor. Host code.
#pragma once
#include <cstdint>
#include <string>

namespace fused_attn::gpu {

enum class Element { kBf16, kF16, kF32 };

struct TensorMapSpec {
  static constexpr int kMaxRank = 5;

  void* base;  // address in global memory
  Element element;
  int rank;
  int64_t sizes[kMaxRank];         // [0]: of the contiguous dimension
  int64_t stride_bytes[kMaxRank];  // [0] is not read
  int box[kMaxRank];               // what one instruction moves
  int swizzle_bytes;               // 0, 32, 64 or 128
};

inline int element_bytes(Element element) { return element == Element::kF32 ? 4 : 2; }

// What the hardware does not accept about the tensor, or an empty text. The documentation of cuTensorMapEncodeTiled
// says it.
std::string tensor_map_error(const TensorMapSpec& spec);

}  // namespace fused_attn::gpu
