// Converts the tuples of a call to AttentionParams, for the CPU module and for the CUDA module. This file alone defines
// which dtype, shape and strides each tensor must have, and it checks them, because a kernel trusts its parameters.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <string>

#include "../common/attention_params.h"
#include "arguments.h"
#include "config.h"
#include "inputs.h"

namespace fused_attn {

namespace py = pybind11;

// The parameters of a kernel, and the dtypes and sizes of query, key and value that all other tensors are checked
// against.
struct Problem {
  AttentionParams params;
  ElementType type = ElementType::kOther;
  ElementType accumulate_type = ElementType::kOther;
  bool is_packed = false;     // the rows of all sequences stand one after another, and there is no batch dimension
  int64_t batch_entries = 0;  // the size of dimension 0 of query; 1 if the call is packed
  int64_t rows_q = 0;         // the rows of a head of query; the sum of all lengths if the call is packed
  int64_t rows_k = 0;         // the rows of a head of key, likewise; the rows of a page if the call is paged
};

// Copies the options from `object`, a capsule that the Python function Config has returned.
inline void set_options(AttentionParams& params, PyObject* object) {
  if (!PyCapsule_IsValid(object, kConfigName))
    throw py::type_error(std::string("config: expected what Config returns, got ") + Py_TYPE(object)->tp_name);
  AttentionOptions& options = params;
  options = *static_cast<const AttentionOptions*>(PyCapsule_GetPointer(object, kConfigName));
}

// Checks the offsets of packed sequences and returns them. A wrong offset would make a kernel on a CPU read and write
// outside of a tensor. On a GPU the offsets are not read here, and the kernels clip them.
inline const int32_t* checked_cu_seqlens(const Reader& reader, const Argument& cu_seqlens, int64_t batch, int64_t total,
                                         int64_t max_seqlen) {
  cu_seqlens.check_type(ElementType::kInt32);
  cu_seqlens.check_unit_stride(0);
  const auto* starts = reinterpret_cast<const int32_t*>(cu_seqlens.data());
  if (!reader.may_look_inside) return starts;
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

// The stride between the batch entries, or the pages, of a view. If there is one, its stride may be any number, and the
// stride of the view is 0.
inline int64_t batch_stride(const Argument& argument) { return argument.size(0) == 1 ? 0 : argument.stride(0); }

// Checks a tensor (batch_entries, heads, rows, columns), or (rows, heads, columns) if the call is packed. The tensor
// must have the dtype of query and contiguous rows. Returns its view. This and the next functions return a view without
// data for None.
//
// The row stride of a single row is 0: torch allows it to be any number, and a kernel computes addresses of rows behind
// the last one, which it does not read, but whose alignment must be right.
inline TensorView rows_view(const Problem& problem, const Argument& argument, int64_t heads, int64_t rows,
                            int64_t columns) {
  if (!argument.given) return {};
  argument.check_type(problem.type);
  if (problem.is_packed) {
    argument.check_shape({rows, heads, columns});
    argument.check_unit_stride(2);
    return {argument.data(), 0, argument.stride(1), rows == 1 ? 0 : argument.stride(0), 1};
  }
  argument.check_shape({problem.batch_entries, heads, rows, columns});
  argument.check_unit_stride(3);
  return {argument.data(), batch_stride(argument), argument.stride(1), rows == 1 ? 0 : argument.stride(2), 1};
}

// Checks pages (num_pages, page_size, heads, columns) as rows_view checks its tensor. Their view has a page in place of
// a batch entry.
inline TensorView pages_view(const Problem& problem, const Argument& argument, int64_t columns) {
  const AttentionParams& params = problem.params;
  argument.check_type(problem.type);
  argument.check_shape({params.num_pages, params.page_size, params.num_kv_heads, columns});
  argument.check_unit_stride(3);
  const int64_t stride_row = params.page_size == 1 ? 0 : argument.stride(1);
  return {argument.data(), batch_stride(argument), argument.stride(2), stride_row, 1};
}

// Checks key or value, and returns its view.
inline TensorView keys_view(const Problem& problem, const Argument& argument, int64_t columns) {
  if (problem.params.page_size > 0) return pages_view(problem, argument, columns);
  return rows_view(problem, argument, problem.params.num_kv_heads, problem.rows_k, columns);
}

// Checks lse, its gradient, or row_max: a tensor (batch_entries, num_heads, rows_q), or (num_heads, rows_q) if the call
// is packed, of the accumulate type. Returns its view.
inline TensorView lse_view(const Problem& problem, const Argument& argument) {
  if (!argument.given) return {};
  argument.check_type(problem.accumulate_type);
  if (problem.is_packed) {
    argument.check_shape({problem.params.num_heads, problem.rows_q});
    return {argument.data(), 0, argument.stride(0), argument.stride(1), 1};
  }
  argument.check_shape({problem.batch_entries, problem.params.num_heads, problem.rows_q});
  return {argument.data(), batch_stride(argument), argument.stride(1), argument.stride(2), 1};
}

// Checks key_padding, a bool tensor (batch, seqlen_k), and returns its view.
inline TensorView key_padding_view(const Argument& argument, int64_t batch, int64_t seqlen_k) {
  if (!argument.given) return {};
  argument.check_type(ElementType::kBool);
  argument.check_shape({batch, seqlen_k});
  return {argument.data(), argument.stride(0), 0, 0, argument.stride(1)};
}

// Sets the dtypes and sizes that query, key and value define.
inline void set_sizes(Problem& problem, const Inputs& inputs, const Argument& query, const Argument& key,
                      const Argument& value) {
  AttentionParams& params = problem.params;
  const bool is_paged = inputs.block_table != Py_None;
  problem.is_packed = inputs.cu_seqlens_q != Py_None || inputs.cu_seqlens_k != Py_None;
  query.check_ndim(problem.is_packed ? 3 : 4);
  for (const Argument* argument : {&key, &value}) {
    argument->check_ndim(problem.is_packed && !is_paged ? 3 : 4);
  }
  query.check_float();
  problem.type = query.type;
  problem.accumulate_type = query.type == ElementType::kFloat64 ? ElementType::kFloat64 : ElementType::kFloat32;
  problem.batch_entries = problem.is_packed ? 1 : query.size(0);
  problem.rows_q = query.size(problem.is_packed ? 0 : 2);
  problem.rows_k = key.size(is_paged ? 1 : problem.is_packed ? 0 : 2);
  params.dtype = kernel_dtype(query.type);
  params.num_heads = query.size(1);
  params.num_kv_heads = key.size(is_paged ? 2 : 1);
  params.head_dim = query.size(query.tensor.ndim - 1);
  params.value_dim = value.size(value.tensor.ndim - 1);
  if (params.num_kv_heads == 0 ? params.num_heads != 0 : params.num_heads % params.num_kv_heads != 0)
    key.fail("a head count that divides " + std::to_string(params.num_heads), std::to_string(params.num_kv_heads));
}

// Sets the table of the pages, and checks its dtype and shape.
inline void set_pages(Problem& problem, const Argument& key, const Argument& block_table) {
  AttentionParams& params = problem.params;
  block_table.check_type(ElementType::kInt32);
  if (block_table.tensor.ndim != 2 || block_table.size(0) != params.batch)
    block_table.fail("shape (" + std::to_string(params.batch) + ", pages)",
                     "shape " + shape_text(block_table.tensor.shape, block_table.tensor.ndim));
  block_table.check_unit_stride(1);
  if (params.key_lengths == nullptr && params.batch > 0) block_table.fail("None, as key_lengths is None", "a tensor");
  params.block_table = reinterpret_cast<const int32_t*>(block_table.data());
  params.block_table_stride = block_table.stride(0);
  params.num_pages = key.size(0);
  params.page_size = problem.rows_k;
  params.seqlen_k = block_table.size(1) * params.page_size;
  if (params.page_size < 1 || (params.num_pages == 0 && params.seqlen_k > 0))
    key.fail("at least one page of at least one row", "shape " + shape_text(key.tensor.shape, 4));
}

// Checks the length of each entry, and the number of each page that holds a key. A wrong number would make the kernel
// read outside of a tensor.
inline void check_lengths(const AttentionParams& params, const Argument& key_lengths, const Argument& block_table) {
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = params.key_lengths[b];
    if (length < 0 || length > params.seqlen_k)
      key_lengths.fail("lengths from 0 to " + std::to_string(params.seqlen_k) + ", the number of keys",
                       std::to_string(length));
    if (params.page_size == 0) continue;
    const int32_t* row = params.block_table + b * params.block_table_stride;
    const auto last_page = static_cast<uint32_t>(params.num_pages - 1);
    uint32_t largest = 0;  // a negative number counts as a large one
    const int64_t used = (length + params.page_size - 1) / params.page_size;
    for (int64_t i = 0; i < used; ++i) largest = std::max(largest, static_cast<uint32_t>(row[i]));
    if (used > 0 && largest > last_page)
      block_table.fail("numbers of pages from 0 to " + std::to_string(last_page),
                       std::to_string(static_cast<int32_t>(largest)) + " in row " + std::to_string(b));
  }
}

// Sets the lengths of the keys, and the pages in which they lie. Checks their contents where the host may read them.
inline void set_key_lengths(Problem& problem, const Reader& reader, const Inputs& inputs, const Argument& key) {
  AttentionParams& params = problem.params;
  const Argument key_lengths = reader.optional(inputs.key_lengths, "key_lengths");
  const Argument block_table = reader.optional(inputs.block_table, "block_table");
  for (const Argument* argument : {&key_lengths, &block_table}) {
    if (argument->given && params.cu_seqlens_k != nullptr) argument->fail("None with packed keys", "a tensor");
  }
  if (key_lengths.given) {
    key_lengths.check_type(ElementType::kInt32);
    key_lengths.check_shape({params.batch});
    key_lengths.check_unit_stride(0);
    params.key_lengths = reinterpret_cast<const int32_t*>(key_lengths.data());
  }
  if (block_table.given) set_pages(problem, key, block_table);
  if (key_lengths.given && reader.may_look_inside) check_lengths(params, key_lengths, block_table);
}

// Checks the number of keys. The kernels keep the number of a key in 32 bits.
inline void check_key_count(const AttentionParams& params, const Argument& key) {
  constexpr int64_t kMostKeys = std::numeric_limits<int32_t>::max();
  if (params.seqlen_k > kMostKeys)
    key.fail("at most " + std::to_string(kMostKeys) + " keys", std::to_string(params.seqlen_k));
}

// Sets the number of sequences and their lengths. Checks the offsets of packed sequences. Packed queries have packed
// keys, or keys in pages.
inline void set_sequences(Problem& problem, const Reader& reader, const Inputs& inputs) {
  AttentionParams& params = problem.params;
  const Argument cu_seqlens_q = reader.optional(inputs.cu_seqlens_q, "cu_seqlens_q");
  const Argument cu_seqlens_k = reader.optional(inputs.cu_seqlens_k, "cu_seqlens_k");
  if (!cu_seqlens_q.given && !cu_seqlens_k.given) {
    params.batch = problem.batch_entries;
    params.seqlen_q = problem.rows_q;
    params.seqlen_k = problem.rows_k;
    return;
  }
  if (!cu_seqlens_q.given) cu_seqlens_q.fail("a tensor, as cu_seqlens_k is one", "None");
  if (!cu_seqlens_k.given && inputs.block_table == Py_None)
    cu_seqlens_k.fail("a tensor, as cu_seqlens_q is one", "None");
  if (cu_seqlens_q.tensor.ndim != 1 || cu_seqlens_q.size(0) < 1)
    cu_seqlens_q.fail("shape (batch + 1,)", "shape " + shape_text(cu_seqlens_q.tensor.shape, cu_seqlens_q.tensor.ndim));
  params.batch = cu_seqlens_q.size(0) - 1;
  params.seqlen_q = params.max_seqlen_q;
  params.cu_seqlens_q = checked_cu_seqlens(reader, cu_seqlens_q, params.batch, problem.rows_q, params.seqlen_q);
  if (!cu_seqlens_k.given) return;  // set_key_lengths sets the lengths of the keys
  params.seqlen_k = params.max_seqlen_k;
  cu_seqlens_k.check_shape({params.batch + 1});
  params.cu_seqlens_k = checked_cu_seqlens(reader, cu_seqlens_k, params.batch, problem.rows_k, params.seqlen_k);
}

// As lse_view, for a result of forward, whose rows lie side by side.
inline TensorView row_results_view(const Problem& problem, const Argument& argument) {
  TensorView view = lse_view(problem, argument);
  if (argument.given) argument.check_unit_stride(argument.tensor.ndim - 1);
  view.stride_row = 1;  // the stride of a tensor with one row may be any number
  return view;
}

// Checks query, key, value, out, lse, the offsets of packed sequences, the lengths of keys and the block table, and
// sets the parameters that follow from them.
inline void set_tensors(Problem& problem, const Reader& reader, const Inputs& inputs, PyObject* out_object,
                        const Argument& lse) {
  AttentionParams& params = problem.params;
  const Argument query = reader.required(inputs.query, "query");
  const Argument key = reader.required(inputs.key, "key");
  const Argument value = reader.required(inputs.value, "value");
  const Argument out = reader.required(out_object, "out");
  set_sizes(problem, inputs, query, key, value);
  set_sequences(problem, reader, inputs);
  set_key_lengths(problem, reader, inputs, key);
  check_key_count(params, key);
  params.query = rows_view(problem, query, params.num_heads, problem.rows_q, params.head_dim);
  params.key = keys_view(problem, key, params.head_dim);
  params.value = keys_view(problem, value, params.value_dim);
  params.out = rows_view(problem, out, params.num_heads, problem.rows_q, params.value_dim);
  params.lse = row_results_view(problem, lse);
}

// The stride of a tensor whose dimension 0 is the heads. If its size is 1, all heads share what it holds.
inline int64_t head_stride(const Argument& argument) { return argument.size(0) == 1 ? 0 : argument.stride(0); }

// Checks key_bias or its gradient, a tensor (batch, seqlen_k) of the accumulate type, and returns its view.
inline TensorView key_bias_view(const Problem& problem, const Argument& argument) {
  if (!argument.given) return {};
  argument.check_type(problem.accumulate_type);
  argument.check_shape({problem.params.batch, problem.params.seqlen_k});
  argument.check_unit_stride(1);
  return {argument.data(), argument.stride(0), 0, 0, 1};
}

// Checks relative_bias or its gradient, a tensor (num_heads or 1, seqlen_q + seqlen_k - 1) of the accumulate type, and
// returns its view.
inline TensorView relative_bias_view(const Problem& problem, const Argument& argument) {
  if (!argument.given) return {};
  const AttentionParams& params = problem.params;
  argument.check_type(problem.accumulate_type);
  const bool one_head = argument.tensor.ndim == 2 && argument.size(0) == 1;
  argument.check_shape({one_head ? 1 : params.num_heads,
                        // Without queries and keys there are no columns.
                        std::max<int64_t>(params.seqlen_q + params.seqlen_k - 1, 0)});
  argument.check_unit_stride(1);
  return {argument.data(), 0, head_stride(argument), 0, 1};
}

// Checks sinks or their gradient, a tensor (num_heads,) of the accumulate type, and returns their view.
inline TensorView sinks_view(const Problem& problem, const Argument& argument) {
  if (!argument.given) return {};
  argument.check_type(problem.accumulate_type);
  argument.check_shape({problem.params.num_heads});
  return {argument.data(), 0, head_stride(argument), 0, 1};
}

// Checks key_ranges, an int32 tensor (B|1, H|1, L|1, N, 2) whose last two dimensions are contiguous, and sets its
// parameters.
inline void set_key_ranges(AttentionParams& params, const Argument& ranges) {
  if (!ranges.given) return;
  ranges.check_type(ElementType::kInt32);
  const int64_t expected[] = {params.batch, params.num_heads, params.seqlen_q};
  bool fits = ranges.tensor.ndim == 5 && ranges.size(3) > 0 && ranges.size(4) == 2;
  for (int dim = 0; fits && dim < 3; ++dim) fits = ranges.size(dim) == 1 || ranges.size(dim) == expected[dim];
  if (!fits || params.cu_seqlens_q != nullptr)
    ranges.fail("a shape (B, H, L, N, 2) that broadcasts to " + shape_text(expected, 3) +
                    " before N, in a call that is not packed",
                "shape " + shape_text(ranges.tensor.shape, ranges.tensor.ndim));
  ranges.check_unit_stride(4);
  if (ranges.size(3) > 1 && ranges.stride(3) != 2)
    ranges.fail("stride 2 in dimension 3", "stride " + std::to_string(ranges.stride(3)));
  const auto step = [&](int dim) { return ranges.size(dim) == expected[dim] ? ranges.stride(dim) : 0; };
  params.key_ranges = {ranges.data(), step(0), step(1), step(2), 1};
  params.num_ranges = ranges.size(3);
}

// Checks the masks, the biases, the sinks and the seed of dropout, and sets their parameters.
inline void set_masks(Problem& problem, const Reader& reader, const Inputs& inputs) {
  AttentionParams& params = problem.params;
  const int64_t scores[] = {params.batch, params.num_heads, params.seqlen_q, params.seqlen_k};

  params.key_padding =
      key_padding_view(reader.optional(inputs.key_padding, "key_padding"), params.batch, params.seqlen_k);
  if (const Argument mask = reader.optional(inputs.mask, "mask"); mask.given) {
    mask.check_type(ElementType::kBool);
    params.mask = mask.scores_view(scores);
  }
  set_key_ranges(params, reader.optional(inputs.key_ranges, "key_ranges"));
  if (const Argument bias = reader.optional(inputs.bias, "bias"); bias.given) {
    if (bias.type != problem.type) bias.check_type(problem.accumulate_type);
    params.bias = bias.scores_view(scores);
    params.bias_dtype = kernel_dtype(bias.type);
  }
  params.key_bias = key_bias_view(problem, reader.optional(inputs.key_bias, "key_bias"));
  params.relative_bias = relative_bias_view(problem, reader.optional(inputs.relative_bias, "relative_bias"));
  params.sinks = sinks_view(problem, reader.optional(inputs.sinks, "sinks"));

  const Argument seed = reader.optional(inputs.seed, "seed");
  if (params.has_dropout && !seed.given) seed.fail("a tensor, as dropout is on", "None");
  if (seed.given) {
    seed.check_type(ElementType::kInt64);
    seed.check_shape({});
    params.dropout_seed_data = reinterpret_cast<const int64_t*>(seed.data());
    if (reader.may_look_inside) params.dropout_seed = static_cast<uint64_t>(*params.dropout_seed_data);
  }
}

// The parameters that forward and backward share.
inline Problem read_shared(const Reader& reader, const Inputs& inputs, PyObject* out, const Argument& lse,
                           PyObject* config) {
  Problem problem;
  set_options(problem.params, config);
  set_tensors(problem, reader, inputs, out, lse);
  set_masks(problem, reader, inputs);
  return problem;
}

// The parameters of a forward call, which writes those of the results that are not None.
inline Problem read_forward(const Reader& reader, const Inputs& inputs, const Results& results, PyObject* config) {
  Problem problem = read_shared(reader, inputs, results.out, reader.optional(results.lse, "lse"), config);
  problem.params.row_max = row_results_view(problem, reader.optional(results.row_max, "row_max"));
  return problem;
}

// Checks the tensors that only backward has, and sets their parameters.
inline void set_gradients(Problem& problem, const Reader& reader, const Saved& saved, const Gradients& gradients) {
  AttentionParams& params = problem.params;
  const int64_t heads = params.num_heads, kv_heads = params.num_kv_heads;
  const auto view = [&](const Argument& argument, int64_t num_heads, int64_t rows, int64_t columns) {
    return rows_view(problem, argument, num_heads, rows, columns);
  };
  params.dout = view(reader.required(saved.dout, "dout"), heads, problem.rows_q, params.value_dim);
  params.dquery = view(reader.optional(gradients.query, "dquery"), heads, problem.rows_q, params.head_dim);
  params.dkey = view(reader.optional(gradients.key, "dkey"), kv_heads, problem.rows_k, params.head_dim);
  params.dvalue = view(reader.optional(gradients.value, "dvalue"), kv_heads, problem.rows_k, params.value_dim);
  params.dlse = lse_view(problem, reader.optional(saved.dlse, "dlse"));
  if (const Argument dbias = reader.optional(gradients.bias, "dbias"); dbias.given) {
    if (dbias.type != problem.type) dbias.check_type(problem.accumulate_type);
    params.dbias_dtype = kernel_dtype(dbias.type);
    params.dbias = dbias.scores_view({params.batch, params.num_heads, params.seqlen_q, params.seqlen_k});
  }
  params.dkey_bias = key_bias_view(problem, reader.optional(gradients.key_bias, "dkey_bias"));
  params.drelative_bias = relative_bias_view(problem, reader.optional(gradients.relative_bias, "drelative_bias"));
  params.dsinks = sinks_view(problem, reader.optional(gradients.sinks, "dsinks"));

  // The gradient of an input requires the input.
  const auto check_input = [](const TensorView& gradient, const TensorView& input, const char* name) {
    if (gradient.data != nullptr && input.data == nullptr)
      throw py::value_error(std::string("d") + name + ": expected None, as " + name + " is None");
  };
  check_input(params.dbias, params.bias, "bias");
  check_input(params.dkey_bias, params.key_bias, "key_bias");
  check_input(params.drelative_bias, params.relative_bias, "relative_bias");
  check_input(params.dsinks, params.sinks, "sinks");
}

// The parameters of a backward call. It reads lse, which therefore must not be None.
inline Problem read_backward(const Reader& reader, const Inputs& inputs, const Saved& saved, const Gradients& gradients,
                             PyObject* config) {
  Problem problem = read_shared(reader, inputs, saved.out, reader.required(saved.lse, "lse"), config);
  set_gradients(problem, reader, saved, gradients);
  return problem;
}

}  // namespace fused_attn
