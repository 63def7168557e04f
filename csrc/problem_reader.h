// From Python to the kernels, for every module of native code: checks tensors and describes them in an AttentionParams.
// No torch header is used; tensors are read through tensor_exchange.h.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "common/attention_params.h"
#include "tensor_exchange.h"

namespace fused_attn {

namespace py = pybind11;

// ---- What a problem has besides tensors: made once in Python and passed again with every call.

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

// ---- Tensors: read, then checked against what the problem expects of each.

enum class ElementType { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kInt32, kInt64, kOther };

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

inline DType kernel_dtype(ElementType type) {
  switch (type) {
    case ElementType::kFloat64: return DType::kFloat64;
    case ElementType::kFloat16: return DType::kFloat16;
    case ElementType::kBFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

inline std::string shape_text(const int64_t* shape, int64_t ndim) {
  std::string text = "(";
  for (int64_t i = 0; i < ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

struct Argument {
  const char* name;
  bool given = false;
  ElementType type = ElementType::kOther;
  ExchangeTensor tensor{};

  int64_t size(int dim) const { return tensor.shape[dim]; }
  int64_t stride(int dim) const { return tensor.strides[dim]; }
  char* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
  }

  void check_type(ElementType expected) const {
    if (type != expected) fail(name_of(expected), name_of(type));
  }

  void check_shape(std::initializer_list<int64_t> expected) const {
    bool equal = tensor.ndim == static_cast<int32_t>(expected.size());
    for (int32_t i = 0; equal && i < tensor.ndim; ++i) equal = size(i) == expected.begin()[i];
    if (!equal)
      fail("shape " + shape_text(expected.begin(), static_cast<int64_t>(expected.size())),
           "shape " + shape_text(tensor.shape, tensor.ndim));
  }

  void check_unit_stride(int dim) const {
    if (stride(dim) != 1 && size(dim) > 1)
      fail("stride 1 in dimension " + std::to_string(dim), "stride " + std::to_string(stride(dim)));
  }

  // (batch, head, row, column), elements of a row side by side.
  TensorView rows_view() const {
    if (!given) return {};
    check_unit_stride(3);
    return {data(), stride(0), stride(1), stride(2), 1};
  }

  // (batch, head, row, column), any strides; a dimension of size 1 stands for `expected` equal entries.
  TensorView scores_view(const int64_t (&expected)[4]) const {
    bool fits = tensor.ndim == 4;
    for (int dim = 0; fits && dim < 4; ++dim) fits = size(dim) == 1 || size(dim) == expected[dim];
    if (!fits)
      fail("a shape that broadcasts to " + shape_text(expected, 4), "shape " + shape_text(tensor.shape, tensor.ndim));
    const auto step = [&](int dim) { return size(dim) == expected[dim] ? stride(dim) : 0; };
    return {data(), step(0), step(1), step(2), step(3)};
  }
};

// Where the tensors of a call have to be. On a GPU their contents are left alone: the host would have to wait for it.
struct Reader {
  ExchangeDevice device;
  int32_t device_index = -1;  // -1: any

  bool may_look_inside() const { return device == ExchangeDevice::kCpu; }
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
    // For instance a sparse tensor. Torch's message does not say which argument it was.
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

// ---- The arguments that forward and backward share.

// The tuples that Python passes, as fused_attn.inputs declares them. The field order is the one of the Python classes.

// The items of a tuple with exactly Count of them.
template <Py_ssize_t Count>
PyObject* const* items_of(PyObject* tuple, const char* name) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != Count)
    throw py::type_error(std::string(name) + ": expected a tuple of " + std::to_string(Count) + ", got " +
                         Py_TYPE(tuple)->tp_name);
  return &PyTuple_GET_ITEM(tuple, 0);
}

struct Inputs {
  PyObject *query, *key, *value, *bias, *relative_bias, *sinks, *seed, *mask, *key_padding, *cu_seqlens_q,
      *cu_seqlens_k;

  static Inputs of(PyObject* tuple) {
    PyObject* const* x = items_of<11>(tuple, "inputs");
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10]};
  }
};

struct Gradients {
  PyObject *query, *key, *value, *bias, *relative_bias, *sinks;

  static Gradients of(PyObject* tuple) {
    PyObject* const* x = items_of<6>(tuple, "gradients");
    return {x[0], x[1], x[2], x[3], x[4], x[5]};
  }
};

struct Saved {
  PyObject *out, *lse, *dout, *dlse;

