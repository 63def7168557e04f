// What a native kernel gets from Python: pointers, sizes and strides. The structs contain no torch type, and they own
// no memory: the caller keeps the tensors alive during the call.
#pragma once
#include <cstdint>

namespace fused_attn {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// The value of band_left or band_right if this side of the band has no bound. The number is larger than every
// sequence length, and so small that the sum of the number and a sequence length does not overflow.
constexpr int64_t kUnbounded = int64_t{1} << 60;

// The largest num_splits.
constexpr int64_t kMaxSplits = 256;

// A tensor with the dimensions (batch, head, row, column). Strides count elements. A dimension with stride 0 is
// broadcast: all its indices name the same element. The column stride is 1, except for the fields of AttentionParams
// whose comment allows another column stride.
struct TensorView {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;
  int64_t stride_col = 1;
};

// Whether each group of `group` columns of x is one aligned piece of `bytes` bytes. x has `columns` columns, and no
// group may reach beyond the last one.
inline bool has_aligned_groups(const TensorView& x, int64_t columns, int64_t group, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && columns % group == 0 && x.stride_col == 1 &&
         x.stride_row % group == 0 && x.stride_head % group == 0 && x.stride_batch % group == 0;
}

// The position of the first entry of the scores among the scores that dropout numbers. A call that computes a part of a
// larger attention drops the entries that the whole call would drop.
struct DropoutOrigin {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t query = 0;
  int64_t key = 0;
};

// The arguments of a call that are neither tensors nor their sizes.
struct AttentionOptions {
  // The kernel computes logit = scale * q.k. If softcap > 0, logit = softcap * tanh(logit / softcap) follows. The
  // kernel applies biases and masks after the softcap.
  double scale = 1.0;
  double softcap = 0.0;

  // The band: key j is visible to query i if -band_left <= j - (i + offset) <= band_right. The offset of a sequence is
  // band_offset. If band_from_end, (its number of keys) - (its number of queries) is added.
  int64_t band_left = kUnbounded;
  int64_t band_right = kUnbounded;
  int64_t band_offset = 0;
  bool band_from_end = false;

  // Dropout sets the probability of entry (b, h, i, j) to zero if the random number of the entry (philox.h), which has
  // 16 bits, is below dropout_threshold. Otherwise dropout multiplies the probability by dropout_scale. The position of
  // the entry for Philox is its position in this call plus dropout_origin.
  bool has_dropout = false;
  uint32_t dropout_threshold = 0;
  double dropout_scale = 1.0;
  DropoutOrigin dropout_origin;

  // For packed calls only: no sequence is longer.
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;

  // Into how many parts the keys of each entry are cut, if the kernel cuts them; 0 = the kernel chooses. The parts of
  // an entry must not depend on other entries: they are shares of its own keys.
  int64_t num_splits = 0;

  // For backward only: the rows have more keys than those of this call, and lse and out are those of the whole rows.
  // So the probs of a row need not add up to 1.
  bool is_part = false;
};

// All arguments of one call. The accumulate type, which is the type of sums, is double if dtype is kFloat64, otherwise
// float. A tensor whose `data` is null is absent.
//
// In a packed (varlen) call, `batch` counts the sequences, but the packed tensors have no batch dimension, so their
// stride_batch is 0. Row r of sequence b is row cu_seqlens[b] + r of the packed tensor. In such a call, seqlen_q and
// seqlen_k are upper bounds of the lengths of all sequences. Keys of packed queries are packed, too, or lie in pages.
//
// In a paged call, the views of keys and values have a page in place of a batch entry, so their stride_batch is the
// stride between pages. Key j of entry b is row j % page_size of page block_table[b][j / page_size]. seqlen_k is
// the number of columns of the table times page_size. Entries of the table behind the last key may be any number.
struct AttentionParams : AttentionOptions {
  int64_t batch = 0;
  int64_t num_heads = 0;     // H, a multiple of num_kv_heads; query head h reads key head h / (H / Hkv)
  int64_t num_kv_heads = 0;  // Hkv
  int64_t seqlen_q = 0;      // L
  int64_t seqlen_k = 0;      // S
  int64_t head_dim = 0;      // D
  int64_t value_dim = 0;     // Dv
  DType dtype = DType::kFloat32;

