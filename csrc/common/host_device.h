// FUSED_ATTN_HOST_DEVICE marks a function that host code and CUDA kernels may call. The compiler inlines such a
// function in both.
#pragma once

#if defined(__CUDACC__)
#define FUSED_ATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_ATTN_HOST_DEVICE __attribute__((always_inline)) inline
#endif
