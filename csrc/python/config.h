// The arguments of a call that are not tensors. Python makes a Config once for each problem and passes it with every
// call, because the conversion of ten Python numbers would take longer than a small kernel.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "../common/attention_params.h"

namespace fused_attn {

namespace py = pybind11;

constexpr char kConfigName[] = "fused_attn.Config";  // the name of the capsule, by which a call recognises a Config

// The fields of the same names in AttentionParams. max_seqlen_q and max_seqlen_k are used by packed calls only.
struct Config {
  double scale;
  double softcap;
  int64_t window_left;
  int64_t window_right;
  int64_t diagonal_offset;
  bool has_dropout;
  uint32_t dropout_threshold;
  double dropout_scale;
  DropoutOrigin dropout_origin;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  bool band_from_end;
  int64_t num_splits;
  bool is_part;
};

// The side of a window as kernels take it: None, -1 and very large numbers mean that the side has no bound.
inline int64_t window_or_unbounded(std::optional<int64_t> window, const char* name) {
  if (!window || *window == -1 || *window > kUnbounded) return kUnbounded;
  if (*window < 0)
    throw py::value_error(std::string(name) + ": expected None, -1 or a count of keys, got " + std::to_string(*window));
  return *window;
}

inline void check_dropout_p(double dropout_p) {
  if (!(dropout_p >= 0.0 && dropout_p <= 1.0))
    throw py::value_error("dropout_p: expected a probability, got " + std::to_string(dropout_p));
}

constexpr double kDropoutNumbers = 65536.0;  // a random number has 16 bits

// Entries whose random number is below this one are dropped.
inline uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * kDropoutNumbers), kDropoutNumbers - 1.0));
}

// The factor of entries that survive: 1 / (1 - p) for the p that the threshold stands for, so that dropout changes no
// mean. With dropout_p = 1, the threshold is 2^16 - 1, so one of 2^16 numbers still keeps its entry. The scale 0 sets
// this entry to zero as well.
inline double dropout_scale(double dropout_p) {
  return dropout_p < 1.0 ? kDropoutNumbers / (kDropoutNumbers - dropout_threshold(dropout_p)) : 0.0;
}

// Checks the arguments of Config and converts them.
inline Config make_config(double scale, double softcap, std::optional<int64_t> window_left,
                          std::optional<int64_t> window_right, int64_t diagonal_offset, double dropout_p,
                          std::array<int64_t, 4> dropout_origin, int64_t max_seqlen_q, int64_t max_seqlen_k,
                          bool band_from_end, int64_t num_splits, bool is_part) {
  check_dropout_p(dropout_p);
  if (std::abs(diagonal_offset) > kUnbounded)
    throw py::value_error("diagonal_offset: " + std::to_string(diagonal_offset) + " is out of range");
  if (num_splits < 0 || num_splits > kMaxSplits)
    throw py::value_error("num_splits: expected 0 to " + std::to_string(kMaxSplits) + ", got " +
                          std::to_string(num_splits));
  Config config{};
  config.scale = scale;
  config.softcap = softcap;
  config.window_left = window_or_unbounded(window_left, "window_left");
  config.window_right = window_or_unbounded(window_right, "window_right");
  config.diagonal_offset = diagonal_offset;
  config.has_dropout = dropout_p > 0.0;
  config.dropout_threshold = dropout_threshold(dropout_p);
  config.dropout_scale = dropout_scale(dropout_p);
  const auto [batch, head, query, key] = dropout_origin;
  config.dropout_origin = {batch, head, query, key};
  config.max_seqlen_q = max_seqlen_q;
  config.max_seqlen_k = max_seqlen_k;
  config.band_from_end = band_from_end;
  config.num_splits = num_splits;
  config.is_part = is_part;
  return config;
}

// Adds the function Config to a Python module. The function returns a Config in a capsule, because a call reads a
// capsule in a tenth of the time that a pybind11 class takes.
inline void define_config(py::module_& module) {
  module.def(
      "Config",
      [](double scale, double softcap, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
         int64_t diagonal_offset, double dropout_p, std::array<int64_t, 4> dropout_origin, int64_t max_seqlen_q,
         int64_t max_seqlen_k, bool band_from_end, int64_t num_splits, bool is_part) {
        auto config = std::make_unique<Config>(make_config(scale, softcap, window_left, window_right, diagonal_offset,
                                                           dropout_p, dropout_origin, max_seqlen_q, max_seqlen_k,
                                                           band_from_end, num_splits, is_part));
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
      py::arg("dropout_origin") = std::array<int64_t, 4>{}, py::arg("max_seqlen_q") = 0, py::arg("max_seqlen_k") = 0,
      py::arg("band_from_end") = false, py::arg("num_splits") = 0, py::arg("is_part") = false,
      "The arguments of a call that are not tensors: made once for each problem, passed with every call. A window of\n"
      "None or -1 has no bound. dropout_origin is (batch, head, query, key). max_seqlen_q and max_seqlen_k are\n"
      "used by packed calls only. num_splits of 0 lets the kernel choose. is_part is for backward: lse is that of\n"
      "rows with more keys than those of the call.");
}

}  // namespace fused_attn
