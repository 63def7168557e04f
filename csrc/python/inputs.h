// The tuples of tensors that Python passes. fused_attn/attention/inputs.py declares the same types. The order of the
// fields must be the same in both files.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <type_traits>

namespace fused_attn {

namespace py = pybind11;

// How many objects a struct consists of. All of its fields must be pointers to Python objects, or such structs.
template <class Fields>
constexpr Py_ssize_t kFields = sizeof(Fields) / sizeof(PyObject*);

// Gives `items` the names of the fields of a struct, in their order. The references are borrowed.
template <class Fields>
Fields fields_of(PyObject* const* items) {
  static_assert(std::is_trivially_copyable_v<Fields> && sizeof(Fields) % sizeof(PyObject*) == 0);
  Fields fields;
  std::memcpy(&fields, items, sizeof(fields));
  return fields;
}

// The same for the items of a tuple. Throws TypeError unless there are as many items as fields.
template <class Fields>
Fields fields_of_tuple(PyObject* tuple, const char* name) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != kFields<Fields>)
    throw py::type_error(std::string(name) + ": expected a tuple of " + std::to_string(kFields<Fields>) + ", got " +
                         Py_TYPE(tuple)->tp_name);
  return fields_of<Fields>(&PyTuple_GET_ITEM(tuple, 0));
}

// The inputs of a call. Those after `value` may be None.
struct Inputs {
  PyObject *query, *key, *value, *bias, *key_bias, *relative_bias, *sinks, *seed, *mask, *key_ranges, *key_padding,
      *key_lengths, *cu_seqlens_q, *cu_seqlens_k, *block_table;

  static Inputs of(PyObject* tuple) { return fields_of_tuple<Inputs>(tuple, "inputs"); }
};

// The tensors that forward writes. lse and row_max may be None.
struct Results {
  PyObject *out, *lse, *row_max;

  static Results of(PyObject* tuple) { return fields_of_tuple<Results>(tuple, "results"); }
};

// The tensors that backward writes, each named after its input. None means that the gradient is not wanted.
struct Gradients {
  PyObject *query, *key, *value, *bias, *key_bias, *relative_bias, *sinks;

  static Gradients of(PyObject* tuple) { return fields_of_tuple<Gradients>(tuple, "gradients"); }
};

// What backward gets besides the inputs: the results of forward and their gradients. dlse may be None.
struct Saved {
  PyObject *out, *lse, *dout, *dlse;

  static Saved of(PyObject* tuple) { return fields_of_tuple<Saved>(tuple, "saved"); }
};

}  // namespace fused_attn
