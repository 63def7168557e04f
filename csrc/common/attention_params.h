// All that crosses from Python to a native kernel: pointers, sizes and strides. There is no torch type and no ownership
// here.
#pragma once
#include <cstdint>

namespace fused_attn {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// An unbounded side of the band. The number is small enough that adding a sequence length cannot overflow.
constexpr int64_t kUnbounded = int64_t{1} << 60;

// A tensor (batch, head, row, column). Strides count elements, and stride 0 broadcasts. The column stride is 1, except
// for the fields of AttentionParams whose comment allows another one.
struct TensorView {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;
  int64_t stride_col = 1;
};

// One call. The accumulate type is double if dtype is kFloat64, otherwise float.
//
// In a packed (varlen) call, `batch` counts the sequences, and the tensors have ONE batch entry (stride_batch is 0).
// Row r of sequence b lies at row cu_seqlens[b] + r. seqlen_q and seqlen_k are then the longest lengths.
struct AttentionParams {
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

  // logit = scale * q.k. If softcap > 0, then logit = softcap * tanh(logit / softcap). Biases and masks come after
  // that.
  double scale = 1.0;
  double softcap = 0.0;

  // The band: key j is visible to query i if -window_left <= j - (i + diagonal_offset) <= window_right.
  int64_t window_left = kUnbounded;
  int64_t window_right = kUnbounded;
  int64_t diagonal_offset = 0;

  TensorView key_padding;  // (B, 1, 1, S) bytes, nonzero = padding, any column stride; padding is never loaded
  TensorView mask;         // (B, H, L, S) bytes, nonzero = attend, any stride
  TensorView bias;         // (B, H, L, S) of bias_dtype, any stride
  DType bias_dtype = DType::kFloat32;  // dtype, or the accumulate type
  // (1, H, 1, L + S - 1), accumulate type. The bias of (i, j) is column j - i + L - 1. stride_head may be 0.
  TensorView relative_bias;
  TensorView sinks;  // (1, H, 1, 1), accumulate type: a logit that joins the denominator only

  // Dropout keeps entry (b, h, i, j) if its Philox word is dropout_threshold or more, and multiplies it by
  // dropout_scale.
  bool has_dropout = false;
  uint32_t dropout_threshold = 0;
  double dropout_scale = 1.0;
  uint64_t dropout_seed = 0;                   // for kernels on a CPU
  const int64_t* dropout_seed_data = nullptr;  // the address of the seed, for kernels on a GPU; null = no dropout

  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1), or null when not packed
  const int32_t* cu_seqlens_k = nullptr;  // (batch + 1)

  // Backward only. The kernel writes every entry of an output. A null output is not wanted.
  TensorView dout;            // (B, H, L, Dv)
  TensorView dlse;            // (B, H, L, 1), accumulate type, any stride_row; null = zero
  TensorView dquery;          // as query
  TensorView dkey;            // as key
  TensorView dvalue;          // as value
  TensorView dbias;           // as bias, accumulate type; stride 0 in a broadcast dimension = summed over it
  TensorView drelative_bias;  // as relative_bias; stride_head 0 = summed over the heads
  TensorView dsinks;          // as sinks

  int32_t num_threads = 1;
};

}  // namespace fused_attn
