// Runs a call. Each step has a file:
//
//   kernel_sets.h       chooses the kernels
//   workspace_needs.h   from Call to WorkspaceNeeds
//   workspace.h         from WorkspaceNeeds to Pieces: divides the workspace
//   params_of.h         from Call and Pieces to Params, the arguments of the kernels
//   this file           checks the call, and launches the kernels
#include "attention.h"

#include <algorithm>
#include <string>
#include <utility>

#include "bias_gradient/plan.h"
#include "kernel_sets.h"
#include "kernels.h"
#include "mask_bits.h"
#include "merge_gradients.h"
#include "merge_splits.h"
#include "params_of.h"
#include "preparation.h"
#include "tiles.h"
#include "workspace.h"
#include "workspace_needs.h"

namespace fused_attn::gpu {
namespace {

// A tensor of `heads` heads, whose rows may be cleared: `columns` 16-bit numbers, which are a multiple of 8, or one
// float.
ClearedTensor cleared(const TensorView& x, int64_t heads, int64_t columns) {
  if (x.data == nullptr) return {};
  constexpr uint32_t kMinusInfinity = 0xff800000;
  const bool is_float = columns == 1;
  const int64_t bytes = is_float ? 4 : 2;  // of an element
  return {static_cast<char*>(x.data),
          x.stride_batch * bytes,
          x.stride_head * bytes,
          x.stride_row * bytes,
          static_cast<int32_t>(heads),
          static_cast<int32_t>(ceil_div(columns * bytes, sizeof(Vec4))),
          is_float,
          is_float ? kMinusInfinity : 0};
}

// The results of a call with a row for each query.
UnownedRows unowned_queries_of(const AttentionParams& a, const Params& p, bool is_backward) {
  if (is_backward) return {p.cu_seqlens_q, nullptr, p.rows_q, p.seqlen_q, {cleared(a.dquery, a.num_heads, a.head_dim)}};
  return {
      p.cu_seqlens_q,
      nullptr,
      p.rows_q,
      p.seqlen_q,
      {cleared(a.out, a.num_heads, a.value_dim), cleared(a.lse, a.num_heads, 1), cleared(a.row_max, a.num_heads, 1)}};
}

// The results of backward with a row for each key.
UnownedRows unowned_keys_of(const AttentionParams& a, const Params& p) {
  return {p.cu_seqlens_k,
          p.key_lengths,
          p.rows_k,
          p.seqlen_k,
          {cleared(a.dkey, a.num_kv_heads, a.head_dim), cleared(a.dvalue, a.num_kv_heads, a.value_dim)}};
}

// The most blocks of threads that look for unowned rows: about four for each multiprocessor. Each of their warps checks
// all offsets first. With a warp for every 32 rows, this work would grow with the square of the number of sequences.
constexpr int64_t kMostClearingBlocks = 512;

// The jobs of the preparation kernel in this call. No job has blocks of threads if there is nothing to prepare.
PreparationParams preparation_of(const AttentionParams& a, const Params& p, const Pieces& pieces,
                                 const KernelSet& kernels, bool is_backward) {
  PreparationParams jobs{};
  int64_t total = 0;
  const auto blocks_for = [&total](int64_t work, int64_t work_of_block) {
    const int64_t blocks = ceil_div(work, work_of_block);
    total += blocks;
    if (total >= int64_t{1} << 31) throw std::length_error("the problem needs more blocks than a grid may have");
    return static_cast<int32_t>(blocks);
  };
  const auto clearing_blocks_for = [&](int64_t rows) {
    return blocks_for(std::min(rows, kMostClearingBlocks * kPreparationThreads), kPreparationThreads);
  };
  if (pieces.valid_keys != nullptr) {
    jobs.padding = {static_cast<const uint8_t*>(a.key_padding.data), a.key_padding.stride_batch,
                    a.key_padding.stride_col, pieces.valid_keys, pieces.key_ranks};
    jobs.padding_blocks = blocks_for(a.batch, 1);
  }
  if (pieces.relative_bias != nullptr) {
    jobs.relative_bias = {static_cast<const float*>(a.relative_bias.data), a.relative_bias.stride_head,
                          relative_bias_heads(a), a.seqlen_q + a.seqlen_k - 1, pieces.relative_bias};
    jobs.relative_bias_blocks = blocks_for(
        jobs.relative_bias.heads * (jobs.relative_bias.columns + 2 * kRelativeBiasMargin), kPreparationThreads);
  }
  if (pieces.mask.map != nullptr) {
    jobs.mask = mask_source_of(a);
    jobs.mask_blocks = blocks_for(warps_of_mask(p.mask, mask_entries(a)), kPreparationWarps);
  }
  if (pieces.query_tiles != nullptr) {
    jobs.query_tiles = {kernels.forward_rows[is_general_forward(p)], p.splits.fewest_queries, pieces.most_query_tiles,
                        pieces.query_tiles, pieces.num_query_tiles};
    jobs.query_tile_blocks = blocks_for(1, 1);
  }
  if (a.cu_seqlens_q != nullptr && (!is_backward || a.dquery.data != nullptr)) {
    jobs.queries = unowned_queries_of(a, p, is_backward);
    jobs.query_clearing_blocks = clearing_blocks_for(p.rows_q);
  }
  const bool wants_keys = a.dkey.data != nullptr || a.dvalue.data != nullptr;
  if (wants_keys && (a.cu_seqlens_k != nullptr || a.key_lengths != nullptr)) {
    jobs.keys = unowned_keys_of(a, p);
    const int64_t entries = a.cu_seqlens_k != nullptr ? 1 : a.batch;
    jobs.key_clearing_blocks = clearing_blocks_for(entries * p.rows_k);
  }
  // Row statistics lie in whole row blocks, up to the end of the last one.
  if (is_backward) {
    const int64_t row_blocks = p.finds_queries_by_offset ? p.row_blocks : ceil_div(a.seqlen_q, kRowBlock) * a.batch;
    jobs.row_blocks = blocks_for(row_blocks * kRowBlock * a.num_heads, kPreparationRows);
  }
  return jobs;
}

// The most blocks of keys of a batch entry that are listed by the block of threads that has packed its padding. It
// lists 128 at a time, and each pass waits for loads. For more, a second launch is estimated to be faster. Neither has
// been measured.
constexpr int64_t kMostListedWithPadding = 2048;

// Launches the preparation kernel, if the call needs anything that it makes.
void prepare(const AttentionParams& a, const Params& p, const Pieces& pieces, const KernelSet& kernels,
             bool is_backward, Stream stream) {
  PreparationParams jobs = preparation_of(a, p, pieces, kernels, is_backward);
  const auto run = [&](const Params& params, const PreparationParams& what) {
    const int blocks = what.padding_blocks + what.relative_bias_blocks + what.mask_blocks + what.query_tile_blocks +
                       what.query_clearing_blocks + what.key_clearing_blocks + what.row_blocks;
    if (blocks == 0 && p.tile_counter == nullptr) return;
    const LaunchShape shape{std::max(blocks, 1), 1, 1, kPreparationThreads, 0};
    const bool has_large_tiles = fused_backward_rows(kernels.head_dim, is_general_backward(p)) == 128;
    for_variant(a.dtype == DType::kBFloat16, has_large_tiles, [&](auto type, auto is_large) {
      run_kernel(preparation_kernel < decltype(type), is_large() ? 128 : 64 >, shape, stream, params, what);
    });
  };
  const int64_t key_blocks = int64_t{p.num_heads / p.group_size} * p.num_key_blocks * p.dk_splits;  // of a batch entry
  if (jobs.padding_blocks > 0 && p.key_blocks != nullptr && key_blocks > kMostListedWithPadding) {
    Params without_list = p;
    without_list.key_blocks = nullptr;
    PreparationParams packing{};
    std::swap(packing.padding, jobs.padding);
    std::swap(packing.padding_blocks, jobs.padding_blocks);
    run(without_list, packing);
  }
  run(p, jobs);
}

// Launches the kernels that compute the gradients of biases.
void sum_bias_gradients(const Call& call, const WorkspaceNeeds& needs, const Params& params, const Pieces& pieces,
                        const KernelSet& kernels) {
  const AttentionParams& a = call.params;
  const bool is_bf16 = a.dtype == DType::kBFloat16;
  const BiasGradientSizes sizes = bias_gradient_sizes(needs, kernels.bias_gradient_tile);
  if (needs.dbias_shape) {
    BiasGradientParams plan = plan_dense(sizes, needs.dbias_shape.value());
    plan.is_dense_bias = true;
    plan.program_counter = pieces.program_counter;
    sum_dense(params, plan, a.dbias, a.dbias_dtype, needs.dbias_shape.value(), pieces.dbias_sums, kernels.bias_gradient,
              is_bf16, call.stream);
  }
  if (needs.wants_dkey_bias)
    sum_dense(params, plan_dense(sizes, dkey_bias_shape(needs)), a.dkey_bias, DType::kFloat32, dkey_bias_shape(needs),
              pieces.dkey_bias_sums, kernels.bias_gradient, is_bf16, call.stream);
  if (needs.wants_drelative_bias)
    sum_relative(params, plan_relative(sizes), sizes.tile, a.drelative_bias, pieces.drelative_bias_sums,
                 kernels.bias_gradient, is_bf16, call.stream);
}

// Throws if the kernels that are about to run would ignore an argument. The Python backend makes no such call.
void check_kernels(const AttentionParams& a, const WorkspaceNeeds& needs) {
  const KeySplits& splits = needs.splits;
  const std::string numbers = std::to_string(splits.decode) + " and " + std::to_string(splits.large);
  if (splits.decode == 0 && splits.large == 0)
    throw std::invalid_argument("decode_splits, large_splits: expected one above 0, got " + numbers);
  if (splits.decode > 0 && splits.large > 0 && a.cu_seqlens_q == nullptr)
    throw std::invalid_argument("decode_splits, large_splits: expected both above 0 for packed calls only, got " +
                                numbers);
  if (splits.decode > 0 && (a.has_dropout || a.key_bias.data != nullptr || a.row_max.data != nullptr))
    throw std::invalid_argument("decode_splits: expected 0 with dropout, key_bias or row_max, got " +
                                std::to_string(splits.decode));
  if (needs.is_backward && a.block_table != nullptr)
    throw std::invalid_argument("block_table: expected None in backward, got a tensor");
  if (is_fused_backward(needs) && needs.gradient_splits.dq > 1)
    throw std::invalid_argument("dq_splits: expected 1 for the fused backward, got " +
                                std::to_string(needs.gradient_splits.dq));
}

// Checks the sizes of a call, and launches its kernels in order: preparation, forward or backward, gradients of biases
// and sinks. All run on the caller's stream.
void run(const Call& of_caller, bool is_backward) {
  const Call& call = on_device(of_caller);
  const AttentionParams& a = call.params;
  const KernelSet& kernels = kernels_for(call.architecture, a.head_dim, a.value_dim);
  const DeviceGuard guard(call.device);
  if (std::max({a.seqlen_q, a.seqlen_k, call.rows_q, call.rows_k}) > kMaxRows)
    throw std::invalid_argument("more than " + std::to_string(kMaxRows) + " rows");
  if (is_backward && a.cu_seqlens_q != nullptr &&
      a.batch > kMaxRows / kRowBlock)  // each may begin a row block of its own
    throw std::invalid_argument("more than " + std::to_string(kMaxRows / kRowBlock) + " packed sequences");
  const WorkspaceNeeds needs = needs_of(call, is_backward, kernels.head_dim);
  if (const int64_t bytes = workspace_bytes(needs); call.workspace_bytes < bytes)
    throw std::invalid_argument("workspace: expected at least " + std::to_string(bytes) + " bytes, got " +
                                std::to_string(call.workspace_bytes));
  check_kernels(a, needs);
  Workspace workspace(call.workspace);
  const Pieces pieces = take_pieces(needs, kernels.bias_gradient_tile, workspace);
  const Params params = params_of(call, needs, pieces);
  const bool is_bf16 = a.dtype == DType::kBFloat16;
  prepare(a, params, pieces, kernels, is_backward, call.stream);
  if (needs.splits.decode > 0) {
    Params few = params;
    const DecodeParams decode = decode_params_of(a, pieces, few);
    kernels.decode(few, decode, is_bf16, call.stream);
    merge_splits(few, is_bf16, call.stream);
    if (needs.splits.large == 0) return;
  }
  if (!is_backward) {
    kernels.forward(params, is_bf16, call.stream);
    merge_splits(params, is_bf16, call.stream);
    return;
  }
  kernels.backward(params, is_bf16, call.stream);
  for (const bool is_of_queries : {true, false}) merge_gradients(params, is_of_queries, is_bf16, call.stream);
  // These kernels come after those of backward, because they read the row statistics.
  sum_bias_gradients(call, needs, params, pieces, kernels);
  if (a.dsinks.data != nullptr) sum_sinks(params, call.stream);
}

}  // namespace

int64_t workspace_bytes(WorkspaceNeeds needs) {
  Workspace workspace(nullptr);
  const KernelSet& kernels = kernels_for(needs.architecture, needs.head_dim, needs.value_dim);
  needs.head_dim = kernels.head_dim;
  take_pieces(needs, kernels.bias_gradient_tile, workspace);
  return workspace.bytes();
}

std::string unusable_reason(int device) {
  try {
    const DeviceGuard guard(device);
    check_loadable(preparation_kernel<f16_t, kRowBlock>);
    return "";
  } catch (const LastingError& error) {
    return error.what();
  }
}

bool runs_on_cpu() { return kRunsOnCpu; }

void forward(const Call& call) { run(call, false); }
void backward(const Call& call) { run(call, true); }

}  // namespace fused_attn::gpu
