// FUSED_ATTN_HOST_DEVICE: a function that host code and kernels may call, inlined in both.
#pragma once

#if defined(__CUDACC__)
#define FUSED_ATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_ATTN_HOST_DEVICE __attribute__((always_inline)) inline
#endif