  static Saved of(PyObject* tuple) {
    PyObject* const* x = items_of<4>(tuple, "saved");
    return {x[0], x[1], x[2], x[3]};
  }
};

// The types and sizes that every other tensor is checked against.
struct Problem {
  AttentionParams params;
  ElementType type = ElementType::kOther;
  ElementType accumulate_type = ElementType::kOther;
  int64_t batch_entries = 0;  // of the tensors: 1 when packed
  int64_t rows_q = 0;         // of the tensors: the total when packed
  int64_t rows_k = 0;
};

inline void set_config(AttentionParams& params, PyObject* object) {
  if (!PyCapsule_IsValid(object, kConfigName))
    throw py::type_error(std::string("config: expected what Config returns, got ") + Py_TYPE(object)->tp_name);
  const auto& config = *static_cast<const Config*>(PyCapsule_GetPointer(object, kConfigName));
  params.scale = config.scale;
  params.softcap = config.softcap;
  params.window_left = config.window_left;
  params.window_right = config.window_right;
  params.diagonal_offset = config.diagonal_offset;
  params.has_dropout = config.has_dropout;
  params.dropout_threshold = config.dropout_threshold;
  params.dropout_scale = config.dropout_scale;
  // Of packed problems only; set_tensors overwrites them otherwise.
  params.seqlen_q = config.max_seqlen_q;
  params.seqlen_k = config.max_seqlen_k;
}

// A wrong offset would let the kernel read or write outside a tensor, and no later check could see it.
inline const int32_t* checked_cu_seqlens(const Reader& reader, const Argument& cu_seqlens, int64_t batch, int64_t total,
                                         int64_t max_seqlen) {
  cu_seqlens.check_type(ElementType::kInt32);
  cu_seqlens.check_shape({batch + 1});
  cu_seqlens.check_unit_stride(0);
  const auto* starts = reinterpret_cast<const int32_t*>(cu_seqlens.data());
  if (!reader.may_look_inside()) return starts;
  bool valid = starts[0] >= 0 && starts[batch] <= total;
  for (int64_t b = 0; valid && b < batch; ++b) {
    const int64_t length = int64_t{starts[b + 1]} - starts[b];
    valid = length >= 0 && length <= max_seqlen;
  }
  if (!valid)
    cu_seqlens.fail("ascending offsets up to " + std::to_string(total) + " with no sequence longer than " +
                        std::to_string(max_seqlen),
                    "other values");
  return starts;
}

inline void set_tensors(Problem& problem, const Reader& reader, const Inputs& inputs, PyObject* out_object,
                        PyObject* lse_object) {
  AttentionParams& params = problem.params;
  const Argument query = reader.required(inputs.query, "query");
  const Argument key = reader.required(inputs.key, "key");
  const Argument value = reader.required(inputs.value, "value");
  const Argument out = reader.required(out_object, "out");
  const Argument lse = reader.optional(lse_object, "lse");
  for (const Argument* argument : {&query, &key, &value}) {
    if (argument->tensor.ndim != 4) argument->fail("4 dimensions", std::to_string(argument->tensor.ndim));
  }

  problem.type = query.type;
  if (query.type > ElementType::kBFloat16) query.fail("float32, float64, float16 or bfloat16", name_of(query.type));
  problem.accumulate_type = query.type == ElementType::kFloat64 ? ElementType::kFloat64 : ElementType::kFloat32;
  key.check_type(problem.type);
  value.check_type(problem.type);
  out.check_type(problem.type);
  params.dtype = kernel_dtype(query.type);

  problem.batch_entries = query.size(0);
  problem.rows_q = query.size(2);
  problem.rows_k = key.size(2);
  params.num_heads = query.size(1);
  params.num_kv_heads = key.size(1);
  params.head_dim = query.size(3);
  params.value_dim = value.size(3);
  if (params.num_kv_heads == 0 ? params.num_heads != 0 : params.num_heads % params.num_kv_heads != 0)
    key.fail("a head count that divides " + std::to_string(params.num_heads), std::to_string(params.num_kv_heads));
  const int64_t batch = problem.batch_entries, heads = params.num_heads, kv_heads = params.num_kv_heads;
  key.check_shape({batch, kv_heads, problem.rows_k, params.head_dim});
  value.check_shape({batch, kv_heads, problem.rows_k, params.value_dim});
  out.check_shape({batch, heads, problem.rows_q, params.value_dim});

  params.query = query.rows_view();
  params.key = key.rows_view();
  params.value = value.rows_view();
  params.out = out.rows_view();
  if (lse.given) {
    lse.check_type(problem.accumulate_type);
    lse.check_shape({batch, heads, problem.rows_q});
    lse.check_unit_stride(2);
    params.lse = {lse.data(), lse.stride(0), lse.stride(1), 1, 1};
  }

  const Argument cu_seqlens_q = reader.optional(inputs.cu_seqlens_q, "cu_seqlens_q");
  const Argument cu_seqlens_k = reader.optional(inputs.cu_seqlens_k, "cu_seqlens_k");
  if (!cu_seqlens_q.given && !cu_seqlens_k.given) {
    params.batch = problem.batch_entries;
    params.seqlen_q = problem.rows_q;
    params.seqlen_k = problem.rows_k;
    return;
  }
  if (!cu_seqlens_q.given) cu_seqlens_q.fail("a tensor, as cu_seqlens_k is one", "None");
  if (!cu_seqlens_k.given) cu_seqlens_k.fail("a tensor, as cu_seqlens_q is one", "None");
  if (problem.batch_entries != 1)
    query.fail("one batch entry in a packed problem", std::to_string(problem.batch_entries));
  if (cu_seqlens_q.tensor.ndim != 1 || cu_seqlens_q.size(0) < 1)
    cu_seqlens_q.fail("shape (batch + 1,)", "shape " + shape_text(cu_seqlens_q.tensor.shape, cu_seqlens_q.tensor.ndim));
  params.batch = cu_seqlens_q.size(0) - 1;
  params.cu_seqlens_q = checked_cu_seqlens(reader, cu_seqlens_q, params.batch, problem.rows_q, params.seqlen_q);
  params.cu_seqlens_k = checked_cu_seqlens(reader, cu_seqlens_k, params.batch, problem.rows_k, params.seqlen_k);
  for (TensorView* view : {&params.query, &params.key, &params.value, &params.out, &params.lse}) view->stride_batch = 0;
}

// One row of biases, or one value, per head; a single head stands for all of them.
inline TensorView per_head_view(const Argument& argument) {
  if (!argument.given) return {};
  return {argument.data(), 0, argument.size(0) == 1 ? 0 : argument.stride(0), 0, 1};
}

inline void check_relative_bias(const Argument& argument, const Problem& problem) {
  if (!argument.given) return;
  const AttentionParams& params = problem.params;
  argument.check_type(problem.accumulate_type);
  const bool one_head = argument.tensor.ndim == 2 && argument.size(0) == 1;
  argument.check_shape({one_head ? 1 : params.num_heads,
                        // No pair of positions, no bias.
                        std::max<int64_t>(params.seqlen_q + params.seqlen_k - 1, 0)});
  argument.check_unit_stride(1);
}

inline void check_sinks(const Argument& argument, const Problem& problem) {
  if (!argument.given) return;
  argument.check_type(problem.accumulate_type);
  argument.check_shape({problem.params.num_heads});
}

inline void set_masks(Problem& problem, const Reader& reader, const Inputs& inputs) {
  AttentionParams& params = problem.params;
  const int64_t scores[] = {params.batch, params.num_heads, params.seqlen_q, params.seqlen_k};

  if (const Argument padding = reader.optional(inputs.key_padding, "key_padding"); padding.given) {
    padding.check_type(ElementType::kBool);
    padding.check_shape({params.batch, params.seqlen_k});
    params.key_padding = {padding.data(), padding.stride(0), 0, 0, padding.stride(1)};
  }
  if (const Argument mask = reader.optional(inputs.mask, "mask"); mask.given) {
    mask.check_type(ElementType::kBool);
    params.mask = mask.scores_view(scores);
  }
  if (const Argument bias = reader.optional(inputs.bias, "bias"); bias.given) {
    if (bias.type != problem.type) bias.check_type(problem.accumulate_type);
    params.bias = bias.scores_view(scores);
    params.bias_dtype = kernel_dtype(bias.type);
  }
  const Argument relative_bias = reader.optional(inputs.relative_bias, "relative_bias");
  check_relative_bias(relative_bias, problem);
  params.relative_bias = per_head_view(relative_bias);
  const Argument sinks = reader.optional(inputs.sinks, "sinks");
  check_sinks(sinks, problem);
  params.sinks = per_head_view(sinks);

  const Argument seed = reader.optional(inputs.seed, "seed");
  if (params.has_dropout && !seed.given) seed.fail("a tensor, as dropout is on", "None");
  if (seed.given) {
    seed.check_type(ElementType::kInt64);
    seed.check_shape({});
    params.dropout_seed_data = reinterpret_cast<const int64_t*>(seed.data());
    if (reader.may_look_inside()) params.dropout_seed = static_cast<uint64_t>(*params.dropout_seed_data);
  }
}

inline Problem read_problem(const Reader& reader, const Inputs& inputs, PyObject* out, PyObject* lse,
                            PyObject* config) {
  Problem problem;
  set_config(problem.params, config);
  set_tensors(problem, reader, inputs, out, lse);
  set_masks(problem, reader, inputs);
  return problem;
}

inline void set_gradients(Problem& problem, const Reader& reader, const Saved& saved, const Gradients& gradients) {
  AttentionParams& params = problem.params;
  const int64_t batch = problem.batch_entries, heads = params.num_heads, kv_heads = params.num_kv_heads;
  const auto rows_view = [&](const Argument& argument, int64_t num_heads, int64_t rows, int64_t columns) {
    if (!argument.given) return TensorView{};
    argument.check_type(problem.type);
    argument.check_shape({batch, num_heads, rows, columns});
    TensorView view = argument.rows_view();
    if (params.cu_seqlens_q != nullptr) view.stride_batch = 0;
    return view;
  };
  params.dout = rows_view(reader.required(saved.dout, "dout"), heads, problem.rows_q, params.value_dim);
  params.dquery = rows_view(reader.optional(gradients.query, "dquery"), heads, problem.rows_q, params.head_dim);
  params.dkey = rows_view(reader.optional(gradients.key, "dkey"), kv_heads, problem.rows_k, params.head_dim);
  params.dvalue = rows_view(reader.optional(gradients.value, "dvalue"), kv_heads, problem.rows_k, params.value_dim);
  if (const Argument dlse = reader.optional(saved.dlse, "dlse"); dlse.given) {
    dlse.check_type(problem.accumulate_type);
    dlse.check_shape({batch, heads, problem.rows_q});
    const int64_t stride_batch = params.cu_seqlens_q != nullptr ? 0 : dlse.stride(0);
    params.dlse = {dlse.data(), stride_batch, dlse.stride(1), dlse.stride(2), 1};
  }

  if (const Argument dbias = reader.optional(gradients.bias, "dbias"); dbias.given) {
    dbias.check_type(problem.accumulate_type);
    params.dbias = dbias.scores_view({params.batch, params.num_heads, params.seqlen_q, params.seqlen_k});
  }
  const Argument drelative_bias = reader.optional(gradients.relative_bias, "drelative_bias");
  check_relative_bias(drelative_bias, problem);
  params.drelative_bias = per_head_view(drelative_bias);
  const Argument dsinks = reader.optional(gradients.sinks, "dsinks");
  check_sinks(dsinks, problem);
  params.dsinks = per_head_view(dsinks);

  const auto check_input = [](const TensorView& gradient, const TensorView& input, const char* name) {
    if (gradient.data != nullptr && input.data == nullptr)
      throw py::value_error(std::string("d") + name + ": expected None, as " + name + " is None");
  };
  check_input(params.dbias, params.bias, "bias");
  check_input(params.drelative_bias, params.relative_bias, "relative_bias");
  check_input(params.dsinks, params.sinks, "sinks");
}

// Of a backward call: the problem with its gradients.
inline Problem read_backward(const Reader& reader, const Inputs& inputs, const Saved& saved, const Gradients& gradients,
                             PyObject* config) {
  reader.required(saved.lse, "lse");  // for forward an output that may be None, here an input
  Problem problem = read_problem(reader, inputs, saved.out, saved.lse, config);
  set_gradients(problem, reader, saved, gradients);
  return problem;
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

// ---- Entry points: plain functions of the C API, because pybind11 takes longer to pass arguments, where reading and
// checking five tensors takes 0.5 us in all. The inputs are one argument for the same reason: passing None eight times
// takes 0.4 us.

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
