// Stands in for the CUDA runtime and the driver: it records launches, and runs no kernel. test_host_code.py links it
// with the object files of the build. So the host code that nvcc has compiled runs without a GPU.
//
// The types are those of CUDA's headers, as far as the host code sees them. So no toolkit is needed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidDeviceFunction = 98;
constexpr int kFound = 0, kNotFound = 1;        // cudaDriverEntryPointQueryResult
constexpr int kMaxDynamicSharedMemorySize = 8;  // cudaFuncAttribute
constexpr int kMultiprocessorCount = 16;        // cudaDeviceAttr
constexpr int kMultiprocessors = 3;             // few, so that blocks of threads take several tiles
constexpr uintptr_t kTensorMapAlignment = 64, kTensorMapBytes = 128;

struct Dim3 {
  unsigned x, y, z;
};

// A kernel, as the host code has registered it.
struct Kernel {
  std::string name;
  int shared_limit = 0;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> of_host_functions;
  return of_host_functions;
}

std::string text;  // what the functions at the end of this file return

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Configuration configuration;

// Adds a line "name grid.x grid.y grid.z threads shared_bytes shared_limit" for each launch.
std::string launches;

int record(const void* function, Dim3 grid, Dim3 block, size_t shared) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return kInvalidDeviceFunction;
  launches += found->second.name;
  for (const uint64_t number :
       {uint64_t{grid.x}, uint64_t{grid.y}, uint64_t{grid.z}, uint64_t{block.x} * block.y * block.z, uint64_t{shared},
        static_cast<uint64_t>(found->second.shared_limit)})
    launches += " " + std::to_string(number);
  launches += "\n";
  return kSuccess;
}

// Adds a line "accepted type address dims[4] strides[3] box[4] swizzle" for each call of cuTensorMapEncodeTiled.
std::string tensor_maps;

// Whether cuTensorMapEncodeTiled accepts these arguments, by its documentation in cuda.h, as far as host code needs it:
// 16-bit numbers in four dimensions, without an interleaved layout.
bool is_tensor_map(const void* map, int type, unsigned rank, const void* address, const uint64_t* dims,
                   const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                   int swizzle, int l2_promotion, int oob_fill) {
  constexpr int kFloat16 = 6, kBfloat16 = 9;       // CUtensorMapDataType
  constexpr uint32_t kSpans[] = {0, 32, 64, 128};  // of CUtensorMapSwizzle, in bytes
  const auto address_of = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if (address_of(map) % kTensorMapAlignment != 0 || (type != kFloat16 && type != kBfloat16) || rank != 4) return false;
  if (address == nullptr || address_of(address) % 16 != 0) return false;
  for (int i = 0; i < 4; ++i) {
    if (dims[i] < 1 || dims[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256 || element_strides[i] != 1)
      return false;
    if (i < 3 && (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40)) return false;
  }
  if (interleave != 0 || swizzle < 0 || swizzle > 3 || l2_promotion < 0 || l2_promotion > 3 || oob_fill != 0)
    return false;
  const uint32_t row_bytes = 2 * box[0];
  return row_bytes % 16 == 0 && (swizzle == 0 || row_bytes <= kSpans[swizzle]);
}

int encode_tensor_map(void* map, int type, unsigned rank, void* address, const uint64_t* dims, const uint64_t* strides,
                      const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle,
                      int l2_promotion, int oob_fill) {
  const bool is_accepted = is_tensor_map(map, type, rank, address, dims, strides, box, element_strides, interleave,
                                         swizzle, l2_promotion, oob_fill);
  const auto add = [](auto number) { tensor_maps += std::to_string(number) + " "; };
  for (const uint64_t number : {uint64_t{is_accepted}, uint64_t(type), uint64_t(reinterpret_cast<uintptr_t>(address))})
    add(number);
  for (int i = 0; i < 4; ++i) add(dims[i]);
  for (int i = 0; i < 3; ++i) add(strides[i]);
  for (int i = 0; i < 4; ++i) add(box[i]);
  tensor_maps += std::to_string(swizzle) + "\n";
  if (!is_accepted) return kInvalidValue;
  memset(map, 0, kTensorMapBytes);
  return kSuccess;
}

int primary_context_state(int, unsigned*, int* is_active) {
  *is_active = 1;
  return kSuccess;
}

int find_function(const char* name, void** function, int* result) {
  *function = nullptr;
  if (!strcmp(name, "cuTensorMapEncodeTiled")) *function = reinterpret_cast<void*>(encode_tensor_map);
  if (!strcmp(name, "cuDevicePrimaryCtxGetState")) *function = reinterpret_cast<void*>(primary_context_state);
  *result = *function != nullptr ? kFound : kNotFound;
  return kSuccess;
}

}  // namespace

extern "C" {

// ---- What nvcc puts into host code: it registers kernels, and launches them

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[host_function].name = name;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void**, size_t shared, void*) {
  return record(kernel, grid, block, shared);
}
int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void**, size_t shared, void*) {
  return record(function, grid, block, shared);
}

// ---- What runtime_gpu.h and hardware_gpu.h call

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end() || attribute != kMaxDynamicSharedMemorySize) return kInvalidValue;
  found->second.shared_limit = value;
  return kSuccess;
}
int cudaFuncGetAttributes(void*, const void* function) {
  return kernels().count(function) != 0 ? kSuccess : kInvalidDeviceFunction;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = kMultiprocessors;
  return attribute == kMultiprocessorCount ? kSuccess : kInvalidValue;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaSetDevice(int) { return kSuccess; }
int cudaGetLastError() { return kSuccess; }
const char* cudaGetErrorString(int) { return "an error of the stand-in"; }
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* result) {
  return find_function(name, function, result);
}
int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long, int* result) {
  return find_function(name, function, result);
}
}

// In the host's copy of a device function, nvcc puts a call of exit. The linker finds this function for it. An
// exception would not pass through such a copy, which must not throw. Python prints the stack of an abort.
void exit_of_device_function(int) __asm__("exit");
__attribute__((visibility("hidden"))) void exit_of_device_function(int) {
  fputs("host code called a device function\n", stderr);
  abort();
}

// ---- For the tests

namespace fused_attn::gpu {
bool runs_on_cpu() { return true; }  // so that Python may pass tensors on the CPU
}  // namespace fused_attn::gpu

// The launches since the last call of this function.
EXPORT const char* recorded_launches() {
  text.swap(launches);
  launches.clear();
  return text.c_str();
}
// The tensor maps since the last call of this function.
EXPORT const char* recorded_tensor_maps() {
  text.swap(tensor_maps);
  tensor_maps.clear();
  return text.c_str();
}
// What is_tensor_map says about a tensor map without an interleaved layout.
EXPORT int tensor_map_is_accepted(int type, uint64_t address, const uint64_t* dims, const uint64_t* strides,
                                  const uint32_t* box, int swizzle) {
  alignas(kTensorMapAlignment) char map[kTensorMapBytes];
  constexpr uint32_t kEvery[] = {1, 1, 1, 1};
  return is_tensor_map(map, type, 4, reinterpret_cast<void*>(address), dims, strides, box, kEvery, 0, swizzle, 0, 0);
}
// The names of all kernels.
EXPORT const char* registered_kernels() {
  text.clear();
  for (const auto& [function, kernel] : kernels()) text += kernel.name + "\n";
  return text.c_str();
}
