// Tensors in, pointers out, for the tail of a round. Rows may be strided; threads share work in units that depend on
// sizes alone.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../cpu/round_tail.h"
#include "tensors.h"

namespace fedkernels {
namespace {

// The first element of every row of a tensor `[C, d]` whose columns lie side by side; null where there is no tensor.
template <class T>
std::vector<T*> row_starts(const OptionalTensor& tensor, int64_t clients, int64_t d, const char* name) {
  if (!tensor) return std::vector<T*>(clients, nullptr);
  TORCH_CHECK(tensor->device().is_cpu(), name, " is on ", tensor->device(), ", expected cpu");
  TORCH_CHECK(tensor->scalar_type() == kDtype<T>, name, " is ", tensor->scalar_type(), ", expected ", kDtype<T>);
  TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == clients && tensor->size(1) >= d, name, " has shape ",
              tensor->sizes(), ", expected [", clients, ", ", d, "]");
  TORCH_CHECK(d <= 1 || tensor->stride(1) == 1, name, " has columns ", tensor->stride(1), " apart, expected 1");
  std::vector<T*> starts(clients);
  for (int64_t c = 0; c < clients; ++c) starts[c] = static_cast<T*>(tensor->data_ptr()) + c * tensor->stride(0);
  return starts;
}

// What every message of a round is made from: rows, and which parts of them are sent.
struct Messages {
  const Tensor& values;
  const OptionalTensor &x, &residual, &begins, &ends, &decoded;

  // The longest message.
  int64_t size() const {
    TORCH_CHECK(values.dim() == 2, "values has ", values.dim(), " dimensions, expected [C, d]");
    TORCH_CHECK(begins.has_value() == ends.has_value(), "begins and ends are given together or not at all");
    int64_t most = ends ? 0 : values.size(1);
    for (const Spans& spans : tables()) most = std::max(most, spans.size);
    return most;
  }

  std::vector<Spans> tables() const {
    const int64_t clients = values.size(0), d = values.size(1);
    std::vector<Spans> all(clients, {nullptr, nullptr, 1, d});
    if (!ends) return all;
    TORCH_CHECK(ends->dim() == 2, "ends has ", ends->dim(), " dimensions, expected [C, spans]");
    const int64_t count = ends->size(1);
    const auto *begin = memory<int64_t>(begins, clients * count, "begins"),
               *end = memory<int64_t>(ends, clients * count, "ends");
    for (int64_t c = 0; c < clients; ++c, begin += count, end += count) {
      for (int64_t s = 0, before = 0; s < count; before = end[s++])
        TORCH_CHECK(end[s] >= before && begin[s] >= 0 && begin[s] + end[s] - before <= d, "span ", s, " of client ", c,
                    " is not within a row of ", d);
      all[c] = {begin, end, count, count ? end[count - 1] : 0};
    }
    return all;
  }

  // Call `work(client, first, size, sent)` for parts of messages of `unit` values.
  template <class T, class F>
  void for_each_part(int64_t unit, const F& work) const {
    const int64_t clients = values.size(0), d = values.size(1), units = (size() + unit - 1) / unit;
    const auto from = row_starts<T>(values, clients, d, "values");
    const auto kept = row_starts<T>(residual, clients, d, "residual"), to = row_starts<T>(decoded, clients, d, "decoded");
    const T* start = memory<T>(x, d, "x");
    const auto spans = tables();
    // Neighbouring units are the same part of different clients: what they share of `x` is read once.
    at::parallel_for(0, units * clients, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t c = k % clients, first = k / clients * unit, size = std::min(unit, spans[c].size - first);
        if (size > 0) work(c, first, size, Sent<T>{spans[c], from[c], start, kept[c], to[c]});
      }
    });
  }
};

template <class F>
void for_real(const Tensor& values, const F& run) {
  if (values.scalar_type() == at::kDouble) return run(double{});
  run(float{});
}

