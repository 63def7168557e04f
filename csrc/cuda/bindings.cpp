// The Python module of the CUDA kernels: fused_attn._cuda. Tests also build it with the emulation in place of a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>
#include <type_traits>

#include "../python/entry_points.h"
#include "../python/problem.h"
#include "attention.h"

namespace fused_attn::gpu {
namespace {

const ExchangeDevice kDevice = runs_on_cpu() ? ExchangeDevice::kCpu : ExchangeDevice::kCuda;

// reader_like: a Reader that expects tensors on the device of query.
Reader reader_like(PyObject* query) {
  const Argument argument = Reader{kDevice}.required(query, "query");
  return {kDevice, kDevice == ExchangeDevice::kCuda ? argument.tensor.device_index : -1};
}

// torch's current stream of the reader's device; null with the emulation.
void* current_stream(const Reader& reader) {
  void* stream = nullptr;
  if (kDevice == ExchangeDevice::kCuda &&
      torch_tensors().api->current_stream(kDevice, reader.device_index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

// A number of splits that Python has passed.
int32_t checked_splits(int64_t count, int32_t least, const char* name) {
  if (count < least || count > kMaxSplits)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(least) + " to " +
                          std::to_string(kMaxSplits) + ", got " + std::to_string(count));
  return static_cast<int32_t>(count);
}

// Makes a Call from what Python has passed, without splits. Throws if the kernels do not support a dtype, head dim or
// alignment.
Call read_call(const Reader& reader, const Problem& problem, PyObject* architecture, PyObject* workspace) {
  Call call;
  call.params = problem.params;
  call.batch_entries = problem.batch_entries;
  call.rows_q = problem.rows_q;
  call.rows_k = problem.rows_k;
  call.architecture = static_cast<int>(read_integer(architecture));
  if (const Argument argument = reader.optional(workspace, "workspace"); argument.given) {
    argument.check_type(ElementType::kFloat32);
    argument.check_unit_stride(0);
    call.workspace = argument.data();
    call.workspace_bytes = argument.size(0) * static_cast<int64_t>(sizeof(float));
    if (const auto beyond = reinterpret_cast<uintptr_t>(call.workspace) % kWorkspaceAlignment; beyond != 0)
      throw py::value_error("workspace: expected memory that starts at a multiple of " +
                            std::to_string(kWorkspaceAlignment) + " bytes, got one that starts " +
                            std::to_string(beyond) + " bytes beyond");
  }
  call.stream = current_stream(reader);
  call.device = reader.device_index;

  // What the kernels need of tensors. fused_attn.backends.cuda passes nothing else, so these errors show bugs.
  const AttentionParams& params = call.params;
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16)
    throw py::value_error("query: expected float16 or bfloat16");
  constexpr int64_t kDimStep = 8;
  if (params.head_dim % kDimStep != 0 || params.value_dim % kDimStep != 0)
    throw py::value_error("query, value: expected head dims that are multiples of 8");
  constexpr int64_t kChunk = 8;  // elements that are read at once
  const auto check_rows = [&](const TensorView& view, int64_t entries, int64_t heads, int64_t rows, const char* name) {
    const bool fits = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                      (entries <= 1 || view.stride_batch % kChunk == 0) &&
                      (heads <= 1 || view.stride_head % kChunk == 0) && (rows <= 1 || view.stride_row % kChunk == 0);
    if (!fits) throw py::value_error(std::string(name) + ": expected rows that start at multiples of 16 bytes");
  };
  const int64_t heads = params.num_heads, kv_heads = params.num_kv_heads, entries = call.batch_entries;
  const int64_t key_entries = params.block_table != nullptr ? params.num_pages : entries;
  check_rows(params.query, entries, heads, call.rows_q, "query");
  check_rows(params.key, key_entries, kv_heads, call.rows_k, "key");
  check_rows(params.value, key_entries, kv_heads, call.rows_k, "value");
  check_rows(params.out, entries, heads, call.rows_q, "out");
  check_rows(params.dout, entries, heads, call.rows_q, "dout");
  check_rows(params.dquery, entries, heads, call.rows_q, "dquery");
  check_rows(params.dkey, entries, kv_heads, call.rows_k, "dkey");
  check_rows(params.dvalue, entries, kv_heads, call.rows_k, "dvalue");
  return call;
}

// Reads what Python passes to workspace_bytes: each argument has the name of a field.
WorkspaceNeeds read_needs(const py::kwargs& given) {
  size_t names = 0;
  const auto read = [&](const char* name, auto& field) {
    if (!given.contains(name)) throw py::type_error(std::string("workspace_bytes: no argument ") + name);
    field = given[name].cast<std::decay_t<decltype(field)>>();
    ++names;
  };
  WorkspaceNeeds needs;
  read("architecture", needs.architecture);
  read("is_backward", needs.is_backward);
  read("batch", needs.batch);
  read("batch_entries", needs.batch_entries);
  read("num_heads", needs.num_heads);
  read("num_kv_heads", needs.num_kv_heads);
  read("rows_q", needs.rows_q);
  read("rows_k", needs.rows_k);
  read("seqlen_q", needs.seqlen_q);
  read("seqlen_k", needs.seqlen_k);
  read("head_dim", needs.head_dim);
  read("value_dim", needs.value_dim);
  read("is_packed", needs.is_packed);
  read("has_key_padding", needs.has_key_padding);
  read("mask_entries", needs.mask_entries);
  read("relative_bias_heads", needs.relative_bias_heads);
  read("decode_splits", needs.splits.decode);
  read("large_splits", needs.splits.large);
  read("dq_splits", needs.gradient_splits.dq);
  read("dk_splits", needs.gradient_splits.dk);
  read("wants_dquery", needs.wants_dquery);
  read("wants_dkey", needs.wants_dkey);
  read("wants_dvalue", needs.wants_dvalue);
  read("dbias_shape", needs.dbias_shape);
  read("wants_dkey_bias", needs.wants_dkey_bias);
  read("wants_drelative_bias", needs.wants_drelative_bias);
  checked_splits(needs.gradient_splits.dq, 1, "dq_splits");
  checked_splits(needs.gradient_splits.dk, 1, "dk_splits");
  if (names != given.size()) throw py::type_error("workspace_bytes: an argument that it does not have");
  return needs;
}

// Calls a function without Python's global lock. A lack of memory on the GPU becomes the error that torch raises for
// it.
template <class Function>
auto call_unlocked(Function function) {
  try {
    const py::gil_scoped_release released;
    return function();
  } catch (const OutOfMemory& error) {
    py::set_error(py::module_::import("torch").attr("OutOfMemoryError"), error.what());
    throw py::error_already_set();
  }
}

const char kForwardDoc[] =
    "forward(inputs, results, config, decode_splits, large_splits, architecture, workspace)\n\n"
    "Writes those of the results that are not None. See the module's docstring for the arguments.";

PyObject* forward(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *inputs, *results, *config, *decode_splits, *large_splits, *architecture, *workspace;
  };
  const auto a = arguments_of<Arguments>(args, count, kForwardDoc);
  const Inputs inputs = Inputs::of(a.inputs);
  const Reader reader = reader_like(inputs.query);
  const Problem problem = read_forward(reader, inputs, Results::of(a.results), a.config);
  Call call = read_call(reader, problem, a.architecture, a.workspace);
  call.splits = {checked_splits(read_integer(a.decode_splits), 0, "decode_splits"),
                 checked_splits(read_integer(a.large_splits), 0, "large_splits")};
  call_unlocked([&] { gpu::forward(call); });
  Py_RETURN_NONE;
}

const char kBackwardDoc[] =
    "backward(inputs, saved, gradients, config, dq_splits, dk_splits, architecture, workspace)\n\n"
    "Overwrites those of the gradients that are not None. See the module's docstring for the arguments.";

PyObject* backward(PyObject* const* args, Py_ssize_t count) {
  struct Arguments {
    PyObject *inputs, *saved, *gradients, *config, *dq_splits, *dk_splits, *architecture, *workspace;
  };
  const auto a = arguments_of<Arguments>(args, count, kBackwardDoc);
  const Inputs inputs = Inputs::of(a.inputs);
  const Reader reader = reader_like(inputs.query);
  const Problem problem = read_backward(reader, inputs, Saved::of(a.saved), Gradients::of(a.gradients), a.config);
  Call call = read_call(reader, problem, a.architecture, a.workspace);
  call.gradient_splits = {checked_splits(read_integer(a.dq_splits), 1, "dq_splits"),
                          checked_splits(read_integer(a.dk_splits), 1, "dk_splits")};
  call_unlocked([&] { gpu::backward(call); });
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"forward", as_c_function(entry_point<forward>), METH_FASTCALL, kForwardDoc},
    {"backward", as_c_function(entry_point<backward>), METH_FASTCALL, kBackwardDoc},
    {nullptr, nullptr, 0, nullptr},
};

const char kModuleDoc[] = R"(The CUDA kernels of fused_attn.

Private: fused_attn.backends.cuda uses it. Arguments are those of fused_attn._C, on one CUDA device, of float16 or
bfloat16 and with rows that start at multiples of 16 bytes. Kernels run on torch's current stream of that device.
Contents are not looked at. With wrong cu_seqlens, results are undefined, but the kernels stay within the tensors.

decode_splits, large_splits    into how many parts each kind of forward kernel divides the keys; 0 = it does not run
dq_splits, dk_splits           how many programs share a block of rows of dq, and of dk and dv, in backward
architecture                   whose kernels run: 80, or 90 for sm_90a
workspace                      float32, workspace_bytes(...) bytes or more; None where that is 0
dbias                          accumulate or the dtype of query)";

}  // namespace
}  // namespace fused_attn::gpu

