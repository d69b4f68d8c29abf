// What sharpness-aware minimisation does before its second gradient: squared norms, and parameters moved uphill.
#include <algorithm>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "kernels.h"

namespace fedkernels {
namespace {

// Write past the caches what nobody reads soon: a line that is not fetched first is a third less traffic.
template <class T>
INLINE void stream(int64_t n, const T* from, T* to) {
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    constexpr int64_t kWidth = 16 / sizeof(T);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    to += i, from += i, n -= i;
  }
#endif
  std::memcpy(to, from, n * sizeof(T));
}

template <class T, class G>
INLINE void move(int64_t n, T coefficient, const G* direction, const T* source, T* w, T* saved, bool past_caches) {
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t size = std::min(kTile, n - k);
    if (k + kAhead < n) {
      prefetch_tile(source + k + kAhead);
      prefetch_tile(direction + k + kAhead);
    }
    if (saved && past_caches) {
      stream(size, source + k, saved + k);
    } else if (saved) {
      std::memcpy(saved + k, source + k, size * sizeof(T));
    }
    T moved[kTile];
    const bool streamed = past_caches && w != source;
    T* to = streamed ? moved : w + k;
#pragma GCC ivdep  // `source` is `w` itself or does not overlap it
    for (int64_t i = 0; i < size; ++i) to[i] = source[k + i] + coefficient * widen(direction[k + i]);
    if (streamed) stream(size, moved, w + k);
  }
#ifdef __SSE2__
  if (past_caches) _mm_sfence();
#endif
}

// Eight values at a time, in vectors that the compiler splits where registers are shorter.
using Floats = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));

INLINE void load(const double* from, Doubles& to) { std::memcpy(&to, from, sizeof to); }
INLINE void load(const float* from, Doubles& to) {
  Floats narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  to = __builtin_convertvector(narrow, Doubles);
}
INLINE void load(const Bf16* from, Doubles& to) {
  float wide[8];
  for (int l = 0; l < 8; ++l) wide[l] = widen(from[l]);
  load(wide, to);
}

template <class G>
INLINE double squares(int64_t n, const G* g) {
  // Four quarters at once: one stream leaves the memory idle. The order of additions depends on `n` alone.
  constexpr int64_t kStreams = 4;
  const int64_t quarter = n / (8 * kStreams) * 8;
  Doubles sums[kStreams] = {};
  for (int64_t i = 0; i < quarter; i += 8)
    for (int64_t s = 0; s < kStreams; ++s) {
      Doubles wide;
      load(g + s * quarter + i, wide);
      sums[s] += wide * wide;
    }
  double total = 0;
  for (int64_t i = kStreams * quarter; i < n; ++i) total += static_cast<double>(widen(g[i])) * widen(g[i]);
  const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int l = 0; l < 8; ++l) total += all[l];
  return total;
}

}  // namespace

CLONES void perturb(int64_t n, float c, const float* d, const float* source, float* w, float* saved, bool past) {
  move(n, c, d, source, w, saved, past);
}
CLONES void perturb(int64_t n, float c, const Bf16* d, const float* source, float* w, float* saved, bool past) {
  move(n, c, d, source, w, saved, past);
}
CLONES void perturb(int64_t n, double c, const double* d, const double* source, double* w, double* saved, bool past) {
  move(n, c, d, source, w, saved, past);
}
CLONES double sum_of_squares(int64_t n, const float* g) { return squares(n, g); }
CLONES double sum_of_squares(int64_t n, const Bf16* g) { return squares(n, g); }
CLONES double sum_of_squares(int64_t n, const double* g) { return squares(n, g); }

}  // namespace fedkernels
