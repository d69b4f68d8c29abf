// The CPU kernels. Each works on `n` neighbouring elements of one client's row.
#pragma once

#include "rows.h"

namespace fedkernels {

// What one local step reads and writes, from some element on. Null pointers are options that are not used.
template <class T, class G>
struct Rows {
  const T* source;  // parameters before the step; `y` itself unless the step restores from elsewhere
  T *y, *m, *v;
  const G* g;
  const T *global, *x;  // one row for all clients
  T* delta;

  Rows at(int64_t element) const {
    auto moved = [element](auto* pointer) { return pointer ? pointer + element : pointer; };
    return {moved(source), moved(y), moved(m), moved(v), moved(g), moved(global), moved(x), moved(delta)};
  }
};

// Ask for the lines of a later tile: with five streams that is more than the processor does by itself. Streams take
// turns, as they do in the computation.
template <class T, class G>
INLINE void prefetch_ahead(int64_t k, int64_t n, const Rows<T, G>& rows) {
  if (k + kAhead >= n) return;
  const Rows<T, G> ahead = rows.at(k + kAhead);
  for (int64_t i = 0; i < kTile; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(ahead.source + i);
    if (ahead.m) __builtin_prefetch(ahead.m + i);
    if (ahead.v) __builtin_prefetch(ahead.v + i);
    __builtin_prefetch(ahead.g + i);
    if (ahead.global) __builtin_prefetch(ahead.global + i);
  }
}

// How the direction becomes a step: `y ← source − η (share · p + α G)`.
template <class T>
struct Step {
  T lr, share, alpha, scale;  // `scale` multiplies the gradient
  bool active;
};

template <class T>
struct Adamw {
  T beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
  T correction1, correction2;  // 1/(1 − β₁^k) and 1/(1 − β₂^(k₀+k)), of this client
};

template <class T>
struct Sgd {
  T momentum, weight_decay;
};

template <class T, class G>
INLINE void write_delta(int64_t n, const Rows<T, G>& rows) {
  const T *__restrict y = rows.y, *__restrict x = rows.x;
  if (T* __restrict delta = rows.delta)
    for (int64_t i = 0; i < n; ++i) delta[i] = y[i] - x[i];
}

// `start − η (share · p + α G)`.
template <class T>
INLINE T moved(T start, T p, T global, const Step<T>& step) {
  return start - step.lr * (step.share * p + step.alpha * global);
}

// The global direction of a tile, zeros where there is none: a loop without a branch is one for all options.
template <class T>
INLINE const T* global_or_zeros(const T* global) {
  alignas(64) static const T zeros[kTile] = {};
  return global ? global : zeros;
}

// What a client without a step left does: its parameters are restored and its delta is written.
template <class T, class G>
INLINE void skip_step(int64_t n, const Rows<T, G>& rows) {
  if (rows.source != rows.y) std::memcpy(rows.y, rows.source, n * sizeof(T));
  write_delta(n, rows);
}

// `perturb` is `w ← source + coefficient · direction`, and `saved ← source` before that; `past_caches` is for buffers
// that no cache could hold.
#define FEDKERNELS_DECLARE(T, G)                                                                                 \
  void adamw(int64_t n, const Adamw<T>&, const Step<T>&, const Rows<T, G>&);                                     \
  void sgd(int64_t n, const Sgd<T>&, const Step<T>&, const Rows<T, G>&);                                         \
  void perturb(int64_t n, T coefficient, const G* direction, const T* source, T* w, T* saved, bool past_caches); \
  double sum_of_squares(int64_t n, const G* g);
FEDKERNELS_DECLARE(float, float)
FEDKERNELS_DECLARE(float, Bf16)
FEDKERNELS_DECLARE(double, double)
#undef FEDKERNELS_DECLARE

}  // namespace fedkernels
