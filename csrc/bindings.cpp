// The Python module fused_attn._C: the kernels for CPUs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "cpu/dispatch.h"
#include "problem_reader.h"

namespace fused_attn {
namespace {

constexpr Reader kReader{ExchangeDevice::kCpu};

int32_t thread_count(PyObject* num_threads) {
  const long threads = PyLong_AsLong(num_threads);
  if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (threads < 1) throw py::value_error("num_threads: expected at least 1, got " + std::to_string(threads));
  return static_cast<int32_t>(std::min<long>(threads, 1 << 16));
}

void run(void (*kernel)(const AttentionParams&), const Problem& problem) {
  // Below this many multiply-adds (some microseconds) another thread gains nothing from the GIL.
  constexpr double kWorthReleasing = 1 << 18;
  const AttentionParams& params = problem.params;
  const double work = static_cast<double>(problem.batch_entries) * static_cast<double>(params.num_heads) *
                      static_cast<double>(problem.rows_q) * static_cast<double>(params.seqlen_k) *
                      static_cast<double>(params.head_dim + params.value_dim);
  if (work < kWorthReleasing) {
    kernel(params);
  } else {
    const py::gil_scoped_release released;
    kernel(params);
  }
}

// ---- What Python calls at every step.

const char kSignatureDoc[] =
    "signature(query, key, value, *others)\n\n"
    "Shapes and dtypes of plain CPU tensors as hashable bytes. They are int64 words: for each tensor the index of its\n"
    "dtype in signature_dtypes, the number of its dimensions and its sizes; -1 for one of others that is None.\n"
    "None if a tensor is anything else, such as of a subclass, whose methods may tell another shape than its memory.";

constexpr ElementType kSignatureTypes[] = {ElementType::kFloat32, ElementType::kFloat64, ElementType::kFloat16,
                                           ElementType::kBFloat16, ElementType::kBool};

PyObject* signature(PyObject* const* args, Py_ssize_t count) {
  constexpr int kMaxTensors = 8, kMaxDims = 8;
  int64_t words[kMaxTensors * (2 + kMaxDims)];
  int64_t* end = words;
  const TorchTensors& torch = torch_tensors();
  if (count > kMaxTensors) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (args[i] == Py_None && i >= 3) {
      *end++ = -1;
      continue;
    }
    if (Py_TYPE(args[i]) != torch.type && Py_TYPE(args[i]) != torch.parameter_type) Py_RETURN_NONE;
    ExchangeTensor tensor;
    if (torch.api->read_tensor(args[i], &tensor) != 0) {
      PyErr_Clear();  // for instance a sparse tensor
      Py_RETURN_NONE;
    }
    const auto* type = std::find(std::begin(kSignatureTypes), std::end(kSignatureTypes), element_type(tensor));
    if (type == std::end(kSignatureTypes) || tensor.device != ExchangeDevice::kCpu || tensor.ndim > kMaxDims)
      Py_RETURN_NONE;
    *end++ = type - kSignatureTypes;
    *end++ = tensor.ndim;
    end = std::copy_n(tensor.shape, tensor.ndim, end);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words), (end - words) * sizeof(int64_t));
}

const char kForwardDoc[] =
    "forward(query, key, value, out, lse, config, masks, num_threads)\n\n"
    "Writes out, and lse unless it is None. See the module's docstring for the arguments.";

PyObject* forward(PyObject* const* args, Py_ssize_t count) {
  check_count(count, 8, kForwardDoc);
  Problem problem = read_problem(kReader, {args[0], args[1], args[2], args[3], args[4]}, args[5], args[6]);
  problem.params.num_threads = thread_count(args[7]);
  run(cpu::kernels().forward, problem);
  Py_RETURN_NONE;
}

const char kBackwardDoc[] =
    "backward(dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dbias, drelative_bias, dsinks, config,\n"
    "         masks, num_threads)\n\n"
    "Overwrites those of dquery ... dsinks that are not None. See the module's docstring for the arguments.";

