// Newton–Schulz of one matrix on the CPU.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "products.h"

namespace fedkernels {

// Calls its second argument for ranges that make up all from 0 to the first, in any order and on any thread.
using Parallel = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;
using Coefficients = std::vector<std::array<double, 3>>;  // a, b and c of every step

// Workspace for matrices of one shape, used for one after the other.
template <class T>
class NewtonSchulz {
 public:
  NewtonSchulz(int64_t rows, int64_t cols, const Engine<T>& engine);
  // `u` and `o` are row-major and contiguous, and may be the same memory.
  void operator()(const T* u, T* o, const Coefficients& steps, double margin, const Parallel& parallel);

 private:
  // Some steps at once: products of the short side, and at their end one with X.
  void advance(const std::array<double, 3>* steps, size_t count, const Parallel& parallel);
  void multiply(const Product<T>& product, const Parallel& parallel);

  const Engine<T>& engine_;
  // n is the short side; heights and widths are what the engine multiplies, with zeros behind n and m.
  int64_t rows_, cols_, n_, m_, height_, width_, n_stride_, m_stride_;
  std::vector<T> memory_;
  T *x_, *next_x_, *r_, *p_, *q_, *z_;
};

// How the orthogonal matrix becomes a step.
template <class T>
struct MuonUpdate {
  T lr, share, scale, weight_decay, alpha;
};

// `muon_direction` is `M ← M + (1−β)(g − M)`, `u ← g + β(M − g)`; `muon_update`, `y ← y − η (share (scale · o + λy) + αG)`
// where G may be null.
#define FEDKERNELS_DECLARE(T)                                                \
  void muon_direction(int64_t size, T momentum, const T* g, T* M, T* u); \
  void muon_update(int64_t size, const MuonUpdate<T>&, const T* o, const T* G, T* y);
FEDKERNELS_DECLARE(float)
FEDKERNELS_DECLARE(double)
#undef FEDKERNELS_DECLARE

}  // namespace fedkernels
