// The options of a call. Python makes them once for each problem, by the function Config, and passes the result with
// every call, because the conversion of ten Python numbers would take longer than a small kernel.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>

#include "../common/attention_params.h"

namespace fused_attn {

namespace py = pybind11;

constexpr char kConfigName[] = "fused_attn.Config";  // the name of the capsule, by which a call recognises it

// The side of a band as kernels take it: -1 and very large numbers mean that the side has no bound.
inline int64_t side_or_unbounded(int64_t side, const char* name) {
  if (side < -1)
    throw py::value_error(std::string(name) + ": expected -1 or a count of keys, got " + std::to_string(side));
  return side == -1 || side > kUnbounded ? kUnbounded : side;
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

// Adds the function Config to a Python module. The function returns AttentionOptions in a capsule, because a call reads
// a capsule in a tenth of the time that a pybind11 class takes.
inline void define_config(py::module_& module) {
  module.def(
      "Config",
      [](double scale, double softcap, int64_t band_left, int64_t band_right, int64_t band_offset, bool band_from_end,
         double dropout_p, std::array<int64_t, 4> dropout_origin, int64_t max_seqlen_q, int64_t max_seqlen_k,
         int64_t num_splits, bool is_part) {
        check_dropout_p(dropout_p);
        if (std::abs(band_offset) > kUnbounded)
          throw py::value_error("band_offset: " + std::to_string(band_offset) + " is out of range");
        if (num_splits < 0 || num_splits > kMaxSplits)
          throw py::value_error("num_splits: expected 0 to " + std::to_string(kMaxSplits) + ", got " +
                                std::to_string(num_splits));
        auto options = std::make_unique<AttentionOptions>();
        options->scale = scale;
        options->softcap = softcap;
        options->band_left = side_or_unbounded(band_left, "band_left");
        options->band_right = side_or_unbounded(band_right, "band_right");
        options->band_offset = band_offset;
        options->band_from_end = band_from_end;
        options->has_dropout = dropout_p > 0.0;
        options->dropout_threshold = dropout_threshold(dropout_p);
        options->dropout_scale = dropout_scale(dropout_p);
        const auto [batch, head, query, key] = dropout_origin;
        options->dropout_origin = {batch, head, query, key};
        options->max_seqlen_q = max_seqlen_q;
        options->max_seqlen_k = max_seqlen_k;
        options->num_splits = num_splits;
        options->is_part = is_part;
        const auto free = [](PyObject* capsule) {
          delete static_cast<AttentionOptions*>(PyCapsule_GetPointer(capsule, kConfigName));
        };
        PyObject* capsule = PyCapsule_New(options.get(), kConfigName, free);
        if (capsule == nullptr) throw py::error_already_set();
        options.release();
        return py::reinterpret_steal<py::object>(capsule);
      },
      py::arg("scale"), py::arg("softcap") = 0.0, py::arg("band_left") = -1, py::arg("band_right") = -1,
      py::arg("band_offset") = 0, py::arg("band_from_end") = false, py::arg("dropout_p") = 0.0,
      py::arg("dropout_origin") = std::array<int64_t, 4>{}, py::arg("max_seqlen_q") = 0, py::arg("max_seqlen_k") = 0,
      py::arg("num_splits") = 0, py::arg("is_part") = false,
      "The options of a call (AttentionOptions): made once for each problem, passed with every call. A side of the\n"
      "band of -1 has no bound. dropout_origin is (batch, head, query, key). max_seqlen_q and max_seqlen_k are used\n"
      "by packed calls only. num_splits of 0 lets the kernel choose. is_part is for backward: lse is that of rows\n"
      "with more keys than those of the call.");
}

}  // namespace fused_attn
