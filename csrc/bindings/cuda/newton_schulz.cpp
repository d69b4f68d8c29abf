// Tensors in, pointers out, for Newton–Schulz on a GPU: all matrices of a list of batches in one launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../../cuda/newton_schulz.h"

namespace fedkernels {
namespace {

using at::Tensor;

// A batch `[..., rows, cols]` of any strides, as long as two of them place all matrices.
Batch batch_of(const Tensor& u, const Tensor& o) {
  const int64_t rows = u.size(-2), cols = u.size(-1);
  // Dimensions before the matrix, joined where one continues the other.
  std::vector<std::pair<int64_t, int64_t>> lead;  // size and stride
  for (int64_t dim = 0; dim < u.dim() - 2; ++dim) {
    if (u.size(dim) == 1) continue;
    if (!lead.empty() && lead.back().second == u.size(dim) * u.stride(dim))
      lead.back() = {lead.back().first * u.size(dim), u.stride(dim)};
    else
      lead.emplace_back(u.size(dim), u.stride(dim));
  }
  TORCH_CHECK(lead.size() <= 2, "u has strides ", u.strides(), " for shape ", u.sizes(),
              ", expected at most two that place its matrices");
  while (lead.size() < 2) lead.insert(lead.begin(), {1, 0});
  const auto [outer, outer_stride] = lead[0];
  const auto [inner, inner_stride] = lead[1];
  const bool tall = rows > cols;
  const int64_t size = rows * cols, row_stride = u.stride(-2), col_stride = u.stride(-1);
  return {u.const_data_ptr<float>(), o.mutable_data_ptr<float>(), outer * inner, inner,
          std::min(rows, cols), std::max(rows, cols),
          outer_stride, inner_stride, tall ? col_stride : row_stride, tall ? row_stride : col_stride,
          inner * size, size, tall ? 1 : cols, tall ? cols : 1};
}

void check(int code, const char* what) {
  const auto error = static_cast<cudaError_t>(code);
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "newton_schulz_cuda does not know its device");
  return value;
}

std::vector<Tensor> newton_schulz(at::TensorList us, at::ArrayRef<double> coefficients, double margin) {
  const int steps = static_cast<int>(coefficients.size() / 3);
  TORCH_CHECK(coefficients.size() % 3 == 0, coefficients.size(), " coefficients, expected three a step");
  TORCH_CHECK(steps <= kMaxSteps, steps, " steps, expected at most ", kMaxSteps);
  TORCH_CHECK(!us.empty(), "no matrices given");
  const c10::cuda::CUDAGuard guard(us[0].device());
  std::vector<Tensor> os;
  std::vector<Batch> batches;
  for (const Tensor& u : us) {
    TORCH_CHECK(u.device() == us[0].device(), "u is on ", u.device(), ", expected ", us[0].device());
    TORCH_CHECK(u.scalar_type() == at::kFloat, "u is ", u.scalar_type(), ", expected Float");
    TORCH_CHECK(u.dim() >= 2, "u has ", u.dim(), " dimensions, expected [..., rows, cols]");
    os.push_back(at::empty(u.sizes(), u.options().memory_format(at::MemoryFormat::Contiguous)));
    if (u.numel() == 0) continue;
    const int64_t side = std::min(u.size(-2), u.size(-1));
    TORCH_CHECK(side <= kMaxShortSide, "the short side is ", side, ", expected at most ", kMaxShortSide);
    batches.push_back(batch_of(u, os.back()));
  }
  // Without a step X is what it starts from: one of the polynomial x.
  std::vector<float> polynomials(coefficients.begin(), coefficients.end());
  if (steps == 0) polynomials = {1, 0, 0};

  const int major = attribute(cudaDevAttrComputeCapabilityMajor, us[0].device().index());
  TORCH_CHECK(major >= 8, "compute capability is ", major, ".x, expected at least 8.0");
  const int shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, us[0].device().index());
  int max_cluster = 1;
  check(fedkernels_newton_schulz_max_cluster(&max_cluster), "newton_schulz_cuda has no code for this device");
  for (size_t first = 0; first < batches.size(); first += kMaxBatches) {
    const int count = static_cast<int>(std::min<size_t>(kMaxBatches, batches.size() - first));
    const Batch* some = batches.data() + first;
    Plan plan{};
    check(fedkernels_newton_schulz_plan(some, count, shared_limit, max_cluster, &plan), "newton_schulz_cuda");
    const Tensor workspace = at::empty({plan.workspace_floats}, us[0].options());
    check(fedkernels_newton_schulz(some, count, polynomials.data(), static_cast<int>(polynomials.size() / 3),
                                   static_cast<float>(margin), shared_limit, max_cluster,
                                   workspace.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream().stream()),
          "newton_schulz_cuda did not start");
  }
  return os;
}

}  // namespace
}  // namespace fedkernels

TORCH_LIBRARY_FRAGMENT(fedkernels, library) {
  library.def("newton_schulz_cuda(Tensor[] u, float[] coefficients, float margin) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fedkernels, CUDA, library) { library.impl("newton_schulz_cuda", &fedkernels::newton_schulz); }
