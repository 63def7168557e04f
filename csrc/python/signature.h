// What Python calls before the kernels: the signature of the arguments of a call, and a fast way to make a named tuple.
#pragma once
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <iterator>

#include "arguments.h"
#include "entry_points.h"

namespace fused_attn {
namespace {

const char kSignatureDoc[] =
    "signature(*arguments)\n\n"
    "The arguments of a call as hashable bytes, which are int64 words. Of a tensor, shape and dtype count, and its\n"
    "contents do not. Two calls with equal bytes have the same plan. Returns None if some argument is neither a plain\n"
    "CPU tensor nor a None, bool, int, float, str, or tuple or list of these. A subclass of Tensor, for instance, may\n"
    "report a shape that is not the shape of its memory.";

constexpr ElementType kSignatureTypes[] = {ElementType::kFloat32,  ElementType::kFloat64, ElementType::kFloat16,
                                           ElementType::kBFloat16, ElementType::kBool,    ElementType::kInt32};

// The words of a signature. Each argument begins with a word that tells its kind: the index of the dtype in
// kSignatureTypes for a tensor, a negative number for others. So no two rows of arguments have the same words.
class Signature {
 public:
  // Appends an argument. Returns false if the argument cannot be described.
  bool append(PyObject* object) {
    if (object == Py_None) return append_words({-1});
    if (Py_TYPE(object) == torch_.type || Py_TYPE(object) == torch_.parameter_type) return append_tensor(object);
    if (PyBool_Check(object)) return append_words({-2, object == Py_True});
    if (PyFloat_Check(object)) {
      int64_t bits;
      const double value = PyFloat_AS_DOUBLE(object);
      std::memcpy(&bits, &value, sizeof(bits));
      return append_words({-3, bits});
    }
    if (PyLong_Check(object)) {
      int overflow;
      const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
      return overflow == 0 && append_words({-4, value});
    }
    if (PyUnicode_CheckExact(object)) {
      const Py_ssize_t length = PyUnicode_GET_LENGTH(object);
      bool fits = append_words({-5, length});
      for (Py_ssize_t i = 0; fits && i < length; ++i) fits = append_words({PyUnicode_READ_CHAR(object, i)});
      return fits;
    }
    if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
    PyObject* const* items = PySequence_Fast_ITEMS(object);
    bool fits = append_words({-6, PySequence_Fast_GET_SIZE(object)});
    for (Py_ssize_t i = 0; fits && i < PySequence_Fast_GET_SIZE(object); ++i) fits = append(items[i]);
    return fits;
  }

  PyObject* bytes() const {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_), (end_ - words_) * sizeof(int64_t));
  }

 private:
  bool append_words(std::initializer_list<int64_t> words) {
    if (std::end(words_) - end_ < static_cast<ptrdiff_t>(words.size())) return false;
    end_ = std::copy(words.begin(), words.end(), end_);
    return true;
  }

  // The entry point of the kernel reads the tensor again, which takes tens of nanoseconds. A cache of the first read
  // would not be safe: in between, a tensor may be resized, or freed and its address given to another one.
  bool append_tensor(PyObject* object) {
    ExchangeTensor tensor;
    if (torch_.api->read_tensor(object, &tensor) != 0) {
      PyErr_Clear();  // for instance a sparse tensor
      return false;
    }
    const auto* type = std::find(std::begin(kSignatureTypes), std::end(kSignatureTypes), element_type(tensor));
    if (type == std::end(kSignatureTypes) || tensor.device != ExchangeDevice::kCpu) return false;
    if (!append_words({type - kSignatureTypes, tensor.ndim}) || std::end(words_) - end_ < tensor.ndim) return false;
    end_ = std::copy_n(tensor.shape, tensor.ndim, end_);
    return true;
  }

  const TorchTensors& torch_ = torch_tensors();
  int64_t words_[128];
  int64_t* end_ = words_;
};

PyObject* signature(PyObject* const* args, Py_ssize_t count) {
  Signature signature;
  if (!std::all_of(args, args + count, [&](PyObject* object) { return signature.append(object); })) Py_RETURN_NONE;
  return signature.bytes();
}

// The function that `constructor` returns. `made` is the tuple (type, number of fields).
PyObject* named_tuple(PyObject* made, PyObject* const* items, Py_ssize_t count) {
  auto* type = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(made, 0));
  if (count != PyLong_AsSsize_t(PyTuple_GET_ITEM(made, 1)))
    return PyErr_Format(PyExc_TypeError, "%s: expected %S items, got %zd", type->tp_name, PyTuple_GET_ITEM(made, 1),
                        count);
  PyObject* tuple = type->tp_alloc(type, count);
  if (tuple == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(items[i]);
    PyTuple_SET_ITEM(tuple, i, items[i]);
  }
  return tuple;
}

const char kConstructorDoc[] =
    "constructor(type, num_fields)\n\n"
    "A function (*items) that makes a named tuple of this type in a quarter of the time that the type takes.";

PyObject* constructor(PyObject* const* args, Py_ssize_t count) {
  static PyMethodDef definition{"named_tuple", as_c_function(named_tuple), METH_FASTCALL, nullptr};
  struct Arguments {
    PyObject *type, *num_fields;
  };
  const auto [type, num_fields] = arguments_of<Arguments>(args, count, kConstructorDoc);
  if (!PyType_Check(type) || !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type), &PyTuple_Type) ||
      !PyLong_Check(num_fields))
    throw py::type_error("constructor: expected a subclass of tuple and a number");
  const py::tuple made = py::make_tuple(py::handle(type), py::handle(num_fields));
  return PyCFunction_New(&definition, made.ptr());
}

}  // namespace
}  // namespace fused_attn
