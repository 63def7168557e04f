// The functions that compute parts of layers on the CPU: attention modules and linear layers for few rows, what follows
// a linear layer for any rows, and dropout.
#pragma once
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "config.h"
#include "entry_points.h"
#include "kernel_call.h"
#include "problem.h"

namespace fused_attn {
namespace {

// The arguments of a layer norm: weight (E,), bias (E,) or None, and eps. Without a weight, there is no norm.
struct NormArguments {
  PyObject *weight, *bias, *eps;

  cpu::LayerNormParams read(ElementType type, int64_t features) const {
    cpu::LayerNormParams norm;
    norm.weight = checked_contiguous(kReader.optional(weight, "norm_weight"), type, {features});
    norm.bias = checked_contiguous(kReader.optional(bias, "norm_bias"), type, {features});
    norm.eps = read_double(eps);
    return norm;
  }
};

// What stands around a module: a layer norm, and the residual on either side of it.
struct ResidualArguments {
  NormArguments norm;
  PyObject* norm_first;

  void read(ElementType type, cpu::AttentionModuleParams& module) const {
    module.norm = norm.read(type, module.features);
    const bool is_first = read_bool(norm_first);
    if (module.norm.weight != nullptr)
      module.residual = is_first ? cpu::Residual::kNormFirst : cpu::Residual::kNormLast;
  }
};

// The arguments of an attention module.
struct ModuleArguments {
  PyObject *x, *in_weight, *in_bias, *out_weight, *out_bias, *out, *num_heads;
};

// Reads and checks the arguments of an attention module.
cpu::AttentionModuleParams read_module(const ModuleArguments& arguments) {
  const Argument x = kReader.required(arguments.x, "x");
  const Argument weight = kReader.required(arguments.in_weight, "in_weight");
  x.check_ndim(3);
  x.check_float();
  weight.check_ndim(2);
  const int64_t batch = x.size(0), length = x.size(1), features = x.size(2), width = weight.size(0);
  const int64_t heads = read_integer(arguments.num_heads);
  if (heads < 1 || features % heads != 0)
    throw py::value_error("num_heads: expected a divisor of " + std::to_string(features) + ", got " +
                          std::to_string(heads));
  const int64_t head_dim = features / heads;
  const int64_t kv_heads = head_dim > 0 ? (width - features) / (2 * head_dim) : 0;
  if (kv_heads < 1 || heads % kv_heads != 0 || features + 2 * kv_heads * head_dim != width)
    weight.fail("(H + 2 Hkv) D rows for H = " + std::to_string(heads), std::to_string(width));

  cpu::AttentionModuleParams module;
  AttentionParams& params = module.attention;
  module.features = features;
  module.x = checked_contiguous(x, x.type, {batch, length, features});
  module.in_weight = checked_contiguous(weight, x.type, {width, features});
  module.in_bias = checked_contiguous(kReader.optional(arguments.in_bias, "in_bias"), x.type, {width});
  module.out_weight =
      checked_contiguous(kReader.required(arguments.out_weight, "out_weight"), x.type, {features, features});
  module.out_bias = checked_contiguous(kReader.optional(arguments.out_bias, "out_bias"), x.type, {features});
  module.out = checked_contiguous(kReader.required(arguments.out, "out"), x.type, {batch, length, features});
  params.dtype = kernel_dtype(x.type);
  params.batch = batch;
  params.num_heads = heads;
  params.num_kv_heads = kv_heads;
  params.seqlen_q = params.seqlen_k = length;
  params.head_dim = params.value_dim = head_dim;
  params.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return module;
}

const char kSelfAttentionDoc[] =
    "self_attention(x, in_weight, in_bias, out_weight, out_bias, out, num_heads, key_padding, is_causal, "
    "norm_weight, norm_bias, norm_eps, norm_first, num_threads)\n\n"
    "Computes a whole self-attention module for few rows: projects x to query, key and value, attends, projects the\n"
    "result, and writes out. x, out (B, L, E), in_weight ((H + 2 Hkv) D, E), in_bias ((H + 2 Hkv) D,) or None,\n"
    "out_weight (E, H D), out_bias (E,) or None, key_padding (B, L) bool or None. All tensors but key_padding must\n"
    "have one dtype and be contiguous.\n"
    "With norm_weight (E,) and norm_bias (E,) or None, a layer norm and a residual stand around the module:\n"
    "x + module(norm(x)) if norm_first, else norm(x + module(x)).";

PyObject* self_attention(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    ModuleArguments module;
    PyObject *key_padding, *is_causal;
    ResidualArguments residual;
    PyObject* num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kSelfAttentionDoc);
  cpu::AttentionModuleParams module = read_module(a.module);
  AttentionParams& params = module.attention;
  params.key_padding = key_padding_view(kReader.optional(a.key_padding, "key_padding"), params.batch, params.seqlen_k);
  if (read_bool(a.is_causal)) params.band_right = 0;
  a.residual.read(kReader.required(a.module.x, "x").type, module);
  params.num_threads = thread_count(a.num_threads);
  const double work = static_cast<double>(params.batch) * static_cast<double>(params.seqlen_q) *
                      static_cast<double>(module.features) *
                      static_cast<double>(4 * module.features + 2 * params.seqlen_k);
  run_kernel(work, [&] { cpu::kernels().attention_module(module); });
  Py_RETURN_NONE;
}

const char kAttentionStepDoc[] =
    "attention_step(x, in_weight, in_bias, out_weight, out_bias, out, num_heads, keys, values, lengths, key_lengths, "
    "key_padding, norm_weight, norm_bias, norm_eps, norm_first, num_threads)\n\n"
    "Computes an attention module for one new row of each batch entry, over the keys and values of a cache. The\n"
    "arguments up to num_heads are those of self_attention, with L = 1. keys, values (B, Hkv, S, D) with any strides\n"
    "but that of the last dimension, key_padding (B, S) bool or None.\n"
    "With lengths (B,) int64 and key_lengths (B,) int32, the cache grows: the projected key and value become row\n"
    "lengths[b] of entry b, then lengths and key_lengths count that row. With None, x is projected to queries only.\n"
    "The norm arguments are those of self_attention.\n"
    "IndexError: a cache has no row left. Nothing has been written then.";

PyObject* attention_step(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    ModuleArguments module;
    PyObject *keys, *values, *lengths, *key_lengths, *key_padding;
    ResidualArguments residual;
    PyObject* num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kAttentionStepDoc);
  cpu::AttentionModuleParams module = read_module(a.module);
  AttentionParams& params = module.attention;
  const int64_t batch = params.batch;
  const Argument x = kReader.required(a.module.x, "x");
  x.check_shape({batch, 1, module.features});
  const Argument keys = kReader.required(a.keys, "keys"), values = kReader.required(a.values, "values");
  keys.check_ndim(4);
  params.seqlen_k = keys.size(2);
  const auto rows_of = [&](const Argument& rows) {
    rows.check_type(x.type);
    rows.check_shape({batch, params.num_kv_heads, params.seqlen_k, params.head_dim});
    rows.check_unit_stride(3);
    return TensorView{rows.data(), rows.stride(0), rows.stride(1), rows.stride(2), 1};
  };
  params.key = rows_of(keys);
  params.value = rows_of(values);
  params.key_padding = key_padding_view(kReader.optional(a.key_padding, "key_padding"), batch, params.seqlen_k);
  a.residual.read(x.type, module);
  params.num_threads = thread_count(a.num_threads);

