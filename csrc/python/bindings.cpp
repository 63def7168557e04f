// The Python module fused_attn._C, which contains the CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "entry_points.h"
#include "problem.h"

namespace fused_attn {
namespace {

constexpr Reader kReader{ExchangeDevice::kCpu};

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

void run(void (*kernel)(const AttentionParams&), const Problem& problem) {
  const AttentionParams& params = problem.params;
  const double work = static_cast<double>(problem.batch_entries) * static_cast<double>(params.num_heads) *
                      static_cast<double>(problem.rows_q) * static_cast<double>(params.seqlen_k) *
                      static_cast<double>(params.head_dim + params.value_dim);
  run_kernel(work, [&] { kernel(params); });
}

// The address of a contiguous tensor of this dtype and shape. Null if the caller passed None.
void* checked_contiguous(const Argument& argument, ElementType type, std::initializer_list<int64_t> shape) {
  if (!argument.given) return nullptr;
  argument.check_type(type);
  argument.check_shape(shape);
  argument.check_contiguous();
  return argument.data();
}

// ---- The functions that Python calls at every attention. kModuleDoc describes their arguments.

const char kSignatureDoc[] =
    "signature(*arguments)\n\n"
    "The arguments of a call as hashable bytes, which are int64 words. Of a tensor, shape and dtype count, and its\n"
    "contents do not. Two calls with equal bytes have the same plan. Returns None if some argument is neither a plain\n"
    "CPU tensor nor a None, bool, int, float, str, or tuple or list of these. A subclass of Tensor, for instance, may\n"
    "report a shape that is not the shape of its memory.";

constexpr ElementType kSignatureTypes[] = {ElementType::kFloat32,  ElementType::kFloat64, ElementType::kFloat16,
                                           ElementType::kBFloat16, ElementType::kBool,    ElementType::kInt32};

// The words of a signature. Each argument begins with a word that tells its kind: the index of the dtype in
// kSignatureTypes for a tensor, a negative number for others. So no two rows of arguments have the same words.
class Signature {
 public:
  // Appends an argument. Returns false if the argument cannot be described.
  bool append(PyObject* object) {
    if (object == Py_None) return append_words({-1});
    if (Py_TYPE(object) == torch_.type || Py_TYPE(object) == torch_.parameter_type) return append_tensor(object);
    if (PyBool_Check(object)) return append_words({-2, object == Py_True});
    if (PyFloat_Check(object)) {
      int64_t bits;
      const double value = PyFloat_AS_DOUBLE(object);
      std::memcpy(&bits, &value, sizeof(bits));
      return append_words({-3, bits});
    }
    if (PyLong_Check(object)) {
      int overflow;
      const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
      return overflow == 0 && append_words({-4, value});
    }
    if (PyUnicode_CheckExact(object)) {
      const Py_ssize_t length = PyUnicode_GET_LENGTH(object);
      bool fits = append_words({-5, length});
      for (Py_ssize_t i = 0; fits && i < length; ++i) fits = append_words({PyUnicode_READ_CHAR(object, i)});
      return fits;
    }
    if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
    PyObject* const* items = PySequence_Fast_ITEMS(object);
    bool fits = append_words({-6, PySequence_Fast_GET_SIZE(object)});
    for (Py_ssize_t i = 0; fits && i < PySequence_Fast_GET_SIZE(object); ++i) fits = append(items[i]);
    return fits;
  }

  PyObject* bytes() const {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_), (end_ - words_) * sizeof(int64_t));
  }

 private:
  bool append_words(std::initializer_list<int64_t> words) {
    if (std::end(words_) - end_ < static_cast<ptrdiff_t>(words.size())) return false;
    end_ = std::copy(words.begin(), words.end(), end_);
    return true;
  }

