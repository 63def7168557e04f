// Clears rows of results that belong to no sequence, or lie behind the length of their batch entry: a job of the
// preparation kernel. No other kernel writes these rows. To fill whole tensors beforehand would write all of their
// bytes once more.
#pragma once
#include "fragments.h"
#include "head_slice.h"
#include "tile_scheduler.h"

namespace fused_attn::gpu {

// The sequence that a row of a packed tensor may belong to: the last one that begins at or before it.
GPU_DEVICE int32_t last_sequence_before(const UnownedRows& x, int32_t batch, int32_t row) {
  int32_t begin = 0;
  for (int32_t end = batch; end - begin > 1;) {
    const int32_t middle = begin + (end - begin) / 2;
    (offset_in(x.cu_seqlens, middle, x.rows) <= row ? begin : end) = middle;
  }
  return begin;
}

// Whether no sequence has this row of a batch entry. A row behind the longest sequence that the caller has named
// belongs to none.
GPU_DEVICE bool is_unowned(const UnownedRows& x, int32_t batch, int32_t entry, int32_t row) {
  if (x.cu_seqlens == nullptr) return row >= clamp_to(load_global(x.lengths + entry), 0, x.longest);
  const int32_t sequence = last_sequence_before(x, batch, row), begin = offset_in(x.cu_seqlens, sequence, x.rows);
  return row < begin || row - begin >= min(offset_in(x.cu_seqlens, sequence + 1, x.rows) - begin, x.longest);
}

// Sets a row of a tensor to its word. All lanes of a warp call this.
GPU_DEVICE void clear_row(const ClearedTensor& x, int32_t entry, int32_t row, Lane lane) {
  char* const first = x.data + entry * x.batch_bytes + row * x.row_bytes;
  for (int32_t n = lane.index; n < x.heads * x.stores; n += 32) {
    char* const of_head = first + n / x.stores * x.head_bytes;
    if (x.is_float) {
      store_global(reinterpret_cast<uint32_t*>(of_head) + n % x.stores, x.word);
    } else {
      store_global(reinterpret_cast<Vec4*>(of_head) + n % x.stores, Vec4{x.word, x.word, x.word, x.word});
    }
  }
}

// Clears the unowned rows among those of a warp: 32 rows from first_row on, and again 32 after each `stride` rows. Both
// numbers count the rows of all batch entries. All lanes of a warp call this. Each lane looks at one row, and all of
// them write.
//
// If the offsets of sequences do not ascend, all rows are cleared: other kernels may leave out sequences, or all of
// them (list_key_blocks).
GPU_DEVICE void clear_unowned_rows(const Params& p, const UnownedRows& x, int64_t first_row, int64_t stride,
                                   Lane lane) {
  const bool is_right = offsets_ascend(p.cu_seqlens_q, p.batch, p.rows_q, lane) &&
                        offsets_ascend(p.cu_seqlens_k, p.batch, p.rows_k, lane);
  const int32_t entries = x.cu_seqlens == nullptr ? p.batch : 1;
  GPU_NO_UNROLL for (; first_row < int64_t{entries} * x.rows; first_row += stride) {
    const int64_t number = first_row + lane.index;
    const int32_t entry = static_cast<int32_t>(number / x.rows), row = static_cast<int32_t>(number % x.rows);
    const bool is_cleared = entry < entries && (!is_right || is_unowned(x, p.batch, entry, row));
    for (uint32_t left = warp_ballot(is_cleared); left != 0; left &= left - 1) {
      const int64_t cleared = first_row + lowest_bit(left);
      GPU_UNROLL for (int i = 0; i < UnownedRows::kMost; ++i)
          clear_row(x.tensors[i], static_cast<int32_t>(cleared / x.rows), static_cast<int32_t>(cleared % x.rows), lane);
    }
  }
}

}  // namespace fused_attn::gpu
