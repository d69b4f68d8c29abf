// Federated AdamW: moments, both bias corrections, decoupled decay and the global direction in one pass over memory.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace fedkernels {
namespace {

template <class T, class G>
INLINE void run(int64_t n, const Adamw<T>& o, const Step<T>& step, const Rows<T, G>& rows) {
  if (!step.active) return skip_step(n, rows);
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t size = std::min(kTile, n - k);
    const Rows<T, G> tile = rows.at(k);
    prefetch_ahead(k, n, rows);
    T *__restrict m = tile.m, *__restrict v = tile.v, *y = tile.y;
    const T *source = tile.source, *__restrict global = global_or_zeros(tile.global);
    const G* __restrict gradient = tile.g;
#pragma GCC ivdep  // `source` is `y` itself or does not overlap it
    for (int64_t i = 0; i < size; ++i) {
      const T g = step.scale * widen(gradient[i]);
      m[i] = o.beta1 * m[i] + o.one_minus_beta1 * g;
      v[i] = o.beta2 * v[i] + o.one_minus_beta2 * (g * g);
      const T local = m[i] * o.correction1 / (std::sqrt(v[i] * o.correction2) + o.eps);
      y[i] = moved(source[i], local + o.weight_decay * source[i], global[i], step);
    }
    write_delta(size, tile);
  }
}

}  // namespace

CLONES void adamw(int64_t n, const Adamw<float>& o, const Step<float>& s, const Rows<float, float>& r) { run(n, o, s, r); }
CLONES void adamw(int64_t n, const Adamw<float>& o, const Step<float>& s, const Rows<float, Bf16>& r) { run(n, o, s, r); }
CLONES void adamw(int64_t n, const Adamw<double>& o, const Step<double>& s, const Rows<double, double>& r) {
  run(n, o, s, r);
}

}  // namespace fedkernels