void encode_int8_rows(const Tensor& values, const OptionalTensor& x, const OptionalTensor& residual,
                      const OptionalTensor& begins, const OptionalTensor& ends, int64_t chunk, const Tensor& key,
                      const Tensor& clients, int64_t wire, const OptionalTensor& payload, const OptionalTensor& scale,
                      const OptionalTensor& decoded) {
  TORCH_CHECK(chunk > 0, "chunk is ", chunk, ", expected at least 1");
  const Messages messages{values, x, residual, begins, ends, decoded};
  const int64_t rows = values.size(0), size = messages.size();
  const auto q = row_starts<int8_t>(payload, rows, size, "payload");
  const auto scales = row_starts<float>(scale, rows, (size + chunk - 1) / chunk, "scale");
  const auto secret = static_cast<uint64_t>(*memory<int64_t>(key, 1, "key"));
  const int64_t* ids = memory<int64_t>(clients, rows, "clients");
  const int64_t unit = std::max<int64_t>(kChunk / chunk, 1) * chunk;
  for_real(values, [&](auto real) {
    using T = decltype(real);
    messages.for_each_part<T>(unit, [&](int64_t c, int64_t first, int64_t part, const Sent<T>& sent) {
      const Draws draws{secret, static_cast<uint32_t>(ids[c]), static_cast<uint32_t>(wire)};
      encode_int8(first, part, chunk, draws, sent, q[c], scales[c]);
    });
  });
}

void encode_bf16_rows(const Tensor& values, const OptionalTensor& x, const OptionalTensor& residual,
                      const OptionalTensor& begins, const OptionalTensor& ends, const OptionalTensor& payload,
                      const OptionalTensor& decoded) {
  const Messages messages{values, x, residual, begins, ends, decoded};
  const auto to = row_starts<Bf16>(payload, values.size(0), messages.size(), "payload");
  for_real(values, [&](auto real) {
    using T = decltype(real);
    messages.for_each_part<T>(kChunk, [&](int64_t c, int64_t first, int64_t part, const Sent<T>& sent) {
      encode_bf16(first, part, sent, to[c]);
    });
  });
}

void accumulate_rows(const Tensor& sums, const Tensor& rows, const Tensor& weights) {
  TORCH_CHECK(rows.dim() == 2, "rows has ", rows.dim(), " dimensions, expected [C, d]");
  const int64_t clients = rows.size(0), d = rows.size(1);
  const auto factors = scalars(weights.expand({clients}), clients, 0, "weights");
  for_real(sums, [&](auto sum) {
    using S = decltype(sum);
    S* to = memory<S>(sums, d, "sums");
    const std::vector<S> narrow(factors.begin(), factors.end());
    for_real(rows, [&](auto real) {
      using R = decltype(real);
      const auto starts = row_starts<R>(rows, clients, d, "rows");
      const std::vector<const R*> from(starts.begin(), starts.end());
      const Weighted<S, R> sent{from.data(), narrow.data(), clients};
      for_each_chunk(1, d, [&](int64_t, int64_t first, int64_t size) { accumulate(first, size, sent, to); });
    });
  });
}

// `Σ r²` of every row: float64 sums of fixed chunks, added in their order, whatever the number of threads.
Tensor square_sums_rows(const Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2, "rows has ", rows.dim(), " dimensions, expected [C, d]");
  const int64_t clients = rows.size(0), d = rows.size(1), chunks = (d + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks * clients);
  for_real(rows, [&](auto real) {
    const auto from = row_starts<decltype(real)>(rows, clients, d, "rows");
    for_each_chunk(clients, d, [&](int64_t c, int64_t first, int64_t size) {
      partial[c * chunks + first / kChunk] = sum_of_squares(size, from[c] + first);
    });
  });
  Tensor out = at::zeros({clients}, rows.options().dtype(at::kDouble));
  double* totals = out.mutable_data_ptr<double>();
  for (int64_t c = 0; c < clients; ++c)
    for (int64_t k = 0; k < chunks; ++k) totals[c] += partial[c * chunks + k];
  return out;
}

}  // namespace
}  // namespace fedkernels

TORCH_LIBRARY_FRAGMENT(fedkernels, library) {
  library.def(
      "encode_int8_cpp(Tensor values, Tensor? x, Tensor(a2!)? residual, Tensor? begins, Tensor? ends, SymInt chunk, "
      "Tensor key, Tensor clients, SymInt wire, Tensor(a9!)? payload, Tensor(a10!)? scale, Tensor(a11!)? decoded) -> ()");
  library.def(
      "encode_bf16_cpp(Tensor values, Tensor? x, Tensor(a2!)? residual, Tensor? begins, Tensor? ends, "
      "Tensor(a5!)? payload, Tensor(a6!)? decoded) -> ()");
  library.def("accumulate_cpp(Tensor(a0!) sums, Tensor rows, Tensor weights) -> ()");
  library.def("square_sums_cpp(Tensor rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(fedkernels, CPU, library) {
  library.impl("encode_int8_cpp", &fedkernels::encode_int8_rows);
  library.impl("encode_bf16_cpp", &fedkernels::encode_bf16_rows);
  library.impl("accumulate_cpp", &fedkernels::accumulate_rows);
  library.impl("square_sums_cpp", &fedkernels::square_sums_rows);
}
