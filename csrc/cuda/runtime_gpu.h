// What host code needs of the CUDA runtime and the driver: errors as texts, functions of the driver, and the current
// device.
#pragma once
#include <cuda.h>  // types only: nothing links against libcuda
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace fused_attn::gpu {

// An error as a text, or an empty text if there is none. Clears the error, so that the next launch does not report it
// again. Throws OutOfMemory for a lack of memory.
inline std::string take_error(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  const std::string text = cudaGetErrorString(error);
  switch (error) {
    case cudaErrorMemoryAllocation: throw OutOfMemory("CUDA " + text);
    case cudaErrorInitializationError:
      return text +
             "; a process that was forked from one that had used CUDA cannot use CUDA: start it with the "
             "method spawn of torch.multiprocessing";
    default: return text;
  }
}

// Throws an error: LastingError if no later call of this process can succeed, and otherwise OutOfMemory or another
// std::runtime_error.
[[noreturn]] inline void throw_error(cudaError_t error) {
  const std::string text = take_error(error);
  switch (error) {
    case cudaErrorInitializationError:
    case cudaErrorStubLibrary:
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice: throw LastingError(text);
    default: throw std::runtime_error(text);
  }
}

// A function of the driver library libcuda. It is looked up at run time, so that this code loads on machines without a
// driver. `version` is the version of CUDA that introduced the function, such as 12000.
template <class Function>
class DriverFunction {
 public:
  constexpr DriverFunction(const char* name, unsigned version) : name_(name), version_(version) {}

  // The function, or null if it is not found. It is kept once it has been found. A failure is not kept, because its
  // cause may pass: the GPU may lack memory, for example.
  Function* get() {
    Function* function = found_.load(std::memory_order_relaxed);
    if (function == nullptr) found_ = function = find();
    return function;
  }

 private:
  Function* find() const {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name_, &function, version_, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name_, &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // clears the error
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<Function*>(function);
  }

  const char* const name_;
  const unsigned version_;
  std::atomic<Function*> found_{nullptr};
};

// Whether the process has a context on the device, or nobody can know.
inline bool has_context(int device) {
  static DriverFunction<decltype(cuDevicePrimaryCtxGetState)> get_state("cuDevicePrimaryCtxGetState", 7000);
  unsigned flags = 0;
  int is_active = 1;
  return get_state.get() == nullptr || get_state.get()(device, &flags, &is_active) != CUDA_SUCCESS || is_active != 0;
}

// Makes a device current while this object exists, and creates the device's context if this thread has none. Making
// tensor maps needs a context.
//
// Afterwards, the device that was current before is current again, unless the process has no context on it: to make it
// current would create one, which takes hundreds of megabytes of a GPU that the process may never use. torch leaves the
// current device alone in this case, too.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cudaError_t error = cudaGetDevice(&before_);
    if (error == cudaSuccess && (error = cudaSetDevice(device)) != cudaSuccess) restore();
    if (error != cudaSuccess) throw_error(error);
  }
  ~DeviceGuard() { restore(); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  // Clears the error of a failure, which the next launch would report otherwise.
  void restore() const {
    if (before_ != device_ && has_context(before_) && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }

  int device_ = 0;
  int before_ = 0;
};

}  // namespace fused_attn::gpu
