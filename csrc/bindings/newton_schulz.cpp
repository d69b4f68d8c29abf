// Tensors in, pointers out, for Newton–Schulz and the step of Muon on matrices.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "../cpu/newton_schulz.h"
#include "../cpu/tiles.h"
#include "tensors.h"

namespace fedkernels {
namespace {

Coefficients in_steps(at::ArrayRef<double> flat) {
  TORCH_CHECK(flat.size() % 3 == 0, flat.size(), " coefficients, expected three a step");
  Coefficients steps(flat.size() / 3);
  for (size_t i = 0; i < flat.size(); ++i) steps[i / 3][i % 3] = flat[i];
  return steps;
}

// Where the matrices of a batch begin, in elements; each of them has to be row-major and without gaps.
std::vector<int64_t> offsets(const Tensor& batch, const char* name) {
  const int64_t lead = batch.dim() - 2;
  TORCH_CHECK(lead >= 0, name, " has ", batch.dim(), " dimensions, expected [..., rows, cols]");
  const int64_t rows = batch.size(-2), cols = batch.size(-1);
  TORCH_CHECK((cols <= 1 || batch.stride(-1) == 1) && (rows <= 1 || batch.stride(-2) == cols), name,
              " has matrices of strides [", batch.stride(-2), ", ", batch.stride(-1), "], expected [", cols, ", 1]");
  std::vector<int64_t> starts{0};
  for (int64_t dim = 0; dim < lead; ++dim) {
    std::vector<int64_t> finer;
    for (const int64_t start : starts)
      for (int64_t i = 0; i < batch.size(dim); ++i) finer.push_back(start + i * batch.stride(dim));
    starts = std::move(finer);
  }
  return starts;
}

void share_units(int64_t units, const std::function<void(int64_t, int64_t)>& work) {
  at::parallel_for(0, units, 1, work);
}

// What multiplies matrices of float32 in tiles, null where FEDKERNELS_AMX does not ask for any.
const Engine<float>* tiles() {
  const char* variable = std::getenv("FEDKERNELS_AMX");
  const std::string asked = variable ? variable : "";
  if (asked.empty() || asked == "0") return nullptr;
  TORCH_CHECK_VALUE(asked == "1" || asked == "emulated", "FEDKERNELS_AMX=", asked, ", expected 0, 1 or emulated");
  const Engine<float>* engine = asked == "1" ? amx() : emulated_amx();
  TORCH_CHECK(engine, "FEDKERNELS_AMX=", asked, ": ",
              asked == "1" ? "this processor has no AMX tiles of bfloat16, or the system does not lend them"
                           : "the extension was built by a compiler that is too old for it");
  return engine;
}

template <class T>
const Engine<T>& engine_for(int64_t rows, int64_t cols) {
  if constexpr (std::is_same_v<T, float>)
    if (const Engine<float>* tiled = tiles(); tiled && std::min(rows, cols) >= kTiledSide) return *tiled;
  return engine<T>();
}

// Call `work(matrix, workspace, parallel)` for every matrix: threads share the matrices, or each of them where those are
// fewer than the threads.
template <class T, class F>
void for_each_matrix(int64_t count, int64_t rows, int64_t cols, const F& work) {
  const Engine<T>& engine = engine_for<T>(rows, cols);
  const auto run = [&](int64_t begin, int64_t end) {
    NewtonSchulz<T> workspace(rows, cols, engine);
    for (int64_t i = begin; i < end; ++i) work(i, workspace, share_units);
  };
  if (count < at::get_num_threads()) return run(0, count);
  at::parallel_for(0, count, 1, run);
}

template <class F>
void for_dtype(const Tensor& tensor, const char* name, const F& run) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " is on ", tensor.device(), ", expected cpu");
  if (tensor.scalar_type() == at::kDouble) return run(double{});
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " is ", tensor.scalar_type(), ", expected Float or Double");
  run(float{});
}