  // The entry point of the kernel reads the tensor again, which takes tens of nanoseconds. A cache of the first read
  // would not be safe: in between, a tensor may be resized, or freed and its address given to another one.
  bool append_tensor(PyObject* object) {
    ExchangeTensor tensor;
    if (torch_.api->read_tensor(object, &tensor) != 0) {
      PyErr_Clear();  // for instance a sparse tensor
      return false;
    }
    const auto* type = std::find(std::begin(kSignatureTypes), std::end(kSignatureTypes), element_type(tensor));
    if (type == std::end(kSignatureTypes) || tensor.device != ExchangeDevice::kCpu) return false;
    if (!append_words({type - kSignatureTypes, tensor.ndim}) || std::end(words_) - end_ < tensor.ndim) return false;
    end_ = std::copy_n(tensor.shape, tensor.ndim, end_);
    return true;
  }

  const TorchTensors& torch_ = torch_tensors();
  int64_t words_[128];
  int64_t* end_ = words_;
};

PyObject* signature(PyObject* const* args, Py_ssize_t count) {
  Signature signature;
  if (!std::all_of(args, args + count, [&](PyObject* object) { return signature.append(object); })) Py_RETURN_NONE;
  return signature.bytes();
}

// The function that `constructor` returns. `made` is the tuple (type, number of fields).
PyObject* named_tuple(PyObject* made, PyObject* const* items, Py_ssize_t count) {
  auto* type = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(made, 0));
  if (count != PyLong_AsSsize_t(PyTuple_GET_ITEM(made, 1)))
    return PyErr_Format(PyExc_TypeError, "%s: expected %S items, got %zd", type->tp_name, PyTuple_GET_ITEM(made, 1),
                        count);
  PyObject* tuple = type->tp_alloc(type, count);
  if (tuple == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(items[i]);
    PyTuple_SET_ITEM(tuple, i, items[i]);
  }
  return tuple;
}

const char kConstructorDoc[] =
    "constructor(type, num_fields)\n\n"
    "A function (*items) that makes a named tuple of this type in a quarter of the time that the type takes.";

PyObject* constructor(PyObject* const* args, Py_ssize_t count) {
  static PyMethodDef definition{"named_tuple", as_c_function(named_tuple), METH_FASTCALL, nullptr};
  check_count(count, 2, kConstructorDoc);
  if (!PyType_Check(args[0]) || !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(args[0]), &PyTuple_Type) ||
      !PyLong_Check(args[1]))
    throw py::type_error("constructor: expected a subclass of tuple and a number");
  const py::tuple made = py::make_tuple(py::handle(args[0]), py::handle(args[1]));
  return PyCFunction_New(&definition, made.ptr());
}

const char kForwardDoc[] =
    "forward(inputs, results, config, num_threads)\n\n"
    "Writes those of the results that are not None. See the module's docstring for the arguments.";

PyObject* forward(PyObject* const* args, Py_ssize_t count) {
  check_count(count, 4, kForwardDoc);
  Problem problem = read_forward(kReader, Inputs::of(args[0]), Results::of(args[1]), args[2]);
  problem.params.num_threads = thread_count(args[3]);
  run(cpu::kernels().forward, problem);
  Py_RETURN_NONE;
}

const char kBackwardDoc[] =
    "backward(inputs, saved, gradients, config, num_threads)\n\n"
    "Overwrites the gradients that are not None. See the module's docstring for the arguments.";

// Refuses a dbias of the query's dtype whose entries are sums of several numbers: they would be rounded several times.
void check_rounded_dbias(const Problem& problem) {
  const TensorView& dbias = problem.params.dbias;
  const bool has_entry_of_each_score =
      dbias.stride_batch != 0 && dbias.stride_head != 0 && dbias.stride_row != 0 && dbias.stride_col != 0;
  const bool is_rounded = problem.type != problem.accumulate_type && problem.params.dbias_dtype == problem.params.dtype;
  if (dbias.data != nullptr && is_rounded && !has_entry_of_each_score)
    throw py::value_error("dbias: expected the accumulate dtype, because scores share entries of dbias");
}