  TensorView query;  // (B, H, L, D)
  TensorView key;    // (B, Hkv, S, D)
  TensorView value;  // (B, Hkv, S, Dv)
  TensorView out;    // (B, H, L, Dv)
  TensorView lse;    // (B, H, L, 1), accumulate type; natural log; -inf for an empty row; stride_row is 1
  // As lse, for forward only: the largest logit of each row; -inf for an empty row. Null = not wanted.
  TensorView row_max;

  TensorView key_padding;  // (B, 1, 1, S) bytes, nonzero = padding, any column stride; padding keys are not loaded
  TensorView mask;         // (B, H, L, S) bytes, nonzero = attend, any stride
  // (B, H, L, 2 * num_ranges) int32, the rows contiguous: the ranges begin, end of each query. Besides all other masks,
  // key j is visible only if begin <= j < end for one of them. The numbers may be any. Never given in a packed call.
  TensorView key_ranges;
  int64_t num_ranges = 0;              // 0 = the call has no key_ranges
  TensorView bias;                     // (B, H, L, S) of bias_dtype, any stride
  DType bias_dtype = DType::kFloat32;  // dtype, or the accumulate type
  TensorView key_bias;  // (B, 1, 1, S), accumulate type: a bias for each key, the same for all queries and heads
  // (1, H, 1, L + S - 1), accumulate type. The bias of query i and key j is in column j - i + L - 1. stride_head is 0
  // if all heads share one row.
  TensorView relative_bias;
  TensorView sinks;  // (1, H, 1, 1), accumulate type: a logit that is added to the denominator of the softmax only

  uint64_t dropout_seed = 0;                   // for kernels on a CPU
  const int64_t* dropout_seed_data = nullptr;  // the address of the seed, for kernels on a GPU; null = no dropout

  // Offsets on a CPU ascend within the rows of their tensor. Kernels on a GPU must clip them to these rows.
  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1), or null when not packed
  const int32_t* cu_seqlens_k = nullptr;  // (batch + 1), or null when keys are not packed
  // (batch), or null: where the queries of each sequence end, in place of cu_seqlens_q. Kernels on a CPU get it if each
  // of them computes some of the sequences. For them, the others have no queries.
  const int32_t* query_ends = nullptr;

  // (batch), or null: entry b has the keys [0, key_lengths[b]), and rows behind them are not loaded. Lengths on a CPU
  // lie in [0, seqlen_k]. Kernels on a GPU must clip them to this range. Never given with packed keys.
  const int32_t* key_lengths = nullptr;

  // A paged call has key_lengths, too. The numbers of pages up to the last key lie in [0, num_pages) on a CPU. Kernels
  // on a GPU must clip them to this range.
  const int32_t* block_table = nullptr;  // (batch, seqlen_k / page_size)
  int64_t block_table_stride = 0;        // from one batch entry to the next
  int64_t page_size = 0;                 // 0 = not paged
  int64_t num_pages = 0;

  // For backward only. The gradients are outputs, and the kernel writes every entry of them. The caller passes a null
  // tensor for a gradient that it does not want.
  TensorView dout;    // (B, H, L, Dv)
  TensorView dlse;    // (B, H, L, 1), accumulate type, any stride_row; null stands for zeros
  TensorView dquery;  // as query
  TensorView dkey;    // as key
  TensorView dvalue;  // as value
  TensorView dbias;   // as bias, of dbias_dtype; a dimension with stride 0 is summed over
  // The accumulate type, or dtype. On a CPU, dtype is allowed only if each score has an entry of its own.
  DType dbias_dtype = DType::kFloat32;
  TensorView dkey_bias;       // as key_bias
  TensorView drelative_bias;  // as relative_bias; stride_head 0 = summed over the heads
  TensorView dsinks;          // as sinks

  int32_t num_threads = 1;  // the largest number of threads that a CPU kernel may use
};

}  // namespace fused_attn
