// What a tensor map is made from, and the rules of the hardware for it. Host code, also for the emulation.
#pragma once
#include <cstdint>
#include <string>

namespace fused_attn::gpu {

enum class Element { kBf16, kF16, kF32 };

// A tensor of `rank` dimensions, and the box of it that one TMA instruction moves. Dimension 0 is contiguous.
struct TensorMapSpec {
  static constexpr int kMaxRank = 5;

  void* base;  // address in global memory
  Element element;
  int rank;
  int64_t sizes[kMaxRank];         // entries in each dimension
  int64_t stride_bytes[kMaxRank];  // [0] is not read, because dimension 0 is contiguous
  int box[kMaxRank];               // entries in each dimension that one instruction moves
  int swizzle_bytes;               // 0, 32, 64 or 128
};

inline int element_bytes(Element element) { return element == Element::kF32 ? 4 : 2; }

// What the hardware does not accept about the tensor, or an empty text. The rules are those in the documentation of
// cuTensorMapEncodeTiled.
std::string tensor_map_error(const TensorMapSpec& spec);

}  // namespace fused_attn::gpu
