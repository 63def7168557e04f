// An argument of a call from Python: a tensor with its metadata and the checks of dtype, shape and strides, or a
// number.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "../common/attention_params.h"
#include "tensor_exchange.h"

namespace fused_attn {

namespace py = pybind11;

// The dtypes that some argument may have. The types of query, key and value come first, up to kBFloat16.
enum class ElementType { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kInt32, kInt64, kOther };

// The name of a dtype for error messages, as PyTorch writes it.
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

// The dtype of a tensor that DLPack describes by a type code and a number of bits.
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

// The dtype as kernels name it. Defined for the types of query, key and value.
inline DType kernel_dtype(ElementType type) {
  switch (type) {
    case ElementType::kFloat64: return DType::kFloat64;
    case ElementType::kFloat16: return DType::kFloat16;
    case ElementType::kBFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

// A shape for error messages, as Python writes a tuple.
inline std::string shape_text(const int64_t* shape, int64_t ndim) {
  std::string text = "(";
  for (int64_t i = 0; i < ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

// One tensor argument. `tensor` points to sizes and strides that belong to the Python tensor. Each check_ function
// throws ValueError, with a message that names the argument, what was expected, and what the caller passed.
struct Argument {
  const char* name;
  bool given = false;  // false if the caller passed None
  ElementType type = ElementType::kOther;
  ExchangeTensor tensor{};

  // The size, the stride in elements, and the address of the first element. Valid if `given`.
  int64_t size(int dim) const { return tensor.shape[dim]; }
  int64_t stride(int dim) const { return tensor.strides[dim]; }
  char* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
  }

  // The dtype must be `expected`.
  void check_type(ElementType expected) const {
    if (type != expected) fail(name_of(expected), name_of(type));
  }

  // The dtype must be one that query, key and value may have.
  void check_float() const {
    if (type > ElementType::kBFloat16) fail("float32, float64, float16 or bfloat16", name_of(type));
  }

  // The number of dimensions must be `expected`.
  void check_ndim(int32_t expected) const {
    if (tensor.ndim != expected)
      fail(std::to_string(expected) + (expected == 1 ? " dimension" : " dimensions"), std::to_string(tensor.ndim));
  }

  // The number of dimensions and all sizes must be `expected`.
  void check_shape(std::initializer_list<int64_t> expected) const {
    check_shape(expected.begin(), static_cast<int32_t>(expected.size()));
  }
  void check_shape(const int64_t* expected, int32_t ndim) const {
    bool equal = tensor.ndim == ndim;
    for (int32_t i = 0; equal && i < ndim; ++i) equal = size(i) == expected[i];
    if (!equal) fail("shape " + shape_text(expected, ndim), "shape " + shape_text(tensor.shape, tensor.ndim));
  }

  // The dtype and the shape must be those of `other`.
  void check_like(const Argument& other) const {
    check_type(other.type);
    check_shape(other.tensor.shape, other.tensor.ndim);
  }

  // The elements along `dim` must be neighbours in memory. With one element, the stride does not matter.
  void check_unit_stride(int dim) const {
    if (stride(dim) != 1 && size(dim) > 1)
      fail("stride 1 in dimension " + std::to_string(dim), "stride " + std::to_string(stride(dim)));
  }

  // The elements must be in the order of their indices, without gaps. The stride of a dimension of size 1 does not
  // matter.
  void check_contiguous() const {
    int64_t expected = 1;
    for (int dim = tensor.ndim - 1; dim >= 0; --dim) {
      if (size(dim) > 1 && stride(dim) != expected)
        fail("a contiguous tensor", "stride " + std::to_string(stride(dim)) + " in dimension " + std::to_string(dim));
      expected *= size(dim);
    }
  }

  // The view of a tensor (batch, head, row, column) with any strides, which broadcasts to the sizes `expected`. A
  // dimension of size 1 gets stride 0.
  TensorView scores_view(const int64_t (&expected)[4]) const {
    bool fits = tensor.ndim == 4;
    for (int dim = 0; fits && dim < 4; ++dim) fits = size(dim) == 1 || size(dim) == expected[dim];
    if (!fits)
      fail("a shape that broadcasts to " + shape_text(expected, 4), "shape " + shape_text(tensor.shape, tensor.ndim));
    const auto step = [&](int dim) { return size(dim) == expected[dim] ? stride(dim) : 0; };
    return {data(), step(0), step(1), step(2), step(3)};
  }
};

// Numbers that Python has passed. They throw if the object is no such number.
inline int64_t read_integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
inline double read_double(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
inline bool read_bool(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// Reads tensor arguments, and checks that they are on the device of the call.
struct Reader {
  ExchangeDevice device;
  int32_t device_index = -1;  // -1: any
  // Whether elements of a tensor may be read. On a GPU, the host would have to wait for the kernels that write them.
  // The emulation of a GPU does not read them either.
  bool may_look_inside = false;

  // Reads an argument that must be a tensor, or one that may be None as well.
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
    // This happens, for instance, for a sparse tensor. The new error adds the name of the argument, which torch does
    // not know.
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
