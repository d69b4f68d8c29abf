// Tensors in, pointers out, for the optimizer steps and perturbations. The operators mutate what their schemas mark and
// return nothing else; their fakes are registered in Python, beside the entry points.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "tensors.h"

namespace fedkernels {
namespace {

// What both optimizers are given beside their own state and constants.
struct Arguments {
  const Tensor &y, &g, &lr;
  double share, alpha;
  const OptionalTensor &G, &scale, &active, &source, &x, &delta;

  // By client, the first elements of its rows.
  template <class T, class Gradient>
  std::vector<Rows<T, Gradient>> rows(const OptionalTensor& m, const OptionalTensor& v) const {
    TORCH_CHECK(y.dim() == 2, "y has ", y.dim(), " dimensions, expected [C, d]");
    TORCH_CHECK(x.has_value() == delta.has_value(), "x and delta are given together or not at all");
    const int64_t clients = y.size(0), d = y.size(1);
    const auto own = client_rows<T>(y, clients, d, "y");
    const auto from = source ? client_rows<T>(source, clients, d, "source") : own;
    const auto first = client_rows<T>(m, clients, d, "m"), second = client_rows<T>(v, clients, d, "v");
    const auto gradients = client_rows<Gradient>(g, clients, d, "g");
    const auto deltas = client_rows<T>(delta, clients, d, "delta");
    const T *global = memory<T>(G, d, "G"), *start = memory<T>(x, d, "x");
    std::vector<Rows<T, Gradient>> all(clients);
    for (int64_t c = 0; c < clients; ++c)
      all[c] = {from.row(c),      own.row(c), first.row(c), second.row(c),
                gradients.row(c), global,     start,        deltas.row(c)};
    return all;
  }

