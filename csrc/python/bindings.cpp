// The Python module fused_attn._C, which contains the CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../cpu/dispatch.h"
#include "entry_points.h"
#include "kernel_call.h"
#include "module_calls.h"
#include "problem.h"
#include "signature.h"

namespace fused_attn {
namespace {

// ---- Attention. kModuleDoc describes the arguments.

void run(void (*kernel)(const AttentionParams&), const Problem& problem) {
  const AttentionParams& params = problem.params;
  const double work = static_cast<double>(problem.batch_entries) * static_cast<double>(params.num_heads) *
                      static_cast<double>(problem.rows_q) * static_cast<double>(params.seqlen_k) *
                      static_cast<double>(params.head_dim + params.value_dim);
  run_kernel(work, [&] { kernel(params); });
}

const char kForwardDoc[] =
    "forward(inputs, results, config, num_threads)\n\n"
    "Writes those of the results that are not None. See the module's docstring for the arguments.";

PyObject* forward(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *inputs, *results, *config, *num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kForwardDoc);
  Problem problem = read_forward(kReader, Inputs::of(a.inputs), Results::of(a.results), a.config);
  problem.params.num_threads = thread_count(a.num_threads);
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
  struct Arguments {
    PyObject *inputs, *saved, *gradients, *config, *num_threads;
  };
  const auto a = arguments_of<Arguments>(args, count, kBackwardDoc);
  Problem problem =
      read_backward(kReader, Inputs::of(a.inputs), Saved::of(a.saved), Gradients::of(a.gradients), a.config);
  check_rounded_dbias(problem);
  problem.params.num_threads = thread_count(a.num_threads);
  run(cpu::kernels().backward, problem);
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
    {"finish_rows", as_c_function(entry_point<finish_rows>), METH_FASTCALL, kFinishRowsDoc},
    {"dropout", as_c_function(entry_point<dropout>), METH_FASTCALL, kDropoutDoc},
    {"weights_dropout", as_c_function(entry_point<weights_dropout>), METH_FASTCALL, kWeightsDropoutDoc},
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
                  "settings"_a = FUSED_ATTN_SETTINGS, "interface"_a = FUSED_ATTN_INTERFACE);
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
block_table (B, P)             int32; needs key_lengths. The call is paged: key (num_pages, page_size, Hkv, D) and value
                               (num_pages, page_size, Hkv, Dv) hold pages, and S = P * page_size.
cu_seqlens_q, _k (N + 1,)      int32. With both, the call is packed: N sequences stand one after another. query, key,
                               value, out and dout have the dimensions (rows, heads, columns), and lse, dlse and row_max
                               (H, rows). The masks above have B = N, L = max_seqlen_q, S = max_seqlen_k. There are
                               no key_ranges. With the first alone, queries are packed, and their keys are paged.
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