PyObject* backward(PyObject* const* args, Py_ssize_t count) {
  check_count(count, 5, kBackwardDoc);
  Problem problem = read_backward(kReader, Inputs::of(args[0]), Saved::of(args[1]), Gradients::of(args[2]), args[3]);
  check_rounded_dbias(problem);
  problem.params.num_threads = thread_count(args[4]);
  run(cpu::kernels().backward, problem);
  Py_RETURN_NONE;
}

// Reads the arguments norm_weight (E,), norm_bias (E,) or None, and norm_eps. Without a weight, there is no norm.
cpu::LayerNormParams read_norm(PyObject* const* args, ElementType type, int64_t features) {
  cpu::LayerNormParams norm;
  norm.weight = checked_contiguous(kReader.optional(args[0], "norm_weight"), type, {features});
  norm.bias = checked_contiguous(kReader.optional(args[1], "norm_bias"), type, {features});
  norm.eps = PyFloat_AsDouble(args[2]);
  if (norm.eps == -1 && PyErr_Occurred()) throw py::error_already_set();
  return norm;
}

// Reads the first seven arguments of `self_attention` and of `attention_step`: x (B, L, E) to num_heads.
cpu::AttentionModuleParams read_module(PyObject* const* args) {
  const Argument x = kReader.required(args[0], "x");
  const Argument weight = kReader.required(args[1], "in_weight");
  if (x.tensor.ndim != 3) x.fail("3 dimensions", std::to_string(x.tensor.ndim));
  if (x.type > ElementType::kBFloat16) x.fail("float32, float64, float16 or bfloat16", name_of(x.type));
  if (weight.tensor.ndim != 2) weight.fail("2 dimensions", std::to_string(weight.tensor.ndim));
  const int64_t batch = x.size(0), length = x.size(1), features = x.size(2), width = weight.size(0);
  const int64_t heads = PyLong_AsLongLong(args[6]);
  if (heads == -1 && PyErr_Occurred()) throw py::error_already_set();
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
  module.in_bias = checked_contiguous(kReader.optional(args[2], "in_bias"), x.type, {width});
  module.out_weight = checked_contiguous(kReader.required(args[3], "out_weight"), x.type, {features, features});
  module.out_bias = checked_contiguous(kReader.optional(args[4], "out_bias"), x.type, {features});
  module.out = checked_contiguous(kReader.required(args[5], "out"), x.type, {batch, length, features});
  params.dtype = kernel_dtype(x.type);
  params.batch = batch;
  params.num_heads = heads;
  params.num_kv_heads = kv_heads;
  params.seqlen_q = params.seqlen_k = length;
  params.head_dim = params.value_dim = head_dim;
  params.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return module;
}

