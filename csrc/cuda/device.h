// The few device primitives that the CUDA kernels are written in. nvcc gets the instructions; any other compiler gets
// their emulation on the CPU, which is how the same source is tested where there is no GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define GRID_CONSTANT const __grid_constant__

namespace fedkernels {

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

// Volatile, so that the compiler keeps nothing that follows from it longer than the caller does.
DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
DEVICE int block_index() { return blockIdx.x; }

DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

DEVICE void sync_block() { __syncthreads(); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

// A barrier of all threads of a cluster, behind which they see what the others wrote to global memory before it.
DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Four 8×8 matrices of 16-bit elements from shared memory; lane l gives the address of row l mod 8 of matrix l / 8.
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b of 16×16 and 16×8 halves, in float32.
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to halves, the first in the low bits.
DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE void unpack_halves(uint32_t packed, float& low, float& high) {
  asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
      : "=f"(low), "=f"(high)
      : "r"(packed));
}

// Past the first-level cache, which does not see what other multiprocessors write.
DEVICE float load_past_l1(const float* from) { return __ldcg(from); }
DEVICE Float4 load_past_l1(const Float4* from) {
  const float4 value = __ldcg(reinterpret_cast<const float4*>(from));
  return {value.x, value.y, value.z, value.w};
}

DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE float square_root(float value) { return __fsqrt_rn(value); }

// The architecture that the code which runs on this device was compiled for, such as 90, into `arch`; the CUDA error, or
// 0. It is what __CUDA_ARCH__ was: a newer device may run PTX of an older one, which its own capability does not tell.
template <class Arguments>
int compiled_for(void (*kernel)(Arguments), int& arch) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  arch = attributes.ptxVersion;
  return error;
}

// Start a grid of `blocks` in clusters of `cluster`, each block with `shared_bytes`; the CUDA error, or 0.
template <class Arguments>
int launch(void (*kernel)(Arguments), const Arguments& arguments, int blocks, int cluster, int threads,
           int shared_bytes, void* stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace fedkernels

#else
#include "emulator.h"
#endif
