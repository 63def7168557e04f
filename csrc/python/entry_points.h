// Functions of Python's C API that call the kernels. They do not use pybind11 to convert arguments, because pybind11
// alone would take longer than reading and checking five tensors, which takes 0.5 us. For the same reason, all inputs
// are one tuple: to pass None eight times would take 0.4 us.
#pragma once
#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "inputs.h"

namespace fused_attn {

namespace py = pybind11;

// The arguments of a function under their names, which are the fields of a struct (inputs.h). `doc` begins with the
// signature of the function, for the error message.
template <class Fields>
Fields arguments_of(PyObject* const* args, Py_ssize_t count, const char* doc) {
  if (count != kFields<Fields>)
    throw py::type_error("expected " + std::to_string(kFields<Fields>) + " arguments, got " + std::to_string(count) +
                         ": " + doc);
  return fields_of<Fields>(args);
}

// A function that Python can call: calls `implementation`, and turns C++ exceptions into Python exceptions.
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

// The function pointer as the type that PyMethodDef requires. Two casts, because a direct cast makes compilers warn.
template <typename Function>
PyCFunction as_c_function(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fused_attn
