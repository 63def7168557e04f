// Makes tensor maps on a GPU. cuTensorMapEncodeTiled belongs to the driver library libcuda. It is looked up at run
// time, so that this code loads on machines without a driver.
#include <atomic>

#include "tensor_map.h"

namespace fused_attn::gpu {
namespace {

using EncodeTiled = decltype(cuTensorMapEncodeTiled);

// The driver's function, or null if the driver is too old.
EncodeTiled* find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 12000;  // the version of CUDA that introduced the function
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled*>(function);
}

CUtensorMapDataType data_type(Element element) {
  switch (element) {
    case Element::kBf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Element::kF16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

CUtensorMapSwizzle swizzle(int bytes) {
  switch (bytes) {
    case 32: return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64: return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128: return CU_TENSOR_MAP_SWIZZLE_128B;
    default: return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

std::string encode_tensor_map(const TensorMapSpec& spec, TensorMap* map) {
  // Kept once it has been found. A failure is not kept, because its cause may pass: the GPU may lack memory, for example.
  static std::atomic<EncodeTiled*> found{nullptr};
  EncodeTiled* encode_tiled = found.load(std::memory_order_relaxed);
  if (encode_tiled == nullptr) found = encode_tiled = find_encode_tiled();
  if (encode_tiled == nullptr) return "the driver has no cuTensorMapEncodeTiled; expected one for CUDA 12.0 or later";
  if (std::string error = tensor_map_error(spec); !error.empty()) return error;
  cuuint64_t sizes[TensorMapSpec::kMaxRank], strides[TensorMapSpec::kMaxRank];
  cuuint32_t box[TensorMapSpec::kMaxRank], every[TensorMapSpec::kMaxRank];
  for (int i = 0; i < spec.rank; i++) {
    sizes[i] = cuuint64_t(spec.sizes[i]);
    box[i] = cuuint32_t(spec.box[i]);
    every[i] = 1;
    if (i > 0) strides[i - 1] = cuuint64_t(spec.stride_bytes[i]);
  }
  const CUresult result = encode_tiled(map, data_type(spec.element), cuuint32_t(spec.rank), spec.base, sizes, strides,
                                       box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle(spec.swizzle_bytes),
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled failed with " + std::to_string(result);
}

}  // namespace fused_attn::gpu