  template <class T>
  std::vector<Step<T>> steps() const {
    const int64_t clients = y.size(0);
    const auto rates = scalars(lr, clients, 0, "lr"), scales = scalars(scale, clients, 1, "scale");
    const auto actives = scalars(active, clients, 1, "active");
    std::vector<Step<T>> all(clients);
    for (int64_t c = 0; c < clients; ++c)
      all[c] = {T(rates[c]), T(share), T(alpha), T(scales[c]), actives[c] != 0};
    return all;
  }
};

void fused_adamw(const Tensor& y, const Tensor& m, const Tensor& v, const Tensor& g, const Tensor& lr,
                 const Tensor& step, const Tensor& v_steps, double beta1, double beta2, double eps,
                 double weight_decay, double share, double alpha, const OptionalTensor& G, const OptionalTensor& scale,
                 const OptionalTensor& active, const OptionalTensor& source, const OptionalTensor& x,
                 const OptionalTensor& delta) {
  const Arguments given{y, g, lr, share, alpha, G, scale, active, source, x, delta};
  for_dtypes(y, g, [&](auto parameter, auto gradient) {
    using T = decltype(parameter);
    const auto rows = given.rows<T, decltype(gradient)>(m, v);
    const auto steps = given.steps<T>();
    const int64_t clients = y.size(0), d = y.size(1);
    const auto taken = scalars(step, clients, 0, "step"), seen = scalars(v_steps, clients, 0, "v_steps");
    std::vector<Adamw<T>> constants(clients);
    for (int64_t c = 0; c < clients; ++c)
      constants[c] = {T(beta1), T(1 - beta1), T(beta2), T(1 - beta2), T(eps), T(weight_decay),
                      T(1 / (1 - std::pow(beta1, taken[c]))), T(1 / (1 - std::pow(beta2, seen[c] + taken[c])))};
    for_each_chunk(clients, d, [&](int64_t c, int64_t first, int64_t size) {
      adamw(size, constants[c], steps[c], rows[c].at(first));
    });
  });
}

void fused_sgd(const Tensor& y, const OptionalTensor& m, const Tensor& g, const Tensor& lr, double momentum,
               double weight_decay, double share, double alpha, const OptionalTensor& G, const OptionalTensor& scale,
               const OptionalTensor& active, const OptionalTensor& source, const OptionalTensor& x,
               const OptionalTensor& delta) {
  const Arguments given{y, g, lr, share, alpha, G, scale, active, source, x, delta};
  for_dtypes(y, g, [&](auto parameter, auto gradient) {
    using T = decltype(parameter);
    const auto rows = given.rows<T, decltype(gradient)>(m, std::nullopt);
    const auto steps = given.steps<T>();
    const int64_t clients = y.size(0), d = y.size(1);
    const Sgd<T> constants{T(momentum), T(weight_decay)};
    for_each_chunk(clients, d, [&](int64_t c, int64_t first, int64_t size) {
      sgd(size, constants, steps[c], rows[c].at(first));
    });
  });
}

// `‖g_c‖₂` of every row: float64 sums of fixed chunks, added in their order, whatever the number of threads.
template <class G>
std::vector<double> norms(const Tensor& g) {
  TORCH_CHECK(g.dim() == 1 || g.dim() == 2, "g has ", g.dim(), " dimensions, expected [d] or [C, d]");
  const int64_t d = g.size(-1), clients = g.dim() == 2 ? g.size(0) : 1, chunks = (d + kChunk - 1) / kChunk;
  const auto rows = client_rows<G>(g.dim() == 2 ? g : g.unsqueeze(0), clients, d, "g");
  std::vector<double> partial(chunks * clients), total(clients);
  for_each_chunk(clients, d, [&](int64_t c, int64_t first, int64_t size) {
    partial[c * chunks + first / kChunk] = sum_of_squares(size, rows.row(c) + first);
  });
  for (int64_t c = 0; c < clients; ++c) {
    for (int64_t k = 0; k < chunks; ++k) total[c] += partial[c * chunks + k];
    total[c] = std::sqrt(total[c]);
  }
  return total;
}

Tensor row_norm(const Tensor& g) {
  Tensor out;
  const auto dtype = g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for_dtypes(g, g, [&](auto, auto gradient) {
    const auto values = norms<decltype(gradient)>(g);
    out = at::empty({static_cast<int64_t>(values.size())}, g.options().dtype(at::kDouble));
    std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
  });
  return out.to(dtype);
}

void fused_sam(const Tensor& w, const Tensor& direction, const OptionalTensor& source, const OptionalTensor& saved,
               const OptionalTensor& coefficient, double rho, double eps) {
  TORCH_CHECK(w.dim() == 2, "w has ", w.dim(), " dimensions, expected [C, d]");
  for_dtypes(w, direction, [&](auto parameter, auto gradient) {
    using T = decltype(parameter);
    using G = decltype(gradient);
    const int64_t clients = w.size(0), d = w.size(1);
    const bool one_row = direction.dim() == 1;
    const auto to = client_rows<T>(w, clients, d, "w"), kept = client_rows<T>(saved, clients, d, "saved");
    const auto from = source ? client_rows<T>(source, clients, d, "source") : to;
    const auto along = one_row ? ClientRows<G>{memory<G>(direction, d, "direction"), 0}
                               : client_rows<G>(direction, clients, d, "direction");
    std::vector<double> coefficients;
    if (coefficient) {
      coefficients = scalars(coefficient, clients, 0, "coefficient");
    } else {
      coefficients = norms<G>(direction);
      for (double& norm : coefficients) norm = rho / (norm + eps);
      coefficients.resize(clients, coefficients.front());
    }
    constexpr int64_t kCacheBytes = 32 << 20;
    const bool past_caches = w.numel() * static_cast<int64_t>(sizeof(T)) >= kCacheBytes;
    for_each_chunk(clients, d, [&](int64_t c, int64_t first, int64_t size) {
      T* keep = kept.data ? kept.row(c) + first : nullptr;
      perturb(size, T(coefficients[c]), along.row(c) + first, from.row(c) + first, to.row(c) + first, keep,
              past_caches);
    });
  });
}

}  // namespace
}  // namespace fedkernels

TORCH_LIBRARY_FRAGMENT(fedkernels, library) {
  library.def(
      "fused_adamw_cpp(Tensor(a0!) y, Tensor(a1!) m, Tensor(a2!) v, Tensor g, Tensor lr, Tensor step, Tensor v_steps, "
      "float beta1, float beta2, float eps, float weight_decay, float share, float alpha, Tensor? G, Tensor? scale, "
      "Tensor? active, Tensor? source, Tensor? x, Tensor(a18!)? delta) -> ()");
  library.def(
      "fused_sgd_cpp(Tensor(a0!) y, Tensor(a1!)? m, Tensor g, Tensor lr, float momentum, float weight_decay, "
      "float share, float alpha, Tensor? G, Tensor? scale, Tensor? active, Tensor? source, Tensor? x, "
      "Tensor(a13!)? delta) -> ()");
  library.def(
      "fused_sam_cpp(Tensor(a0!) w, Tensor direction, Tensor? source, Tensor(a3!)? saved, Tensor? coefficient, "
      "float rho, float eps) -> ()");
  library.def("row_norm_cpp(Tensor g) -> Tensor");
}

TORCH_LIBRARY_IMPL(fedkernels, CPU, library) {
  library.impl("fused_adamw_cpp", &fedkernels::fused_adamw);
  library.impl("fused_sgd_cpp", &fedkernels::fused_sgd);
  library.impl("fused_sam_cpp", &fedkernels::fused_sam);
  library.impl("row_norm_cpp", &fedkernels::row_norm);
}