Tensor newton_schulz(const Tensor& u, at::ArrayRef<double> coefficients, double margin) {
  const auto steps = in_steps(coefficients);
  const auto starts = offsets(u, "u");
  const int64_t rows = u.size(-2), cols = u.size(-1);
  Tensor o = at::empty(u.sizes(), u.options().memory_format(at::MemoryFormat::Contiguous));
  for_dtype(u, "u", [&](auto element) {
    using T = decltype(element);
    const T* from = u.const_data_ptr<T>();
    T* to = o.mutable_data_ptr<T>();
    for_each_matrix<T>(starts.size(), rows, cols, [&](int64_t i, NewtonSchulz<T>& run, const Parallel& parallel) {
      run(from + starts[i], to + i * rows * cols, steps, margin, parallel);
    });
  });
  return o;
}

void muon_step(const Tensor& y, const Tensor& M, const Tensor& g, const Tensor& lr, double momentum,
               double weight_decay, double scale, double share, double alpha, const OptionalTensor& G,
               const OptionalTensor& active, at::ArrayRef<double> coefficients, double margin) {
  TORCH_CHECK(y.dim() == 4, "y has ", y.dim(), " dimensions, expected [C, count, rows, cols]");
  const int64_t clients = y.size(0), count = y.size(1), rows = y.size(2), cols = y.size(3), size = rows * cols;
  const auto steps = in_steps(coefficients);
  const auto y_at = offsets(y, "y"), M_at = offsets(M, "M"), g_at = offsets(g, "g");
  const auto rates = scalars(lr, clients, 0, "lr"), actives = scalars(active, clients, 1, "active");
  std::vector<int64_t> moving;  // the matrices of active clients
  for (int64_t i = 0; i < clients * count; ++i)
    if (actives[i / count] != 0) moving.push_back(i);
  for_dtype(y, "y", [&](auto element) {
    using T = decltype(element);
    for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{M, "M"}, {g, "g"}}) {
      TORCH_CHECK(tensor.scalar_type() == y.scalar_type(), name, " is ", tensor.scalar_type(), ", expected ",
                  y.scalar_type());
      TORCH_CHECK(tensor.sizes() == y.sizes(), name, " has shape ", tensor.sizes(), ", expected ", y.sizes());
    }
    const T *gradient = g.const_data_ptr<T>(), *global = memory<T>(G, count * size, "G");
    T *parameters = y.mutable_data_ptr<T>(), *momenta = M.mutable_data_ptr<T>();
    for_each_matrix<T>(moving.size(), rows, cols, [&](int64_t k, NewtonSchulz<T>& run, const Parallel& parallel) {
      thread_local std::vector<T> o;
      o.resize(size);
      const int64_t i = moving[k];
      muon_direction(size, T(momentum), gradient + g_at[i], momenta + M_at[i], o.data());
      run(o.data(), o.data(), steps, margin, parallel);
      const MuonUpdate<T> update{T(rates[i / count]), T(share), T(scale), T(weight_decay), T(alpha)};
      muon_update(size, update, o.data(), global ? global + i % count * size : nullptr, parameters + y_at[i]);
    });
  });
}

}  // namespace
}  // namespace fedkernels

TORCH_LIBRARY_FRAGMENT(fedkernels, library) {
  library.def("newton_schulz_cpp(Tensor u, float[] coefficients, float margin) -> Tensor");
  library.def(
      "muon_step_cpp(Tensor(a0!) y, Tensor(a1!) M, Tensor g, Tensor lr, float momentum, float weight_decay, "
      "float scale, float share, float alpha, Tensor? G, Tensor? active, float[] coefficients, float margin) -> ()");
}

TORCH_LIBRARY_IMPL(fedkernels, CPU, library) {
  library.impl("newton_schulz_cpp", &fedkernels::newton_schulz);
  library.impl("muon_step_cpp", &fedkernels::muon_step);
}