PYBIND11_MODULE(FUSED_ATTN_CUDA_MODULE, module) {
  using namespace fused_attn;
  module.doc() = gpu::kModuleDoc;
  define_config(module);
  if (PyModule_AddFunctions(module.ptr(), gpu::kMethods) != 0) throw py::error_already_set();
  module.def(
      "workspace_bytes", [](const py::kwargs& needs) { return gpu::workspace_bytes(gpu::read_needs(needs)); },
      "Size of the workspace in bytes. The arguments are the fields of WorkspaceNeeds, by name. In place of the two\n"
      "kinds of splits there are decode_splits, large_splits, dq_splits and dk_splits. dbias_shape is None if the\n"
      "gradient of bias is not wanted.");
  module.def(
      "unusable_reason", [](int device) { return gpu::call_unlocked([&] { return gpu::unusable_reason(device); }); },
      py::arg("device"),
      "Why no kernel can run on the CUDA device with this number; empty where they can. Raises "
      "torch.OutOfMemoryError or RuntimeError for a cause that may pass.");
  module.def(
      "build_info",
      [] {
        const gpu::BuildInfo info = gpu::build_info();
        return std::map<std::string, std::string>{
            {"version", info.version}, {"compiler", info.compiler}, {"architectures", info.architectures}};
      },
      "How this module was built. architectures are those of the kernels, in CMake's notation, such as 80,90a-real.");
  if (gpu::runs_on_cpu()) module.attr("device_type") = "cpu";
}