  auto* const lengths =
      static_cast<int64_t*>(checked_contiguous(kReader.optional(a.lengths, "lengths"), ElementType::kInt64, {batch}));
  module.keys = lengths == nullptr ? cpu::ModuleKeys::kGiven : cpu::ModuleKeys::kAppended;
  if (lengths != nullptr) {
    auto* const key_lengths = static_cast<int32_t*>(
        checked_contiguous(kReader.required(a.key_lengths, "key_lengths"), ElementType::kInt32, {batch}));
    for (int64_t b = 0; b < batch; ++b) {
      if (lengths[b] < 0 || lengths[b] >= params.seqlen_k)
        throw py::index_error("lengths: expected 0 to " + std::to_string(params.seqlen_k - 1) +
                              ", so that the cache has a row left, got " + std::to_string(lengths[b]));
    }
    for (int64_t b = 0; b < batch; ++b) key_lengths[b] = static_cast<int32_t>(lengths[b] + 1);
    params.key_lengths = key_lengths;
  }
  const double work = static_cast<double>(batch) * static_cast<double>(module.features) *
                      static_cast<double>(4 * module.features + 2 * params.seqlen_k);
  run_kernel(work, [&] { cpu::kernels().attention_module(module); });
  if (lengths != nullptr) {  // not before the kernel, which may fail to allocate memory
    for (int64_t b = 0; b < batch; ++b) ++lengths[b];
  }
  Py_RETURN_NONE;
}

