// `X ← (aI + bR + cR²) X` with `R = XXᵀ`. Every product but those with X is symmetric: half of it is computed.
#include "newton_schulz.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "transpose.h"

namespace fedkernels {
namespace {

// Steps on R alone between two products with X. Rounding of R, which is relative to its largest eigenvalue, grows with
// a² in every step where eigenvalues are small; R is computed afresh from X before it matters,
// and sooner where elements have 16 bits, in two parts.
constexpr size_t kRestart = 3, kRestartInParts = 2;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The first element on a cache line; there is room for that.
template <class T>
T* on_line(T* memory) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// The distance of two rows: they begin on cache lines, and not all of them in the same set of the cache.
template <class T>
int64_t padded(int64_t cols, int64_t block) {
  constexpr int64_t kLine = 64 / sizeof(T), kSets = 1024 / sizeof(T);
  const int64_t step = std::max(kLine, block), stride = up(cols, step);
  return stride % kSets == 0 ? stride + step : stride;
}

// `‖u‖`. Squares of float32 fit float64; those of large float64 may not.
template <class T>
double norm(int64_t size, const T* u) {
  const double sum = sum_of_squares(size, u);
  if (std::isfinite(sum)) return std::sqrt(sum);
  double largest = 0, scaled = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(static_cast<double>(u[i])));
  for (int64_t i = 0; i < size; ++i) scaled += u[i] / largest * (u[i] / largest);
  return largest * std::sqrt(scaled);
}

template <class T>
INLINE void run_scaled(int64_t size, double scale, const T* from, T* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<T>(from[i] * scale);
}
CLONES void scaled(int64_t n, double scale, const float* from, float* to) { run_scaled(n, scale, from, to); }
CLONES void scaled(int64_t n, double scale, const double* from, double* to) { run_scaled(n, scale, from, to); }

CLONES void transposed(int64_t rows, int64_t cols, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  transpose(rows, cols, from, from_stride, to, to_stride);
}
CLONES void transposed(int64_t rows, int64_t cols, const double* from, int64_t from_stride, double* to,
                       int64_t to_stride) {
  transpose(rows, cols, from, from_stride, to, to_stride);
}

template <class T>
INLINE void run_direction(int64_t n, T momentum, const T* g, T* M, T* u) {
  for (int64_t i = 0; i < n; ++i) {
    M[i] = M[i] + (1 - momentum) * (g[i] - M[i]);
    u[i] = g[i] + momentum * (M[i] - g[i]);
  }
}

template <class T>
INLINE void run_update(int64_t n, const MuonUpdate<T>& s, const T* o, const T* G, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    const T local = s.share * (s.scale * o[i] + s.weight_decay * y[i]);
    y[i] -= s.lr * (G ? local + s.alpha * G[i] : local);
  }
}

}  // namespace

CLONES void muon_direction(int64_t n, float momentum, const float* g, float* M, float* u) {
  run_direction(n, momentum, g, M, u);
}
CLONES void muon_direction(int64_t n, double momentum, const double* g, double* M, double* u) {
  run_direction(n, momentum, g, M, u);
}
CLONES void muon_update(int64_t n, const MuonUpdate<float>& s, const float* o, const float* G, float* y) {
  run_update(n, s, o, G, y);
}
CLONES void muon_update(int64_t n, const MuonUpdate<double>& s, const double* o, const double* G, double* y) {
  run_update(n, s, o, G, y);
}

template <class T>
NewtonSchulz<T>::NewtonSchulz(int64_t rows, int64_t cols, const Engine<T>& engine)
    : engine_(engine), rows_(rows), cols_(cols), n_(std::min(rows, cols)), m_(std::max(rows, cols)),
      height_(up(n_, engine.block)), width_(up(m_, engine.block)), n_stride_(padded<T>(n_, engine.block)),
      m_stride_(padded<T>(m_, engine.block)),
      memory_(2 * height_ * m_stride_ + 4 * height_ * n_stride_ + 64 / sizeof(T)) {
  x_ = on_line(memory_.data());
  next_x_ = x_ + height_ * m_stride_;
  r_ = next_x_ + height_ * m_stride_;
  p_ = r_ + height_ * n_stride_;
  q_ = p_ + height_ * n_stride_;
  z_ = q_ + height_ * n_stride_;
}

