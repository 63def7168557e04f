// What a problem has besides tensors: made once in Python and passed again with every call.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "../common/attention_params.h"

namespace fused_attn {

namespace py = pybind11;

constexpr char kConfigName[] = "fused_attn.Config";

struct Config {
  double scale;
  double softcap;
  int64_t window_left;
  int64_t window_right;
  int64_t diagonal_offset;
  bool has_dropout;
  uint32_t dropout_threshold;
  double dropout_scale;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
};

inline int64_t window_or_unbounded(std::optional<int64_t> window, const char* name) {
  if (!window || *window == -1 || *window > kUnbounded) return kUnbounded;
  if (*window < 0)
    throw py::value_error(std::string(name) + ": expected None, -1 or a count of keys, got " + std::to_string(*window));
  return *window;
}

inline Config make_config(double scale, double softcap, std::optional<int64_t> window_left,
                          std::optional<int64_t> window_right, int64_t diagonal_offset, double dropout_p,
                          int64_t max_seqlen_q, int64_t max_seqlen_k) {
  if (!(dropout_p >= 0.0 && dropout_p <= 1.0))
    throw py::value_error("dropout_p: expected a probability, got " + std::to_string(dropout_p));
  if (std::abs(diagonal_offset) > kUnbounded)
    throw py::value_error("diagonal_offset: " + std::to_string(diagonal_offset) + " is out of range");
  constexpr double kWords = 4294967296.0;  // 2^32 values of a Philox word
  Config config{};
  config.scale = scale;
  config.softcap = softcap;
  config.window_left = window_or_unbounded(window_left, "window_left");
  config.window_right = window_or_unbounded(window_right, "window_right");
  config.diagonal_offset = diagonal_offset;
  config.has_dropout = dropout_p > 0.0;
  config.dropout_threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * kWords), kWords - 1.0));
  // The largest threshold still keeps one word in 2^32; scale 0 drops that one too.
  config.dropout_scale = dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0;
  config.max_seqlen_q = max_seqlen_q;
  config.max_seqlen_k = max_seqlen_k;
  return config;
}

// The function Config of a module. It returns a capsule, which a call reads in a tenth of the time of a pybind11 class.
inline void define_config(py::module_& module) {
  module.def(
      "Config",
      [](double scale, double softcap, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
         int64_t diagonal_offset, double dropout_p, int64_t max_seqlen_q, int64_t max_seqlen_k) {
        auto config = std::make_unique<Config>(make_config(scale, softcap, window_left, window_right, diagonal_offset,
                                                           dropout_p, max_seqlen_q, max_seqlen_k));
        const auto free = [](PyObject* capsule) {
          delete static_cast<Config*>(PyCapsule_GetPointer(capsule, kConfigName));
        };
        PyObject* capsule = PyCapsule_New(config.get(), kConfigName, free);
        if (capsule == nullptr) throw py::error_already_set();
        config.release();
        return py::reinterpret_steal<py::object>(capsule);
      },
      py::arg("scale"), py::arg("softcap") = 0.0, py::arg("window_left") = py::none(),
      py::arg("window_right") = py::none(), py::arg("diagonal_offset") = 0, py::arg("dropout_p") = 0.0,
      py::arg("max_seqlen_q") = 0, py::arg("max_seqlen_k") = 0,
      "What a problem has besides tensors. Made once, passed with every call. A window of None or -1 is unbounded.\n"
      "max_seqlen_* are read for packed problems only.");
}

}  // namespace fused_attn
