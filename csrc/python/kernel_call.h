// What the functions that call a CPU kernel share.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <string>

#include "arguments.h"

namespace fused_attn {
namespace {

constexpr Reader kReader{ExchangeDevice::kCpu, /*device_index=*/-1, /*may_look_inside=*/true};

// The argument num_threads as a number. 65536 is a limit that no machine reaches, and it fits into int32_t.
int32_t thread_count(PyObject* num_threads) {
  const long threads = PyLong_AsLong(num_threads);
  if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (threads < 1) throw py::value_error("num_threads: expected at least 1, got " + std::to_string(threads));
  return static_cast<int32_t>(std::min<long>(threads, 1 << 16));
}

// Calls a kernel of `work` multiply-adds. Releases the GIL during the call if the kernel takes so long that another
// Python thread can use the time.
template <class Kernel>
void run_kernel(double work, const Kernel& kernel) {
  constexpr double kWorthReleasing = 1 << 18;  // multiply-adds, which take some microseconds
  if (work < kWorthReleasing) {
    kernel();
  } else {
    const py::gil_scoped_release released;
    kernel();
  }
}

// The address of a contiguous tensor of this dtype and shape. Null if the caller passed None.
void* checked_contiguous(const Argument& argument, ElementType type, std::initializer_list<int64_t> shape) {
  if (!argument.given) return nullptr;
  argument.check_type(type);
  argument.check_shape(shape);
  argument.check_contiguous();
  return argument.data();
}

}  // namespace
}  // namespace fused_attn
