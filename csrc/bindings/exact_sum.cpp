// Tensors in, pointers out, for exact sums. Threads share columns, and the result does not depend on how.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>

#include "../cpu/exact_sum.h"
#include "tensors.h"

namespace fedkernels {
namespace {

// The first element of a row of a tensor `[rows, d]` whose columns lie side by side.
template <class T>
T* row_of(const Tensor& tensor, int64_t row, int64_t rows, int64_t d, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " is on ", tensor.device(), ", expected cpu");
  TORCH_CHECK(tensor.scalar_type() == kDtype<T>, name, " is ", tensor.scalar_type(), ", expected ", kDtype<T>);
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == d, name, " has shape ", tensor.sizes(),
              ", expected [", rows, ", ", d, "]");
  TORCH_CHECK(d <= 1 || tensor.stride(1) == 1, name, " has columns ", tensor.stride(1), " apart, expected 1");
  return static_cast<T*>(tensor.data_ptr()) + row * tensor.stride(0);
}

void exact_add_rows(const Tensor& sums, const Tensor& rows, const Tensor& weights, const Tensor& largest) {
  TORCH_CHECK(rows.dim() == 2, "rows has ", rows.dim(), " dimensions, expected [C, d]");
  constexpr int64_t kSums = 512;  // stay in the nearest cache while the rows of all clients pass
  const int64_t clients = rows.size(0), d = rows.size(1);
  const auto factors = scalars(weights.expand({clients}), clients, 0, "weights");
  auto *high = row_of<int64_t>(sums, 0, 2, d, "sums"), *low = row_of<int64_t>(sums, 1, 2, d, "sums");
  double* most = memory<double>(largest, 1, "largest");
  std::mutex guard;
  const auto run = [&](auto real) {
    using R = decltype(real);
    std::vector<const R*> from(clients);
    for (int64_t c = 0; c < clients; ++c) from[c] = row_of<R>(rows, c, clients, d, "rows");
    for_each_chunk(1, d, [&](int64_t, int64_t first, int64_t size) {
      double here = 0;
      for (int64_t tile = first; tile < first + size; tile += kSums) {
        const int64_t n = std::min(kSums, first + size - tile);
        for (int64_t c = 0; c < clients; ++c)
          if (factors[c] != 0) here = std::max(here, exact_add(n, from[c] + tile, factors[c], high + tile, low + tile));
      }
      const std::lock_guard<std::mutex> lock(guard);
      *most = std::max(*most, here);
    });
  };
  if (rows.scalar_type() == at::kDouble) return run(double{});
  run(float{});
}

Tensor exact_values(const Tensor& sums) {
  TORCH_CHECK(sums.dim() == 2, "sums has ", sums.dim(), " dimensions, expected [2, d]");
  const int64_t d = sums.size(1);
  const auto *high = row_of<int64_t>(sums, 0, 2, d, "sums"), *low = row_of<int64_t>(sums, 1, 2, d, "sums");
  Tensor out = at::empty({d}, sums.options().dtype(at::kDouble));
  double* to = out.mutable_data_ptr<double>();
  for_each_chunk(1, d, [&](int64_t, int64_t first, int64_t size) {
    exact_value(size, high + first, low + first, to + first);
  });
  return out;
}

}  // namespace
}  // namespace fedkernels

TORCH_LIBRARY_FRAGMENT(fedkernels, library) {
  library.def("exact_add_cpp(Tensor(a0!) sums, Tensor rows, Tensor weights, Tensor(a3!) largest) -> ()");
  library.def("exact_value_cpp(Tensor sums) -> Tensor");
}

TORCH_LIBRARY_IMPL(fedkernels, CPU, library) {
  library.impl("exact_add_cpp", &fedkernels::exact_add_rows);
  library.impl("exact_value_cpp", &fedkernels::exact_values);
}