PyObject* backward(PyObject* const* args, Py_ssize_t count) {
  check_count(count, 16, kBackwardDoc);
  Problem problem = read_problem(kReader, {args[2], args[3], args[4], args[5], args[6]}, args[13], args[14]);
  AttentionParams& params = problem.params;
  params.num_threads = thread_count(args[15]);
  if (params.lse.data == nullptr) kReader.required(args[6], "lse");  // raises: here it is an input
  set_gradients(problem, kReader, {args[0], args[1], args[7], args[8], args[9]});
  if (const Argument dbias = kReader.optional(args[10], "dbias"); dbias.given) {
    dbias.check_type(problem.accumulate_type);
    params.dbias = dbias.scores_view({params.batch, params.num_heads, params.seqlen_q, params.seqlen_k});
  }
  const Argument drelative_bias = kReader.optional(args[11], "drelative_bias");
  check_relative_bias(drelative_bias, problem);
  params.drelative_bias = per_head_view(drelative_bias);
  const Argument dsinks = kReader.optional(args[12], "dsinks");
  check_sinks(dsinks, problem);
  params.dsinks = per_head_view(dsinks);

  const auto check_input = [](const TensorView& gradient, const TensorView& input, const char* name) {
    if (gradient.data != nullptr && input.data == nullptr)
      throw py::value_error(std::string("d") + name + ": expected None, as " + name + " is None");
  };
  check_input(params.dbias, params.bias, "bias");
  check_input(params.drelative_bias, params.relative_bias, "relative_bias");
  check_input(params.dsinks, params.sinks, "sinks");

  run(cpu::kernels().backward, problem);
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"signature", as_c_function(entry_point<signature>), METH_FASTCALL, kSignatureDoc},
    {"forward", as_c_function(entry_point<forward>), METH_FASTCALL, kForwardDoc},
    {"backward", as_c_function(entry_point<backward>), METH_FASTCALL, kBackwardDoc},
    {nullptr, nullptr, 0, nullptr},
};

// ---- The module

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
                  "cpu_isas"_a = cpu::compiled_isas(), "sanitize"_a = bool{FUSED_ATTN_SANITIZE});
}

const char kModuleDoc[] = R"(The native kernels of fused_attn.

Private: fused_attn.backends uses it. Tensors are torch tensors on the CPU, read where they lie and never kept;
shapes, dtypes and strides are checked, and what does not fit raises ValueError. B, H, L, D and so on are the sizes of
csrc/attention_params.h; "accumulate" is float64 for float64 problems and float32 otherwise.

query (B, H, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv), out (B, H, L, Dv): one dtype, last stride 1
lse (B, H, L)                  accumulate, last stride 1
config                         a Config
key_padding (B, S)             bool, True = ignore
mask (B, H, L, S)              bool, True = attend; any strides; 1 in place of any size broadcasts
bias (B, H, L, S)              the dtype or accumulate; any strides; 1 in place of any size broadcasts
relative_bias (H or 1, L+S-1)  accumulate, last stride 1
sinks (H,)                     accumulate
seed ()                        int64; needed when dropout_p > 0
cu_seqlens_q, _k (N + 1,)      int32. Both given: a packed problem of N sequences; the tensors have B = 1 and all rows one
                               after another, and the masks above have B = N, L = max_seqlen_q, S = max_seqlen_k.
num_threads                    at most so many threads work

Masks are None or the tuple (key_padding, mask, bias, relative_bias, sinks, seed, cu_seqlens_q, cu_seqlens_k), each None
or a tensor. Gradients have the shapes of what they belong to; dbias, drelative_bias and dsinks are accumulate, and what
broadcasts in dbias or drelative_bias is summed over. dlse may have any strides.)";

}  // namespace
}  // namespace fused_attn

PYBIND11_MODULE(_C, module) {
  using namespace fused_attn;
  module.doc() = kModuleDoc;

  define_config(module);
  if (PyModule_AddFunctions(module.ptr(), kMethods) != 0) throw py::error_already_set();

  py::tuple signature_dtypes(std::size(kSignatureTypes));
  for (size_t i = 0; i < std::size(kSignatureTypes); ++i) signature_dtypes[i] = name_of(kSignatureTypes[i]);
  module.attr("signature_dtypes") = signature_dtypes;

  module.def("cpu_isas", &cpu::runnable_isas, "The instruction sets that this machine can run, best last.");
  module.def("cpu_isa", [] { return cpu::kernels().isa; }, "The instruction set in use.");
  module.def("select_cpu_isa", &select_cpu_isa, py::arg("isa"), "Uses another of cpu_isas(); for tests.");
  module.def("build_info", &build_info, "How this module was built.");
}
