// The CUDA kernels as their callers see them: they compute what an AttentionParams describes, on a stream.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "../common/attention_params.h"
#include "errors.h"

namespace fused_attn::gpu {

// Into how many parts each kind of forward kernel divides the keys of a row; 0 = kernels of this kind do not run. With
// both kinds, the decode kernels compute the sequences of a packed call that have few queries.
struct KeySplits {
  int32_t decode = 0;
  int32_t large = 1;
};

// How many programs share the work for a block of rows of a gradient: for dq each has a part of the keys, for dk and dv
// each has a part of the queries. The fused backward of sm_90a has no blocks of dq.
struct GradientSplits {
  int32_t dq = 1;
  int32_t dk = 1;  // and dv
};

// In bytes. The kernels copy pieces of the workspace in bulk, in groups of 16 bytes.
constexpr int64_t kWorkspaceAlignment = 16;

// One call of forward or backward: what to compute, and where to run.
struct Call {
  AttentionParams params;
  int64_t batch_entries = 0;       // batch entries of the tensors: 1 when packed
  int64_t rows_q = 0;              // rows of a head of the query: seqlen_q, or the rows of all sequences when packed
  int64_t rows_k = 0;              // the same for the key
  KeySplits splits;                // in forward
  GradientSplits gradient_splits;  // in backward
  int architecture = 80;           // the kernels of this architecture run: 80, or 90 for sm_90a
  int device = 0;                  // number of the CUDA device
  void* workspace = nullptr;       // aligned to kWorkspaceAlignment; its contents do not matter
  int64_t workspace_bytes = 0;
  void* stream = nullptr;  // a cudaStream_t
};

// What the size of the workspace depends on. The caller knows all of this before it allocates a tensor. The fields are
// those of AttentionParams and Call unless said otherwise. Wherever they are listed, they are in this order.
struct WorkspaceNeeds {
  int architecture = 80;
  bool is_backward = false;
  int64_t batch = 0;
  int64_t batch_entries = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t rows_q = 0;
  int64_t rows_k = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t head_dim = 0;  // or that of the kernels, which may be larger
  int64_t value_dim = 0;
  bool is_packed = false;
  bool has_key_padding = false;
  int64_t mask_entries = 0;         // different pairs (batch entry, head) in the dense mask; 0 = no mask
  int64_t relative_bias_heads = 0;  // 0 = no relative bias
  KeySplits splits;
  GradientSplits gradient_splits;
  bool wants_dquery = false;
  bool wants_dkey = false;
  bool wants_dvalue = false;
  // 1 in a dimension that the bias broadcasts along; none = the gradient of bias is not wanted
  std::optional<std::array<int64_t, 4>> dbias_shape;
  bool wants_dkey_bias = false;
  bool wants_drelative_bias = false;
};

// How many bytes of workspace the kernels need besides inputs and results.
int64_t workspace_bytes(WorkspaceNeeds needs);

// Why no kernel can run on the CUDA device, for example because the driver is too old. Empty if kernels can run. Throws
// OutOfMemory or another std::runtime_error for a cause that may pass, which says nothing about the next call.
std::string unusable_reason(int device);

// How the module was built: its version, its compiler, and the architectures of its kernels in CMake's notation, such
// as "80,90a-real".
struct BuildInfo {
  const char* version;
  const char* compiler;
  const char* architectures;
};
BuildInfo build_info();

// Whether the tensors of a call lie in the memory of a CPU, because the emulation takes the place of a GPU.
bool runs_on_cpu();

// Launch the kernels on the call's stream, and return without waiting for them. They throw std::invalid_argument,
// std::length_error, OutOfMemory or another std::runtime_error. A call that throws leaves nothing behind: the next call
// runs as if there had been none.
void forward(const Call& call);
void backward(const Call& call);

}  // namespace fused_attn::gpu
