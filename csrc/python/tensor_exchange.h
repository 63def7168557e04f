// Reads the metadata of torch tensors through the table of C functions that torch.Tensor publishes as
// __dlpack_c_exchange_api__ (DLPack 1.x). Reading a tensor takes tens of nanoseconds.
//
// The types below repeat the types of that interface that this library uses. They are not included from torch's
// ATen/dlpack.h, because the package is built without torch: the build runs in an isolated environment, and one build
// serves all versions of torch. DLPack fixes the layout of these types for all of major version 1, and
// tests/backends/cpu/test_tensor_exchange.py compares it with torch's header.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fused_attn {

// The values of DLDeviceType and DLDataTypeCode that this library knows.
enum class ExchangeDevice : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum class ExchangeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

// DLTensor: the metadata of a tensor. The pointers point into the torch tensor, so they are valid only while that
// tensor is alive and its shape does not change.
struct ExchangeTensor {
  void* data;  // null when the tensor has no element
  ExchangeDevice device;
  int32_t device_index;
  int32_t ndim;
  ExchangeCode code;
  uint8_t bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// DLPackExchangeAPI: the table of functions. Functions that this library does not call are declared as plain pointers.
struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  const ExchangeApi* previous;  // the table of an older major version, or null
  void* make_tensor;
  void* own_tensor;
  void* wrap_tensor;
  int (*read_tensor)(void* object, ExchangeTensor* out);  // -1: a Python exception is set
  int (*current_stream)(ExchangeDevice device, int32_t index, void** stream);
};

// What is needed of torch to read tensors.
struct TorchTensors {
  PyTypeObject* type;            // torch.Tensor; read_tensor must only be called with tensors
  PyTypeObject* parameter_type;  // torch.nn.Parameter
  const ExchangeApi* api;
};

// Imports torch at the first call and returns its function table. The caller must hold the GIL. The cache is not
// initialised by its declaration, because C++ would lock that initialisation: the import may release the GIL, a second
// thread could then wait for the lock while it holds the GIL, and the first thread would wait for the GIL forever.
inline const TorchTensors& torch_tensors() {
  static TorchTensors cached{nullptr, nullptr, nullptr};
  if (cached.api != nullptr) return cached;

  namespace py = pybind11;
  const py::module_ torch = py::module_::import("torch");
  py::object type = torch.attr("Tensor");
  py::object parameter_type = torch.attr("nn").attr("Parameter");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__"))
    throw py::import_error("fused_attn needs torch >= 2.11: torch.Tensor has no __dlpack_c_exchange_api__");
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major != 1) api = api->previous;
  if (api == nullptr || api->read_tensor == nullptr)
    throw py::import_error("this version of torch offers no DLPack 1.x exchange table, which fused_attn needs");
  // The references are never given up, because torch is never unloaded.
  cached = {reinterpret_cast<PyTypeObject*>(type.release().ptr()),
            reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr()), api};
  return cached;
}

}  // namespace fused_attn
