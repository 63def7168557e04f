// The tuples of tensors that Python passes. fused_attn/attention/inputs.py declares the same types. The order of the
// fields must be the same in both files.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

namespace fused_attn {

namespace py = pybind11;

// The items of a tuple. Throws TypeError unless it has exactly `Count` items. The references are borrowed.
template <Py_ssize_t Count>
PyObject* const* items_of(PyObject* tuple, const char* name) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != Count)
    throw py::type_error(std::string(name) + ": expected a tuple of " + std::to_string(Count) + ", got " +
                         Py_TYPE(tuple)->tp_name);
  return &PyTuple_GET_ITEM(tuple, 0);
}

// The inputs of a call. Those after `value` may be None.
struct Inputs {
  PyObject *query, *key, *value, *bias, *key_bias, *relative_bias, *sinks, *seed, *mask, *key_ranges, *key_padding,
      *key_lengths, *cu_seqlens_q, *cu_seqlens_k, *block_table;

  // Borrows the items of the tuple that Python has passed.
  static Inputs of(PyObject* tuple) {
    PyObject* const* x = items_of<15>(tuple, "inputs");
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], x[13], x[14]};
  }
};

// The tensors that forward writes. lse and row_max may be None.
struct Results {
  PyObject *out, *lse, *row_max;

  // Borrows the items of the tuple that Python has passed.
  static Results of(PyObject* tuple) {
    PyObject* const* x = items_of<3>(tuple, "results");
    return {x[0], x[1], x[2]};
  }
};

// The tensors that backward writes, each named after its input. None means that the gradient is not wanted.
struct Gradients {
  PyObject *query, *key, *value, *bias, *key_bias, *relative_bias, *sinks;

  // Borrows the items of the tuple that Python has passed.
  static Gradients of(PyObject* tuple) {
    PyObject* const* x = items_of<7>(tuple, "gradients");
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
  }
};

// What backward gets besides the inputs: the results of forward and their gradients. dlse may be None.
struct Saved {
  PyObject *out, *lse, *dout, *dlse;

  // Borrows the items of the tuple that Python has passed.
  static Saved of(PyObject* tuple) {
    PyObject* const* x = items_of<4>(tuple, "saved");
    return {x[0], x[1], x[2], x[3]};
  }
};

}  // namespace fused_attn
