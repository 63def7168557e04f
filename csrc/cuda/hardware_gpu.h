// The definitions that hardware.h lists, for a GPU. nvcc compiles this.
#pragma once
#include <stdexcept>
#include <string>

#include "runtime_gpu.h"

#define GPU_DEVICE __device__ __forceinline__
#define GPU_KERNEL static __global__
#define GPU_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define GPU_GRID_CONSTANT __grid_constant__
#define GPU_UNROLL _Pragma("unroll")
#define GPU_NO_UNROLL _Pragma("unroll 1")

namespace fused_attn::gpu {

using TensorMap = CUtensorMap;

constexpr bool kRunsOnCpu = false;

// The call with pointers that kernels can use. On a GPU, these are the caller's own. The emulation replaces them.
template <class Call>
const Call& on_device(const Call& call) {
  return call;
}

// How many multiprocessors the current device has.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw_error(error);
  return count;
}

// Throws if the current GPU cannot load the kernel: LastingError, or another error if the next call may succeed. To ask
// for the attributes of a kernel makes CUDA load it.
template <class... Parameters>
void check_loadable(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) throw_error(error);
}

// Launches a kernel on a stream, and returns what went wrong, or an empty text. The launch is asynchronous: errors
// while the kernel runs come later.
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  // CUDA gives a block more shared memory than this only if the kernel's attribute allows it.
  constexpr int kSharedBytesWithoutAsking = 48 * 1024;
  if (shape.most_shared_bytes > kSharedBytesWithoutAsking) {
    const std::string error =
        take_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.most_shared_bytes));
    if (!error.empty()) return error;
  }
  kernel<<<dim3(shape.grid_x, shape.grid_y, shape.grid_z), shape.threads, shape.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return take_error(cudaGetLastError());
}

}  // namespace fused_attn::gpu

#include "primitives_ptx.h"