// Reads what stands around a module: norm_weight, norm_bias, norm_eps and norm_first.
void read_residual(PyObject* const* args, ElementType type, cpu::AttentionModuleParams& module) {
  module.norm = read_norm(args, type, module.features);
  const int norm_first = PyObject_IsTrue(args[3]);
  if (norm_first < 0) throw py::error_already_set();
  if (module.norm.weight != nullptr)
    module.residual = norm_first != 0 ? cpu::Residual::kNormFirst : cpu::Residual::kNormLast;
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
  check_count(count, 14, kSelfAttentionDoc);
  cpu::AttentionModuleParams module = read_module(args);
  AttentionParams& params = module.attention;
  params.key_padding = key_padding_view(kReader.optional(args[7], "key_padding"), params.batch, params.seqlen_k);
  const int is_causal = PyObject_IsTrue(args[8]);
  if (is_causal < 0) throw py::error_already_set();
  if (is_causal != 0) params.window_right = 0;
  read_residual(args + 9, kReader.required(args[0], "x").type, module);
  params.num_threads = thread_count(args[13]);
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
  check_count(count, 17, kAttentionStepDoc);
  cpu::AttentionModuleParams module = read_module(args);
  AttentionParams& params = module.attention;
  const int64_t batch = params.batch;
  const Argument x = kReader.required(args[0], "x");
  x.check_shape({batch, 1, module.features});
  const Argument keys = kReader.required(args[7], "keys"), values = kReader.required(args[8], "values");
  if (keys.tensor.ndim != 4) keys.fail("4 dimensions", std::to_string(keys.tensor.ndim));
  params.seqlen_k = keys.size(2);
  const auto rows_of = [&](const Argument& rows) {
    rows.check_type(x.type);
    rows.check_shape({batch, params.num_kv_heads, params.seqlen_k, params.head_dim});
    rows.check_unit_stride(3);
    return TensorView{rows.data(), rows.stride(0), rows.stride(1), rows.stride(2), 1};
  };
  params.key = rows_of(keys);
  params.value = rows_of(values);
  params.key_padding = key_padding_view(kReader.optional(args[11], "key_padding"), batch, params.seqlen_k);
  read_residual(args + 12, x.type, module);
  params.num_threads = thread_count(args[16]);

  auto* const lengths =
      static_cast<int64_t*>(checked_contiguous(kReader.optional(args[9], "lengths"), ElementType::kInt64, {batch}));
  module.keys = lengths == nullptr ? cpu::ModuleKeys::kGiven : cpu::ModuleKeys::kAppended;
  if (lengths != nullptr) {
    auto* const key_lengths = static_cast<int32_t*>(
        checked_contiguous(kReader.required(args[10], "key_lengths"), ElementType::kInt32, {batch}));
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

const char kLinearDoc[] =
    "linear(x, weight, bias, residual, norm_weight, norm_bias, norm_eps, out, num_threads)\n\n"
    "Writes x . weight^T + bias to out, for few rows: x (..., in), weight (out, in), bias (out,) or None, out\n"
    "(..., out). residual (..., out) or None is added. With norm_weight (out,) and norm_bias (out,) or None, out is\n"
    "the layer norm of that sum. All tensors must have one dtype and be contiguous.";

PyObject* linear(PyObject* const* args, Py_ssize_t count) {
  check_count(count, 9, kLinearDoc);
  const Argument x = kReader.required(args[0], "x");
  const Argument weight = kReader.required(args[1], "weight");
  const int last = x.tensor.ndim - 1;
  if (last < 0) x.fail("at least 1 dimension", "0");
  if (x.type > ElementType::kBFloat16) x.fail("float32, float64, float16 or bfloat16", name_of(x.type));
  if (weight.tensor.ndim != 2) weight.fail("2 dimensions", std::to_string(weight.tensor.ndim));
  cpu::LinearParams p;
  p.dtype = kernel_dtype(x.type);
  p.rows = 1;
  for (int dim = 0; dim < last; ++dim) p.rows *= x.size(dim);
  p.in = x.size(last);
  p.out = weight.size(0);
  constexpr int64_t kMostFeatures = std::numeric_limits<int32_t>::max();
  if (p.in > kMostFeatures) x.fail("at most " + std::to_string(kMostFeatures) + " columns", std::to_string(p.in));
  x.check_contiguous();
  p.x = x.data();
  p.weight = checked_contiguous(weight, x.type, {p.out, p.in});
  p.bias = checked_contiguous(kReader.optional(args[2], "bias"), x.type, {p.out});
  p.norm = read_norm(args + 4, x.type, p.out);
  const Argument out = kReader.required(args[7], "out");
  std::vector<int64_t> shape(x.tensor.shape, x.tensor.shape + last);
  shape.push_back(p.out);
  out.check_type(x.type);
  out.check_shape(shape.data(), last + 1);
  out.check_contiguous();
  p.y = out.data();
  if (const Argument residual = kReader.optional(args[3], "residual"); residual.given) {
    residual.check_like(out);
    residual.check_contiguous();
    p.residual = residual.data();
  }
  p.num_threads = thread_count(args[8]);
  const double work = static_cast<double>(p.rows) * static_cast<double>(p.in) * static_cast<double>(p.out);
  run_kernel(work, [&] { cpu::kernels().linear(p); });
  Py_RETURN_NONE;
}

const char kDropoutDoc[] =
    "dropout(x, out, seed, dropout_p, relu, num_threads)\n\n"
    "Writes x to out, each element multiplied by 0 with probability dropout_p, and otherwise by 1 / (1 - dropout_p).\n"
    "If relu is true, max(x, 0) takes the place of x. x, out: contiguous, of any shape, of one shape and dtype. seed:\n"
    "0-d int64. fused_attn.nn.element_dropout says which elements survive.";

const char kReluDropoutBackwardDoc[] =
    "relu_dropout_backward(x, out, result, dropout_p, num_threads)\n\n"
    "Writes to out the gradient of the input of dropout(max(input, 0)), whose result is given. x is the gradient of "
    "the\n"
    "result: out = x / (1 - dropout_p) where the result is positive, and 0 elsewhere. All tensors: contiguous, of one\n"
    "shape and dtype.";

// Reads the arguments that dropout and its backward share.
cpu::DropoutParams read_dropout(const Argument& x, PyObject* out_argument, PyObject* p_argument) {
  const Argument out = kReader.required(out_argument, "out");
  if (x.type > ElementType::kBFloat16) x.fail("float32, float64, float16 or bfloat16", name_of(x.type));
  const double dropout_p = PyFloat_AsDouble(p_argument);
  if (dropout_p == -1.0 && PyErr_Occurred()) throw py::error_already_set();
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
  check_count(count, 6, kDropoutDoc);
  cpu::DropoutParams p = read_dropout(kReader.required(args[0], "x"), args[1], args[3]);
  const void* const seed = checked_contiguous(kReader.required(args[2], "seed"), ElementType::kInt64, {});
  p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed));
  const int relu = PyObject_IsTrue(args[4]);
  if (relu < 0) throw py::error_already_set();
  p.relu = relu != 0;
  p.num_threads = thread_count(args[5]);
  run_kernel(static_cast<double>(p.elements), [&] { cpu::kernels().dropout(p); });
  Py_RETURN_NONE;
}

