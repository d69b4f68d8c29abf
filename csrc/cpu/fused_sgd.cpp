// Federated SGD: coupled decay, heavy-ball momentum and the global direction in one pass over memory.
#include <algorithm>

#include "kernels.h"

namespace fedkernels {
namespace {

template <class T, class G>
INLINE void run(int64_t n, const Sgd<T>& o, const Step<T>& step, const Rows<T, G>& rows) {
  if (!step.active) return skip_step(n, rows);
  T p[kTile];
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t size = std::min(kTile, n - k);
    const Rows<T, G> tile = rows.at(k, k);
    load_gradient(size, p, tile.g, step.scale);
    const T* __restrict source = tile.source;
    if (o.weight_decay != T(0))
      for (int64_t i = 0; i < size; ++i) p[i] += o.weight_decay * source[i];
    if (T* __restrict m = tile.m)
      for (int64_t i = 0; i < size; ++i) p[i] = m[i] = o.momentum * m[i] + p[i];
    take_step(size, p, step, tile);
  }
}

}  // namespace

CLONES void sgd(int64_t n, const Sgd<float>& o, const Step<float>& s, const Rows<float, float>& r) { run(n, o, s, r); }
CLONES void sgd(int64_t n, const Sgd<float>& o, const Step<float>& s, const Rows<float, Bf16>& r) { run(n, o, s, r); }
CLONES void sgd(int64_t n, const Sgd<double>& o, const Step<double>& s, const Rows<double, double>& r) {
  run(n, o, s, r);
}

}  // namespace fedkernels
