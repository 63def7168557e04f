// Makes tensor maps on a GPU, by a function of the driver library.
#include "tensor_map.h"

namespace fused_attn::gpu {
namespace {

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
  static DriverFunction<decltype(cuTensorMapEncodeTiled)> found("cuTensorMapEncodeTiled", 12000);
  const auto encode_tiled = found.get();
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
