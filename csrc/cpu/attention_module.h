// A whole attention module for few rows in one call: input projection, attention, output projection. With so few rows,
// calling the operators of torch one by one takes longer than the arithmetic.
#pragma once
#include <cstring>

#include "forward.h"
#include "linear.h"

namespace fused_attn::cpu {
namespace {

// Appends the projected keys and values, the columns of `projected` behind those of the queries, to the cache: row
// key_lengths[b] - 1 of each batch entry b.
template <class Storage>
void append_rows(const AttentionModuleParams& m, const Storage* projected, int64_t width) {
  const AttentionParams& p = m.attention;
  const int64_t bytes = p.head_dim * static_cast<int64_t>(sizeof(Storage));
  for (int64_t b = 0; b < p.batch; ++b) {
    const Storage* key = projected + b * width + p.num_heads * p.head_dim;
    const Storage* value = key + p.num_kv_heads * p.head_dim;
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      memcpy(row_of<Storage>(p.key, b, h, p.key_lengths[b] - 1), key + h * p.head_dim, bytes);
      memcpy(row_of<Storage>(p.value, b, h, p.key_lengths[b] - 1), value + h * p.head_dim, bytes);
    }
  }
}

// Runs the module: projects x to the queries, and to the keys and values unless a cache has them, attends, projects the
// result to m.out, and adds the residual.
template <class Policy, class BlockPolicy = Policy>
void attention_module_with_policy(const AttentionModuleParams& m) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  AttentionParams p = m.attention;
  const int64_t rows = p.batch * p.seqlen_q;
  const int64_t query_width = p.num_heads * p.head_dim;
  const int64_t key_width = p.num_kv_heads * p.head_dim;
  const int64_t width = m.keys == ModuleKeys::kGiven ? query_width : query_width + 2 * key_width;
  const auto data = [](const void* pointer) { return static_cast<const Storage*>(pointer); };

  const Storage* const x = data(m.x);
  const Storage* input = x;
  Storage* const out = static_cast<Storage*>(m.out);
  FinishParams finish;
  finish.rows = rows;
  finish.features = m.features;
  finish.out = out;
  finish.num_threads = p.num_threads;
  if (m.residual == Residual::kNormFirst) {
    finish.x = x;
    finish.norm = m.norm;
    finish_rows<Lane, Storage>(finish);
    input = out;
  }

  Storage *projected, *attended;
  const Buffer memory([&](Arena& arena) {
    projected = arena.take<Storage>(rows * width);
    attended = arena.take<Storage>(rows * query_width);
  });

  project<Policy>(input, rows, m.features, data(m.in_weight), data(m.in_bias), width, p.num_threads, projected);
  const auto heads_from = [&](int64_t column) {
    return TensorView{projected + column, p.seqlen_q * width, p.head_dim, width, 1};
  };
  p.query = heads_from(0);
  if (m.keys == ModuleKeys::kProjected) {
    p.key = heads_from(query_width);
    p.value = heads_from(query_width + key_width);
  }
  if (m.keys == ModuleKeys::kAppended) append_rows(m, projected, width);
  p.out = {attended, p.seqlen_q * query_width, p.head_dim, query_width, 1};
  forward_with_policy<Policy, BlockPolicy>(p);
  project<Policy>(attended, rows, query_width, data(m.out_weight), data(m.out_bias), m.features, p.num_threads, out);
  finish.x = out;
  finish.residual = m.residual == Residual::kNone ? nullptr : x;
  finish.norm = m.residual == Residual::kNormLast ? m.norm : LayerNormParams{};
  finish_rows<Lane, Storage>(finish);
}

}  // namespace
}  // namespace fused_attn::cpu
