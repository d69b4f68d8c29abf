// Newton–Schulz of many matrices in one launch: what the launcher takes. No torch and no CUDA header.
#pragma once

#include <cstdint>

namespace fedkernels {

constexpr int kMaxShortSide = 256, kMaxSteps = 32, kMaxBatches = 96;

// Float32 matrices of one shape, `count = outer × inner`. Element (i, k) of the short and the long side of matrix b is at
// `b / inner · outer_stride + b mod inner · inner_stride + i · short_stride + k · long_stride`. `in` and `out` do not
// overlap.
struct Batch {
  const float* in;
  float* out;
  int64_t count, inner;
  int64_t short_side, long_side;
  int64_t in_outer, in_inner, in_short, in_long;
  int64_t out_outer, out_inner, out_short, out_long;
};

// How matrices are spread over blocks. A matrix belongs to one block, or to the `cluster` blocks of one cluster, each of
// which has a slab of its long side.
struct Plan {
  int32_t cluster, shared_bytes;
  int64_t clusters, workspace_floats;
};

}  // namespace fedkernels

// All return 0, or a CUDA error code.

// The `max_cluster` of the calls below on the current device: 1 where the code that it runs knows no clusters.
extern "C" int fedkernels_newton_schulz_max_cluster(int* max_cluster);

// Batches are at most kMaxBatches, and their short sides at most kMaxShortSide. `shared_limit` is what one block may have
// on the device.
extern "C" int fedkernels_newton_schulz_plan(const fedkernels::Batch* batches, int count, int shared_limit,
                                             int max_cluster, fedkernels::Plan* plan);

// `coefficients` are `steps` triples a, b, c on the host; U is divided by `margin · ‖U‖_F + 1e-7`. `workspace` is
// device memory of the plan's size, and may be null where that is 0.
extern "C" int fedkernels_newton_schulz(const fedkernels::Batch* batches, int count, const float* coefficients,
                                        int steps, float margin, int shared_limit, int max_cluster, float* workspace,
                                        void* stream);
