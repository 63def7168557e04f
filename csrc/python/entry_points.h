// Entry points are plain functions of the C API, because pybind11 takes longer to pass arguments, where reading and
// checking five tensors takes 0.5 us in all. The inputs are one argument for the same reason: passing None eight times
// takes 0.4 us.
#pragma once
#include <pybind11/pybind11.h>

#include <new>
#include <string>

namespace fused_attn {

namespace py = pybind11;

inline void check_count(Py_ssize_t count, Py_ssize_t expected, const char* doc) {
  if (count != expected)
    throw py::type_error("expected " + std::to_string(expected) + " arguments, got " + std::to_string(count) + ": " +
                         doc);
}

// The C API's side of `implementation`: turns C++ exceptions into Python's.
template <PyObject* (*implementation)(PyObject* const*, Py_ssize_t)>
PyObject* entry_point(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return implementation(args, count);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <typename Function>
PyCFunction as_c_function(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fused_attn
