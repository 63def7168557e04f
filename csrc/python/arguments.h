// Tensors that Python passes: read, then checked against what the problem expects of each.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "../common/attention_params.h"
#include "tensor_exchange.h"

namespace fused_attn {

namespace py = pybind11;

enum class ElementType { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kInt32, kInt64, kOther };

inline const char* name_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat32: return "float32";
    case ElementType::kFloat64: return "float64";
    case ElementType::kFloat16: return "float16";
    case ElementType::kBFloat16: return "bfloat16";
    case ElementType::kBool: return "bool";
    case ElementType::kInt32: return "int32";
    case ElementType::kInt64: return "int64";
    case ElementType::kOther: break;
  }
  return "another type";
}

inline ElementType element_type(const ExchangeTensor& tensor) {
  if (tensor.lanes != 1) return ElementType::kOther;
  switch (tensor.code) {
    case ExchangeCode::kFloat:
      if (tensor.bits == 32) return ElementType::kFloat32;
      if (tensor.bits == 64) return ElementType::kFloat64;
      if (tensor.bits == 16) return ElementType::kFloat16;
      break;
    case ExchangeCode::kBFloat:
      if (tensor.bits == 16) return ElementType::kBFloat16;
      break;
    case ExchangeCode::kBool:
      if (tensor.bits == 8) return ElementType::kBool;
      break;
    case ExchangeCode::kInt:
      if (tensor.bits == 32) return ElementType::kInt32;
      if (tensor.bits == 64) return ElementType::kInt64;
      break;
    case ExchangeCode::kUInt: break;
  }
  return ElementType::kOther;
}

inline DType kernel_dtype(ElementType type) {
  switch (type) {
    case ElementType::kFloat64: return DType::kFloat64;
    case ElementType::kFloat16: return DType::kFloat16;
    case ElementType::kBFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

inline std::string shape_text(const int64_t* shape, int64_t ndim) {
  std::string text = "(";
  for (int64_t i = 0; i < ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

struct Argument {
  const char* name;
  bool given = false;
  ElementType type = ElementType::kOther;
  ExchangeTensor tensor{};

  int64_t size(int dim) const { return tensor.shape[dim]; }
  int64_t stride(int dim) const { return tensor.strides[dim]; }
  char* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
  }

  void check_type(ElementType expected) const {
    if (type != expected) fail(name_of(expected), name_of(type));
  }

  void check_shape(std::initializer_list<int64_t> expected) const {
    bool equal = tensor.ndim == static_cast<int32_t>(expected.size());
    for (int32_t i = 0; equal && i < tensor.ndim; ++i) equal = size(i) == expected.begin()[i];
    if (!equal)
      fail("shape " + shape_text(expected.begin(), static_cast<int64_t>(expected.size())),
           "shape " + shape_text(tensor.shape, tensor.ndim));
  }

  void check_unit_stride(int dim) const {
    if (stride(dim) != 1 && size(dim) > 1)
      fail("stride 1 in dimension " + std::to_string(dim), "stride " + std::to_string(stride(dim)));
  }

  // (batch, head, row, column), elements of a row side by side.
  TensorView rows_view() const {
    if (!given) return {};
    check_unit_stride(3);
    return {data(), stride(0), stride(1), stride(2), 1};
  }

  // (batch, head, row, column), any strides; a dimension of size 1 stands for `expected` equal entries.
  TensorView scores_view(const int64_t (&expected)[4]) const {
    bool fits = tensor.ndim == 4;
    for (int dim = 0; fits && dim < 4; ++dim) fits = size(dim) == 1 || size(dim) == expected[dim];
    if (!fits)
      fail("a shape that broadcasts to " + shape_text(expected, 4), "shape " + shape_text(tensor.shape, tensor.ndim));
    const auto step = [&](int dim) { return size(dim) == expected[dim] ? stride(dim) : 0; };
    return {data(), step(0), step(1), step(2), step(3)};
  }
};

// Where the tensors of a call have to be. On a GPU their contents are left alone: the host would have to wait for it.
struct Reader {
  ExchangeDevice device;
  int32_t device_index = -1;  // -1: any

  bool may_look_inside() const { return device == ExchangeDevice::kCpu; }
  Argument required(PyObject* object, const char* name) const;
  Argument optional(PyObject* object, const char* name) const {
    return object == Py_None ? Argument{name} : required(object, name);
  }
};

inline Argument Reader::required(PyObject* object, const char* name) const {
  const TorchTensors& torch = torch_tensors();
  Argument argument{name};
  if (!PyObject_TypeCheck(object, torch.type))
    throw py::type_error(std::string(name) + ": expected a torch.Tensor, got " + Py_TYPE(object)->tp_name);
  ExchangeTensor& tensor = argument.tensor;
  if (torch.api->read_tensor(object, &tensor) != 0) {
    // For instance a sparse tensor. Torch's message does not say which argument it was.
    py::error_already_set cause;
    py::raise_from(cause, PyExc_ValueError, (std::string(name) + ": not a dense tensor with data in memory").c_str());
    throw py::error_already_set();
  }
  argument.given = true;
  argument.type = element_type(tensor);
  const bool is_pinned = device == ExchangeDevice::kCpu && tensor.device == ExchangeDevice::kCudaHost;
  if (tensor.device != device && !is_pinned)
    argument.fail(device == ExchangeDevice::kCpu ? "a CPU tensor" : "a CUDA tensor", "one on another device");
  if (device_index >= 0 && tensor.device_index != device_index)
    argument.fail("a tensor on CUDA device " + std::to_string(device_index),
                  "one on device " + std::to_string(tensor.device_index));
  if (tensor.data == nullptr) {
    int64_t count = 1;
    for (int32_t i = 0; i < tensor.ndim; ++i) count *= argument.size(i);
    if (count != 0) argument.fail("a tensor with data", "one without (fake or functional?)");
  }
  return argument;
}

}  // namespace fused_attn
