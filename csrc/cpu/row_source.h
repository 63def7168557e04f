// Where the rows of key or value lie: one after the other, or in pages.
#pragma once
#include <algorithm>

#include "key_blocks.h"

namespace fused_attn::cpu {
namespace {

// The rows of one head of key or value, of one sequence.
template <class Storage>
struct RowSource {
  const Storage* base;   // row 0 of the sequence; row 0 of page 0 if paged
  int64_t stride_row;    // in elements
  const int32_t* pages;  // the numbers of the pages of the sequence; null = not paged
  int64_t stride_page, page_size;

  bool operator==(const RowSource& other) const { return base == other.base && pages == other.pages; }

  // Sets rows[k] to the address of key index[k] + shift, for `count` keys in ascending order. Where that is behind
  // `last`, rows[k] is the address of key `last`.
  void find(const int32_t* index, int count, int64_t shift, int64_t last, const Storage** rows) const {
    if (pages == nullptr) {
      for (int k = 0; k < count; ++k) rows[k] = base + index[k] * stride_row;
      return;
    }
    // A page at a time, because a division takes long.
    for (int k = 0; k < count;) {
      const int64_t key = index[k] + shift < last ? index[k] + shift : last;
      const int64_t column = key / page_size, first = column * page_size;
      const Storage* page = base + pages[column] * stride_page;
      if (key == last) {
        for (; k < count; ++k) rows[k] = page + (last - first) * stride_row;
        return;
      }
      for (; k < count && index[k] + shift < first + page_size && index[k] + shift < last; ++k) {
        rows[k] = page + (index[k] + shift - first) * stride_row;
      }
    }
  }

  // The addresses of the keys of a block.
  void find(const KeyBlock& keys, const Storage** rows) const {
    if (pages == nullptr || !keys.contiguous) {
      find(keys.index, keys.count, 0, keys.index[keys.count - 1], rows);
      return;
    }
    for (int k = 0; k < keys.count;) {
      const int64_t key = keys.index[k], column = key / page_size, first = key - column * page_size;
      const int count = static_cast<int>(std::min<int64_t>(page_size - first, keys.count - k));
      const Storage* row = base + pages[column] * stride_page + first * stride_row;
      for (int i = 0; i < count; ++i) rows[k + i] = row + i * stride_row;
      k += count;
    }
  }
};

// The rows of `view`, which is key or value, for head kv_head of sequence b.
template <class Storage>
FA_INLINE RowSource<Storage> row_source(const AttentionParams& p, const TensorView& view, const Sequence& seq,
                                        int64_t b, int64_t kv_head) {
  if (p.page_size == 0) return {row_of<const Storage>(view, b, kv_head, seq.k_offset), view.stride_row, nullptr, 0, 0};
  // A table without columns has no address. Then there are no keys.
  const int32_t* pages = p.block_table == nullptr ? nullptr : p.block_table + b * p.block_table_stride;
  return {row_of<const Storage>(view, 0, kv_head, 0), view.stride_row, pages, view.stride_batch, p.page_size};
}

}  // namespace
}  // namespace fused_attn::cpu