template <class T>
void NewtonSchulz<T>::operator()(const T* u, T* o, const Coefficients& steps, double margin, const Parallel& parallel) {
  const bool tall = rows_ > cols_;
  const double length = norm(rows_ * cols_, u), scale = 1 / (length * margin + 1e-7);
  // What is not finite spreads over all of the matrix. An engine may lose the payload by which some NaN are one.
  if (std::isnan(length)) return std::fill(o, o + rows_ * cols_, std::numeric_limits<T>::quiet_NaN());
  if (tall) transposed(rows_, cols_, u, cols_, x_, m_stride_);
  for (int64_t i = 0; i < n_; ++i) {
    T* row = x_ + i * m_stride_;
    scaled(m_, scale, tall ? row : u + i * m_, row);
    std::fill(row + m_, row + width_, T(0));
    if (engine_.enter) engine_.enter(width_, row);
  }
  std::fill(x_ + n_ * m_stride_, x_ + height_ * m_stride_, T(0));
  // Where X is nearly square there is nothing to save, and float64 is for those who want every digit.
  const bool on_gram = sizeof(T) == 4 && 4 * m_ >= 5 * n_;
  for (size_t first = 0; first < steps.size();) {
    const size_t stretch = !on_gram ? 1 : engine_.enter ? kRestartInParts : kRestart;
    const size_t count = std::min(stretch, steps.size() - first);
    advance(steps.data() + first, count, parallel);
    first += count;
  }
  if (engine_.leave)
    for (int64_t i = 0; i < n_; ++i) engine_.leave(width_, x_ + i * m_stride_);
  if (tall) return transposed(n_, m_, x_, m_stride_, o, cols_);
  for (int64_t i = 0; i < n_; ++i) std::copy(x_ + i * m_stride_, x_ + i * m_stride_ + m_, o + i * m_);
}

template <class T>
void NewtonSchulz<T>::multiply(const Product<T>& product, const Parallel& parallel) {
  const int64_t panels = (product.cols + engine_.cols - 1) / engine_.cols;
  parallel(panels, [&](int64_t begin, int64_t end) {
    thread_local std::vector<T> packed;
    const size_t size = engine_.cols * product.depth + 64 / sizeof(T);
    if (packed.size() < size) packed.resize(size);
    engine_.panels(product, begin, end, on_line(packed.data()));
  });
}

template <class T>
void NewtonSchulz<T>::advance(const std::array<double, 3>* steps, size_t count, const Parallel& parallel) {
  // `to = α left · right + β added + γI`, all of them symmetric and commuting but for rounding.
  const auto symmetric = [&](double alpha, const T* left, const T* right, double beta, const T* added, double gamma,
                             T* to) {
    multiply({height_, height_, height_, left, n_stride_, right, n_stride_, false, true, T(alpha), T(beta), T(gamma),
              added, to, n_stride_},
             parallel);
  };
  multiply({height_, height_, width_, x_, m_stride_, x_, m_stride_, true, true, 1, 0, 0, nullptr, r_, n_stride_},
           parallel);
  for (size_t t = 0; t < count; ++t) {
    const auto [a, b, c] = steps[t];
    symmetric(c, r_, r_, b, r_, a, p_);
    if (t + 1 < count) {  // R ← PRP
      symmetric(1, p_, r_, 0, nullptr, 0, z_);
      symmetric(1, p_, z_, 0, nullptr, 0, r_);
    }
    if (t == 0) {
      std::swap(p_, q_);
    } else {
      symmetric(1, p_, q_, 0, nullptr, 0, z_);
      std::swap(q_, z_);
    }
  }
  multiply({height_, width_, height_, q_, n_stride_, x_, m_stride_, false, false, 1, 0, 0, nullptr, next_x_, m_stride_},
           parallel);
  std::swap(x_, next_x_);
}

template class NewtonSchulz<float>;
template class NewtonSchulz<double>;

}  // namespace fedkernels