PyObject* relu_dropout_backward(PyObject* const* args, Py_ssize_t count) {
  check_count(count, 5, kReluDropoutBackwardDoc);
  const Argument x = kReader.required(args[0], "x"), result = kReader.required(args[2], "result");
  cpu::DropoutParams p = read_dropout(x, args[1], args[3]);
  result.check_like(x);
  result.check_contiguous();
  p.result = result.data();
  p.num_threads = thread_count(args[4]);
  run_kernel(static_cast<double>(p.elements), [&] { cpu::kernels().dropout(p); });
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"signature", as_c_function(entry_point<signature>), METH_FASTCALL, kSignatureDoc},
    {"constructor", as_c_function(entry_point<constructor>), METH_FASTCALL, kConstructorDoc},
    {"forward", as_c_function(entry_point<forward>), METH_FASTCALL, kForwardDoc},
    {"backward", as_c_function(entry_point<backward>), METH_FASTCALL, kBackwardDoc},
    {"self_attention", as_c_function(entry_point<self_attention>), METH_FASTCALL, kSelfAttentionDoc},
    {"attention_step", as_c_function(entry_point<attention_step>), METH_FASTCALL, kAttentionStepDoc},
    {"linear", as_c_function(entry_point<linear>), METH_FASTCALL, kLinearDoc},
    {"dropout", as_c_function(entry_point<dropout>), METH_FASTCALL, kDropoutDoc},
    {"relu_dropout_backward", as_c_function(entry_point<relu_dropout_backward>), METH_FASTCALL,
     kReluDropoutBackwardDoc},
    {nullptr, nullptr, 0, nullptr},
};

// ---- The module

// cpu::select_isa, but an instruction set that this machine cannot run raises ValueError.
void select_cpu_isa(const std::string& isa) {
  if (cpu::select_isa(isa)) return;
  std::string available;
  for (const std::string& name : cpu::runnable_isas()) available += (available.empty() ? "" : ", ") + name;
  throw py::value_error("isa: expected one of " + available + ", got " + isa);
}

