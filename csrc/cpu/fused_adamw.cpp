// Federated AdamW: moments, both bias corrections, decoupled decay and the global direction in one pass over memory.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace fedkernels {
namespace {

template <class T, class G>
INLINE void run(int64_t n, const Adamw<T>& o, const Step<T>& step, const Rows<T, G>& rows) {
  if (!step.active) return skip_step(n, rows);
  T g[kTile], p[kTile];
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t size = std::min(kTile, n - k);
    const Rows<T, G> tile = rows.at(k, k);
    load_gradient(size, g, tile.g, step.scale);
    T *__restrict m = tile.m, *__restrict v = tile.v;
    const T* __restrict source = tile.source;
    for (int64_t i = 0; i < size; ++i) {
      m[i] = o.beta1 * m[i] + o.one_minus_beta1 * g[i];
      v[i] = o.beta2 * v[i] + o.one_minus_beta2 * (g[i] * g[i]);
      p[i] = m[i] * o.correction1 / (std::sqrt(v[i] * o.correction2) + o.eps) + o.weight_decay * source[i];
    }
    take_step(size, p, step, tile);
  }
}

}  // namespace

CLONES void adamw(int64_t n, const Adamw<float>& o, const Step<float>& s, const Rows<float, float>& r) { run(n, o, s, r); }
CLONES void adamw(int64_t n, const Adamw<float>& o, const Step<float>& s, const Rows<float, Bf16>& r) { run(n, o, s, r); }
CLONES void adamw(int64_t n, const Adamw<double>& o, const Step<double>& s, const Rows<double, double>& r) {
  run(n, o, s, r);
}

}  // namespace fedkernels
