// Reads torch tensors without torch headers, through the function table that torch.Tensor publishes as
// __dlpack_c_exchange_api__. Only the part of that interface (DLPack 1.x) that this library uses is declared here;
// the layout is fixed for all of major version 1. A call costs tens of nanoseconds and takes no ownership.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fused_attn {

enum class ExchangeDevice : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum class ExchangeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

// Points into the tensor that it was read from: valid only while that tensor is alive and unchanged.
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

struct TorchTensors {
  PyTypeObject* type;  // torch.Tensor: read_tensor must not be given anything else
  PyTypeObject* parameter_type;
  const ExchangeApi* api;
};

// The GIL must be held. Not a function-local static: importing torch may release the GIL, and a second thread would then
// wait for the static's lock while holding the GIL that the first one needs.
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
  // Kept for the life of the process, like torch itself.
  cached = {reinterpret_cast<PyTypeObject*>(type.release().ptr()),
            reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr()), api};
  return cached;
}

}  // namespace fused_attn
