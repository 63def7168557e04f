// The second pass of the kernel for few queries (decode_forward.h): merges the results of the splits of a row.
#pragma once
#include "decode_plan.h"

namespace fused_attn::cpu {
namespace {

// Computes the output of query i of head h from the partial results of all splits, and writes it, and lse if wanted.
template <class Policy>
void merge_splits(const AttentionParams& p, const DecodePlan& plan,
                  const DecodePartials<typename Policy::Lane>& partials, const Sequence& seq, int64_t b, int64_t h,
                  int64_t i) {
  using Lane = typename Policy::Lane;
  using Storage = typename Policy::Storage;
  constexpr int n = kLanes<Lane>;
  const auto row_of_split = [&](int64_t split) { return plan.row(p, seq, split, b, h, i) - partials.first_row; };
  const int64_t splits = plan.splits_of(seq);
  // The splits subtracted different maxima before their exponentials. Multiply each by a factor that refers it to the
  // largest of these maxima.
  Lane keys_max = FloatTraits<Lane>::kLowest;
  for (int64_t split = 0; split < splits; ++split) {
    const Lane other = partials.row_max[row_of_split(split)];
    keys_max = other > keys_max ? other : keys_max;
  }
  Lane factors[kMaxSplits];
  Lane total = 0;
  for (int64_t split = 0; split < splits; ++split) {
    const int64_t row = row_of_split(split);
    factors[split] = natural_exp(partials.row_max[row] - keys_max);
    total += partials.row_sum[row] * factors[split];
  }
  // A row that sees no key has the output 0, even if there is a sink. A total of NaN is not 0, so its row becomes NaN.
  const bool empty = total == 0;
  if (p.row_max.data != nullptr) {
    // A maximum ignores logits that are NaN, but a sum does not.
    const Lane largest = total == total ? keys_max : total;
    *row_of<Lane>(p.row_max, b, h, seq.q_offset + i) = empty ? -FloatTraits<Lane>::kInfinity : largest;
  }
  // The sink is added to the denominator only. The maximum, the sink included, is subtracted before each exponential.
  const Lane sink = sink_of<Lane>(p, h);
  const Lane reference = sink > keys_max ? sink : keys_max;
  const Lane keys_share = natural_exp(keys_max - reference);
  total = total * keys_share + natural_exp(sink - reference);
  for (int64_t split = 0; split < splits; ++split) factors[split] *= keys_share / total;
  if (p.lse.data != nullptr) {
    *row_of<Lane>(p.lse, b, h, seq.q_offset + i) =
        empty ? -FloatTraits<Lane>::kInfinity : reference + natural_log(total);
  }
  Storage* out = row_of<Storage>(p.out, b, h, seq.q_offset + i);
  for (int64_t d = 0; d < p.value_dim; d += n) {
    Vec<Lane> sum = {};
    for (int64_t split = 0; split < splits && !empty; ++split) {
      sum += load<Lane>(partials.acc + row_of_split(split) * plan.value_row + d) * factors[split];
    }
    store_as<Lane>(out + d, sum, static_cast<int>(p.value_dim - d));
  }
}

}  // namespace
}  // namespace fused_attn::cpu
