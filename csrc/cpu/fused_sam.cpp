// What sharpness-aware minimisation does before its second gradient: squared norms, and parameters moved uphill.
#include <algorithm>

#include "kernels.h"

namespace fedkernels {
namespace {

template <class T, class G>
INLINE void move(int64_t n, T coefficient, const G* direction, const T* source, T* w, T* saved) {
  // Tile by tile, so that what is saved is still in the cache when it is moved.
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t size = std::min(kTile, n - k);
    if (saved) std::memcpy(saved + k, source + k, size * sizeof(T));
#pragma GCC ivdep
    for (int64_t i = k; i < k + size; ++i) w[i] = source[i] + coefficient * widen(direction[i]);
  }
}

template <class G>
INLINE double squares(int64_t n, const G* g) {
  // A fixed number of partial sums: the order of additions is the same for every instruction set.
  constexpr int64_t kLanes = 32;
  double lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const double wide = widen(g[i + l]);
      lanes[l] += wide * wide;
    }
  for (int64_t i = whole; i < n; ++i) {
    const double wide = widen(g[i]);
    lanes[i - whole] += wide * wide;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

}  // namespace

CLONES void perturb(int64_t n, float c, const float* d, const float* source, float* w, float* saved) {
  move(n, c, d, source, w, saved);
}
CLONES void perturb(int64_t n, float c, const Bf16* d, const float* source, float* w, float* saved) {
  move(n, c, d, source, w, saved);
}
CLONES void perturb(int64_t n, double c, const double* d, const double* source, double* w, double* saved) {
  move(n, c, d, source, w, saved);
}
CLONES double sum_of_squares(int64_t n, const float* g) { return squares(n, g); }
CLONES double sum_of_squares(int64_t n, const Bf16* g) { return squares(n, g); }
CLONES double sum_of_squares(int64_t n, const double* g) { return squares(n, g); }

}  // namespace fedkernels
