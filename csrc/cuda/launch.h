// Launches a kernel, on a GPU or in the emulation. Host code.
#pragma once
#include <cstdint>
#include <string>

#include "primitives.h"

#if defined(FUSED_ATTN_EMULATION)
#include "emulation/launch.h"
#endif

namespace fused_attn::gpu {

struct LaunchShape {
  int grid_x, grid_y, grid_z;  // blocks
  int threads;                 // of a block
  int shared_bytes;            // dynamic
};

#if defined(__CUDACC__)

// Returns what went wrong, or an empty text. The launch is asynchronous.
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  constexpr int kSharedBytesWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would find it
      return cudaGetErrorString(error);
    }
  }
  kernel<<<dim3(shape.grid_x, shape.grid_y, shape.grid_z), shape.threads, shape.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#elif defined(FUSED_ATTN_EMULATION)

// The stream is not read: the kernel has ended when this returns. Its text then tells what the emulation found.
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchShape& shape, void*, const Arguments&... arguments) {
  return emulation::launch({{shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, uint32_t(shape.shared_bytes)},
                           emulation::session_options(), &emulation::session_statistics(),
                           [&] { kernel(arguments...); });
}

#endif

}  // namespace fused_attn::gpu