// The shape (..., E) of rows. Checks that they are contiguous floating-point numbers.
std::vector<int64_t> shape_of_rows(const Argument& x) {
  if (x.tensor.ndim == 0) x.fail("at least 1 dimension", "0");
  x.check_float();
  x.check_contiguous();
  return {x.tensor.shape, x.tensor.shape + x.tensor.ndim};
}

// The arguments of what follows the product of a linear layer.
struct FinishArguments {
  PyObject *bias, *relu, *residual;
  NormArguments norm;
  PyObject *out, *num_threads;

  // shape: that of the product, (..., E)
  cpu::FinishParams read(ElementType type, const std::vector<int64_t>& shape) const {
    cpu::FinishParams p;
    p.dtype = kernel_dtype(type);
    p.features = shape.back();
    p.rows = 1;
    for (size_t dim = 0; dim + 1 < shape.size(); ++dim) p.rows *= shape[dim];
    p.bias = checked_contiguous(kReader.optional(bias, "bias"), type, {p.features});
    p.relu = read_bool(relu);
    const Argument target = kReader.required(out, "out");
    target.check_type(type);
    target.check_shape(shape.data(), static_cast<int>(shape.size()));
    target.check_contiguous();
    p.out = target.data();
    if (const Argument added = kReader.optional(residual, "residual"); added.given) {
      added.check_like(target);
      added.check_contiguous();
      p.residual = added.data();
    }
    p.norm = norm.read(type, p.features);
    p.num_threads = thread_count(num_threads);
    return p;
  }
};

const char kLinearDoc[] =
    "linear(x, weight, bias, relu, residual, norm_weight, norm_bias, norm_eps, out, num_threads)\n\n"
    "Writes x . weight^T + bias to out, for few rows: x (..., in), weight (out, in), bias (out,) or None, out\n"
    "(..., out). If relu is true, negative elements of that become 0. residual (..., out) or None is added. With\n"
    "norm_weight (out,) and norm_bias (out,) or None, out is the layer norm of the result. All tensors must have one\n"
    "dtype and be contiguous.";

PyObject* linear(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *x, *weight;
    FinishArguments finish;
  };
  const auto a = arguments_of<Arguments>(args, count, kLinearDoc);
  const Argument x = kReader.required(a.x, "x");
  const Argument weight = kReader.required(a.weight, "weight");
  std::vector<int64_t> shape = shape_of_rows(x);
  weight.check_ndim(2);
  cpu::LinearParams p;
  p.in = shape.back();
  constexpr int64_t kMostFeatures = std::numeric_limits<int32_t>::max();
  if (p.in > kMostFeatures) x.fail("at most " + std::to_string(kMostFeatures) + " columns", std::to_string(p.in));
  shape.back() = weight.size(0);
  p.x = x.data();
  p.weight = checked_contiguous(weight, x.type, {shape.back(), p.in});
  p.finish = a.finish.read(x.type, shape);
  const double work =
      static_cast<double>(p.finish.rows) * static_cast<double>(p.in) * static_cast<double>(shape.back());
  run_kernel(work, [&] { cpu::kernels().linear(p); });
  Py_RETURN_NONE;
}

const char kFinishRowsDoc[] =
    "finish_rows(x, bias, relu, residual, norm_weight, norm_bias, norm_eps, out, num_threads)\n\n"
    "Does in one pass what follows the product x (..., E) of a linear layer: writes norm(residual + x + bias) to\n"
    "out. bias (E,), residual (..., E), norm_weight (E,) and norm_bias (E,) may be None. Without norm_weight, there "
    "is\n"
    "no norm. If relu is true, negative elements of x + bias become 0. out may be x. All tensors must have one dtype\n"
    "and be contiguous.";

