// Transposition between tensors, where the elements of a query are neighbours, and the scratch, where neighbouring
// queries are neighbours, so that a vector holds one element of several queries.
#pragma once
#include "float_parts.h"
#include "tiles.h"

namespace fused_attn::cpu {
namespace {

// The lanes of rows of `dim` elements that pack_columns has transposed, with all parts.
template <class Policy>
int64_t column_lanes(int dim, int64_t stride) {
  constexpr int n = kLanes<typename Policy::Lane>;
  if (Policy::kParts > 1) return Policy::kParts * round_up(dim, 2 * n) / 2 * factor_stride<Policy>(stride);
  return round_up(Policy::lanes_for(dim), n) * stride;
}

#if defined(__AMX_BF16__)
// Does what pack_columns does, for rows of floats that become pairs of parts. The columns of a part are those of the
// pairs of neighbours in a row.
template <class Policy>
FA_NOINLINE void pack_columns_of_parts(const float* rows, int64_t stride_row, int count, int dim, float* columns) {
  constexpr int n = kLanes<float>;
  const int64_t stride = factor_stride<Policy>(round_up(count, n)), next_part = round_up(dim, 2 * n) / 2 * stride;
  for (int q = 0; q < count; q += n) {
    for (int d = 0; d < dim; d += 2 * n) {
      Vec<float> block[Policy::kParts][n];
      for (int i = 0; i < n; ++i) {
        Vec<float> pairs[Policy::kParts] = {};
        if (q + i < count) load_parts(rows + (q + i) * stride_row, d, dim, pairs);
        for (int part = 0; part < Policy::kParts; ++part) block[part][i] = pairs[part];
      }
      float* target = columns + d / 2 * stride + q;
      for (int part = 0; part < Policy::kParts; ++part, target += next_part) {
        transpose<float>(block[part]);
        FA_UNROLL
        for (int i = 0; i < n; ++i) store<float>(target + i * stride, block[part][i]);
      }
    }
  }
}
#endif

// Transposes `count` rows of `dim` elements, converted to lanes, into columns[lane of a row, padded to a
// vector][stride]. The stride is `count` rounded up to whole vectors. The entries of rows from `count` on are zero, and
// so are the lanes behind the last one of a row, which AMX reads.
template <class Policy>
FA_NOINLINE void pack_columns(const typename Policy::Storage* rows, int64_t stride_row, int count, int dim,
                              typename Policy::Lane* columns) {
#if defined(__AMX_BF16__)
  if constexpr (Policy::kParts > 1) return pack_columns_of_parts<Policy>(rows, stride_row, count, dim, columns);
#endif
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  const int depth = Policy::lanes_for(dim);
  const int64_t stride = round_up(count, n);
  for (int q = 0; q < count; q += n) {
    for (int d = 0; d < depth; d += n) {
      Vec<Lane> block[n];
      if (q + n <= count) {
        FA_UNROLL
        for (int i = 0; i < n; ++i) block[i] = load_lanes<Policy>(rows + (q + i) * stride_row, d, dim);
      } else {
        FA_UNROLL
        for (int i = 0; i < n; ++i) {
          block[i] = q + i < count ? load_lanes<Policy>(rows + (q + i) * stride_row, d, dim) : Vec<Lane>{};
        }
      }
      transpose<Lane>(block);
      Lane* target = columns + d * stride + q;
      FA_UNROLL
      for (int i = 0; i < n; ++i) store<Lane>(target + i * stride, block[i]);
    }
  }
}

#if defined(__AVX512BF16__)
// Interleaves two rows of `dim` elements to pairs: pairs[d] = (low[d], high[d]). If `high` is null, zeros take its
// place. The pairs of a part lie `next_part` lanes behind those of the part before.
template <class Policy>
FA_INLINE void interleave(const typename Policy::Storage* low, const typename Policy::Storage* high, int dim,
                          [[maybe_unused]] int64_t next_part, float* pairs) {
  if constexpr (Policy::kParts == 1) {
    interleave_rows(reinterpret_cast<const uint16_t*>(low), reinterpret_cast<const uint16_t*>(high), dim, pairs);
  } else {
#if defined(__AMX_BF16__)
    interleave_parts(low, high, dim, next_part, pairs);
#endif
  }
}
#endif

// The opposite of pack_columns: writes `count` rows of `dim` elements. If `add`, the function adds to the elements of
// the rows instead. It can add only if a lane holds one element. column(d, q) must return element d of the rows from q
// on, as a vector, for any d below dim rounded up to a vector. If a lane holds a pair, elements are rounded and paired
// before the transposition, so that there are only half as many lanes to transpose.
template <class Policy, class Column>
FA_INLINE void unpack_columns(const Column& column, int count, int dim, bool add, typename Policy::Storage* rows,
                              int64_t stride_row) {
  using Lane = typename Policy::Lane;
  constexpr int n = kLanes<Lane>;
  for (int q = 0; q < count; q += n) {
    for (int d = 0; d < Policy::lanes_for(dim); d += n) {
      Vec<Lane> block[n];
      FA_UNROLL
      for (int i = 0; i < n; ++i) {
        if constexpr (Policy::kPerLane == 1) {
          block[i] = column(d + i, q);
        } else {
#if defined(__AVX512BF16__)
          const int first = 2 * (d + i);
          block[i] = first < dim ? round_to_pairs(column(first, q), column(first + 1, q)) : Vec<Lane>{};
#endif
        }
      }
      transpose<Lane>(block);
      FA_UNROLL
      for (int i = 0; i < n; ++i) {
        if (q + i >= count) continue;
        typename Policy::Storage* row = rows + (q + i) * stride_row;
        if constexpr (Policy::kPerLane == 1) {
          if (add) block[i] += load_lanes<Policy>(row, d, dim);
        }
        store_lanes<Policy>(row, d, dim, block[i]);
      }
    }
  }
}

}  // namespace
}  // namespace fused_attn::cpu
