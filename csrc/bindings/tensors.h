// What bindings share: checks of tensors, dispatch on dtype, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../cpu/kernels.h"

namespace fedkernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
constexpr at::ScalarType kDtype = c10::CppTypeToScalarType<T>::value;
template <>
constexpr at::ScalarType kDtype<Bf16> = at::kBFloat16;

// The memory of a tensor that has to be contiguous, of one dtype and of one size; null where there is no tensor.
template <class T>
T* memory(const OptionalTensor& tensor, int64_t elements, const char* name) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->device().is_cpu(), name, " is on ", tensor->device(), ", expected cpu");
  TORCH_CHECK(tensor->is_contiguous(), name, " is not contiguous");
  TORCH_CHECK(tensor->scalar_type() == kDtype<T>, name, " is ", tensor->scalar_type(), ", expected ", kDtype<T>);
  TORCH_CHECK(tensor->numel() == elements, name, " has ", tensor->numel(), " elements, expected ", elements);
  return static_cast<T*>(tensor->data_ptr());
}

// Rows of clients: contiguous each, wherever the next one begins. Null where there is no tensor.
template <class T>
struct ClientRows {
  T* data = nullptr;
  int64_t stride = 0;

  T* row(int64_t c) const { return data ? data + c * stride : nullptr; }
};

template <class T>
ClientRows<T> client_rows(const OptionalTensor& tensor, int64_t clients, int64_t d, const char* name) {
  if (!tensor) return {};
  TORCH_CHECK(tensor->device().is_cpu(), name, " is on ", tensor->device(), ", expected cpu");
  TORCH_CHECK(tensor->scalar_type() == kDtype<T>, name, " is ", tensor->scalar_type(), ", expected ", kDtype<T>);
  TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == clients && tensor->size(1) == d, name, " has shape ",
              tensor->sizes(), ", expected [", clients, ", ", d, "]");
  TORCH_CHECK(d <= 1 || tensor->stride(1) == 1, name, " has rows that are not contiguous");
  return {static_cast<T*>(tensor->data_ptr()), tensor->stride(0)};
}

// Scalars that are tensors, one or one per client, in whatever dtype they come.
std::vector<double> scalars(const OptionalTensor& tensor, int64_t clients, double otherwise, const char* name) {
  if (!tensor) return std::vector<double>(clients, otherwise);
  TORCH_CHECK(tensor->numel() == 1 || tensor->numel() == clients, name, " has ", tensor->numel(),
              " elements, expected 1 or one for each of ", clients, " clients");
  const Tensor wide = tensor->to(at::kCPU, at::kDouble).contiguous();
  std::vector<double> values(clients);
  for (int64_t c = 0; c < clients; ++c) values[c] = wide.const_data_ptr<double>()[wide.numel() == 1 ? 0 : c];
  return values;
}

// Call `work(client, first, size)` for every chunk of every row. Neighbouring units are the same chunk of different
// clients, so that a row they share is read from memory once.
template <class F>
void for_each_chunk(int64_t clients, int64_t d, const F& work) {
  const int64_t chunks = (d + kChunk - 1) / kChunk;
  at::parallel_for(0, chunks * clients, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / clients * kChunk;
      work(unit % clients, first, std::min(kChunk, d - first));
    }
  });
}

template <class F>
void for_dtypes(const Tensor& y, const Tensor& g, const F& run) {
  if (y.scalar_type() == at::kDouble) return run(double{}, double{});
  if (g.scalar_type() == at::kBFloat16) return run(float{}, Bf16{});
  run(float{}, float{});
}

}  // namespace
}  // namespace fedkernels