PyObject* finish_rows(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject* x;
    FinishArguments finish;
  };
  const auto a = arguments_of<Arguments>(args, count, kFinishRowsDoc);
  const Argument x = kReader.required(a.x, "x");
  const std::vector<int64_t> shape = shape_of_rows(x);
  cpu::FinishParams p = a.finish.read(x.type, shape);
  p.x = x.data();
  run_kernel(static_cast<double>(p.rows) * static_cast<double>(p.features), [&] { cpu::kernels().finish_rows(p); });
  Py_RETURN_NONE;
}

const char kDropoutDoc[] =
    "dropout(x, out, seed, dropout_p, relu, num_threads)\n\n"
    "Writes x to out, each element multiplied by 0 with probability dropout_p, and otherwise by 1 / (1 - dropout_p).\n"
    "If relu is true, max(x, 0) takes the place of x. x, out: contiguous, of any shape, of one shape and dtype. seed:\n"
    "0-d int64. fused_attn.nn.element_dropout says which elements survive.";

const char kWeightsDropoutDoc[] =
    "weights_dropout(x, out, seed, dropout_p, num_threads)\n\n"
    "Writes attention weights x (B, H, L, S) to out, each multiplied by 0 if forward with this seed drops the weight,\n"
    "and otherwise by 1 / (1 - dropout_p). x, out: contiguous, of one shape and dtype. seed: 0-d int64.";

const char kReluDropoutBackwardDoc[] =
    "relu_dropout_backward(x, out, result, dropout_p, num_threads)\n\n"
    "Writes to out the gradient of the input of dropout(max(input, 0)), whose result is given. x is the gradient of "
    "the\n"
    "result: out = x / (1 - dropout_p) where the result is positive, and 0 elsewhere. All tensors: contiguous, of one\n"
    "shape and dtype.";

// Reads the arguments that dropout and its backward share.
cpu::DropoutParams read_dropout(const Argument& x, const Argument& out, double dropout_p) {
  x.check_float();
  check_dropout_p(dropout_p);
  out.check_like(x);
  x.check_contiguous();
  out.check_contiguous();
  cpu::DropoutParams p;
  p.dtype = kernel_dtype(x.type);
  p.elements = 1;
  for (int i = 0; i < x.tensor.ndim; ++i) p.elements *= x.size(i);
  p.x = x.data();
  p.out = out.data();
  p.threshold = dropout_threshold(dropout_p);
  p.scale = dropout_scale(dropout_p);
  return p;
}

PyObject* dropout(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *x, *out, *seed, *dropout_p, *relu, *num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kDropoutDoc);
  cpu::DropoutParams p =
      read_dropout(kReader.required(a.x, "x"), kReader.required(a.out, "out"), read_double(a.dropout_p));
  const void* const seed = checked_contiguous(kReader.required(a.seed, "seed"), ElementType::kInt64, {});
  p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed));
  p.relu = read_bool(a.relu);
  p.num_threads = thread_count(a.num_threads);
  run_kernel(static_cast<double>(p.elements), [&] { cpu::kernels().dropout(p); });
  Py_RETURN_NONE;
}

PyObject* weights_dropout(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *x, *out, *seed, *dropout_p, *num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kWeightsDropoutDoc);
  const Argument x = kReader.required(a.x, "x");
  x.check_ndim(4);
  cpu::DropoutParams p = read_dropout(x, kReader.required(a.out, "out"), read_double(a.dropout_p));
  p.num_heads = x.size(1);
  p.seqlen_q = x.size(2);
  p.seqlen_k = x.size(3);
  const void* const seed = checked_contiguous(kReader.required(a.seed, "seed"), ElementType::kInt64, {});
  p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed));
  p.num_threads = thread_count(a.num_threads);
  run_kernel(static_cast<double>(p.elements), [&] { cpu::kernels().dropout(p); });
  Py_RETURN_NONE;
}

PyObject* relu_dropout_backward(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *x, *out, *result, *dropout_p, *num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kReluDropoutBackwardDoc);
  const Argument x = kReader.required(a.x, "x"), result = kReader.required(a.result, "result");
  cpu::DropoutParams p = read_dropout(x, kReader.required(a.out, "out"), read_double(a.dropout_p));
  result.check_like(x);
  result.check_contiguous();
  p.result = result.data();
  p.num_threads = thread_count(a.num_threads);
  run_kernel(static_cast<double>(p.elements), [&] { cpu::kernels().dropout(p); });
  Py_RETURN_NONE;
}

}  // namespace
}  // namespace fused_attn
