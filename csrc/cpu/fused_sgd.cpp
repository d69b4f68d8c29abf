// Federated SGD: coupled decay, heavy-ball momentum and the global direction in one pass over memory.
#include <algorithm>

#include "kernels.h"

namespace fedkernels {
namespace {

template <class T, class G>
INLINE void run(int64_t n, const Sgd<T>& o, const Step<T>& step, const Rows<T, G>& rows) {
  if (!step.active) return skip_step(n, rows);
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t size = std::min(kTile, n - k);
    const Rows<T, G> tile = rows.at(k);
    prefetch_ahead(k, n, rows);
    T *__restrict m = tile.m, *y = tile.y;
    const T *source = tile.source, *__restrict global = global_or_zeros(tile.global);
    const G* __restrict gradient = tile.g;
    if (m) {
#pragma GCC ivdep  // `source` is `y` itself or does not overlap it
      for (int64_t i = 0; i < size; ++i) {
        m[i] = o.momentum * m[i] + (step.scale * widen(gradient[i]) + o.weight_decay * source[i]);
        y[i] = moved(source[i], m[i], global[i], step);
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < size; ++i)
        y[i] = moved(source[i], step.scale * widen(gradient[i]) + o.weight_decay * source[i], global[i], step);
    }
    write_delta(size, tile);
  }
}

}  // namespace

CLONES void sgd(int64_t n, const Sgd<float>& o, const Step<float>& s, const Rows<float, float>& r) { run(n, o, s, r); }
CLONES void sgd(int64_t n, const Sgd<float>& o, const Step<float>& s, const Rows<float, Bf16>& r) { run(n, o, s, r); }
CLONES void sgd(int64_t n, const Sgd<double>& o, const Step<double>& s, const Rows<double, double>& r) {
  run(n, o, s, r);
}

}  // namespace fedkernels