py::dict build_info() {
  using namespace py::literals;
#if defined(_OPENMP)
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
  return py::dict("version"_a = FUSED_ATTN_VERSION, "compiler"_a = FUSED_ATTN_COMPILER, "openmp"_a = openmp,
                  "cpu_isas"_a = cpu::compiled_isas(), "sanitize"_a = bool{FUSED_ATTN_SANITIZE},
                  "settings"_a = FUSED_ATTN_SETTINGS);
}

const char kModuleDoc[] = R"(The native kernels of fused_attn.

Private: only fused_attn uses this module. Tensors are torch tensors on the CPU. The functions do not copy or keep them.
A shape, dtype or stride that a kernel cannot use raises ValueError. B, H, L, D and so on are the sizes of
csrc/common/attention_params.h. "accumulate" is float64 if query is float64, otherwise float32.

inputs       the tuple (query, key, value, bias, key_bias, relative_bias, sinks, seed, mask, key_ranges, key_padding,
             key_lengths, cu_seqlens_q, cu_seqlens_k, block_table); all but the first three may be None
results      the tuple (out, lse, row_max); lse and row_max may be None
saved        the tuple (out, lse, dout, dlse)
gradients    the tuple (dquery, dkey, dvalue, dbias, dkey_bias, drelative_bias, dsinks), each in the shape of its
             input, or None
config       a Config
num_threads  the largest number of threads that compute

query (B, H, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv), out (B, H, L, Dv): one dtype, last stride 1
lse, row_max (B, H, L)         accumulate, last stride 1
bias (B, H, L, S)              the dtype or accumulate; any strides; 1 in place of any size broadcasts
key_bias (B, S)                accumulate, last stride 1
relative_bias (H or 1, L+S-1)  accumulate, last stride 1
sinks (H,)                     accumulate
seed ()                        int64; needed when dropout_p > 0
mask (B, H, L, S)              bool, True = attend; any strides; 1 in place of any size broadcasts
key_ranges (B, H, L, N, 2)     int32, the last two dimensions contiguous; 1 in place of B, H or L broadcasts
key_padding (B, S)             bool, True = ignore
key_lengths (B,)               int32, at most S
block_table (B, P)             int32; needs key_lengths. The call is paged: key (num_pages, Hkv, page_size, D) and value
                               (num_pages, Hkv, page_size, Dv) hold pages, and S = P * page_size.
cu_seqlens_q, _k (N + 1,)      int32. With both, the call is packed: N sequences stand one after another in tensors with
                               B = 1, and the masks above have B = N, L = max_seqlen_q, S = max_seqlen_k. With the first
                               alone, queries are packed, and their keys are paged.
dlse (B, H, L)                 accumulate, any strides; None = zero

dbias, dkey_bias, drelative_bias and dsinks are accumulate. A broadcast dimension of dbias or drelative_bias is summed
over. If no dimension of dbias is broadcast, dbias may have the dtype of query.)";

}  // namespace
}  // namespace fused_attn

PYBIND11_MODULE(_C, module) {
  using namespace fused_attn;
  module.doc() = kModuleDoc;

  define_config(module);
  if (PyModule_AddFunctions(module.ptr(), kMethods) != 0) throw py::error_already_set();

  module.def("cpu_isas", &cpu::runnable_isas, "The instruction sets that this machine can run, best last.");
  module.def("best_cpu_isa", &cpu::best_isa, "The best instruction set of this machine, which the build may lack.");
  module.def("cpu_isa", [] { return cpu::kernels().isa; }, "The instruction set in use.");
  module.def("select_cpu_isa", &select_cpu_isa, py::arg("isa"),
             "From now on, the kernels of another of cpu_isas() are used; for tests.");
  module.def("build_info", &build_info, "How this module was built.");
}
