// Panels of B are packed, rows of A are read where they lie, and a tile of C is summed up in registers.
//
// Unlike all other kernels, products fuse multiplications and additions where the processor can: that is half its speed.
#include "products.h"

#include <algorithm>

#include "transpose.h"

#ifdef FEDKERNELS_X86
#include <immintrin.h>
#endif

namespace fedkernels {
namespace {

// `kCols` columns of B from `first` on, row after row; zeros where B ends.
template <class T, int64_t kCols>
INLINE void pack(const Product<T>& p, int64_t first, T* packed) {
  const int64_t cols = std::min(kCols, p.cols - first);
  if (cols < kCols) std::fill(packed, packed + p.depth * kCols, T(0));
  if (p.b_transposed) return transpose(cols, p.depth, p.b + first * p.b_stride, p.b_stride, packed, kCols);
  for (int64_t k = 0; k < p.depth; ++k) {
    const T* row = p.b + k * p.b_stride + first;
    if (cols == kCols)
      std::memcpy(packed + k * kCols, row, kCols * sizeof(T));
    else
      std::copy(row, row + cols, packed + k * kCols);
  }
}

// `tile(depth, a, packed, out)` multiplies `kRows` rows of A with the panel.
template <class T, int64_t kRows, int64_t kCols, class Tile>
INLINE void run_panel(const Product<T>& p, int64_t first, T* packed, const Tile& tile) {
  static_assert(kCols % kRows == 0, "the triangle of a panel ends with a tile, so that no two panels write the same");
  alignas(64) T sums[kRows * kCols];
  pack<T, kCols>(p, first, packed);
  const int64_t cols = std::min(kCols, p.cols - first), end = p.symmetric ? first + cols : p.rows;
  for (int64_t i = 0; i < end; i += kRows) {
    const int64_t rows = std::min(kRows, end - i);
    const T* a[kRows];
    for (int64_t r = 0; r < kRows; ++r) a[r] = p.a + (i + std::min(r, rows - 1)) * p.a_stride;
    tile(p.depth, a, packed, sums);
    for (int64_t r = 0; r < rows; ++r) {
      T *__restrict row = sums + r * kCols, *c = p.c + (i + r) * p.c_stride + first;
      const T* d = p.d + (i + r) * p.c_stride + first;
      for (int64_t j = 0; j < cols; ++j) row[j] *= p.alpha;
      if (p.beta != 0)
        for (int64_t j = 0; j < cols; ++j) row[j] += p.beta * d[j];
      if (i + r >= first && i + r < first + cols) row[i + r - first] += p.gamma;
      std::memcpy(c, row, cols * sizeof(T));
    }
    if (!p.symmetric) continue;
    T* mirrored = p.c + first * p.c_stride + i;
    if (i + rows <= first) {
      transpose(rows, cols, sums, kCols, mirrored, p.c_stride);
    } else {  // on the diagonal: what lies below it is the mirror of what lies above
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = i + r - first + 1; j < cols; ++j) mirrored[j * p.c_stride + r] = sums[r * kCols + j];
    }
  }
}

template <class T, int64_t kRows, int64_t kCols, class Tile>
INLINE void run_panels(const Product<T>& p, int64_t begin, int64_t end, T* packed, const Tile& tile) {
  const int64_t panels = (p.cols + kCols - 1) / kCols;
  for (int64_t i = begin; i < end; ++i) run_panel<T, kRows, kCols>(p, panel_of(i, panels) * kCols, packed, tile);
}

// Without vectors of a known width: what the compiler makes of plain loops.
template <class T>
INLINE void plain_tile(int64_t depth, const T* const* a, const T* packed, T* out) {
  T sums[4][8] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t j = 0; j < 8; ++j) sums[r][j] += a[r][k] * packed[8 * k + j];
  std::memcpy(out, sums, sizeof sums);
}

template <class T>
void plain_panels(const Product<T>& p, int64_t begin, int64_t end, T* packed) {
  run_panels<T, 4, 8>(p, begin, end, packed, plain_tile<T>);
}

#ifdef FEDKERNELS_X86

// A tile of ROWS × VECTORS vectors for one instruction set, and the panel made of it.
#define FEDKERNELS_ENGINE(NAME, TARGET, T, V, ROWS, VECTORS, P, S)                                                    \
  __attribute__((target(TARGET))) void NAME##_tile(int64_t depth, const T* const* a, const T* packed, T* out) {       \
    constexpr int64_t kLanes = sizeof(V) / sizeof(T);                                                                 \
    V sums[ROWS][VECTORS];                                                                                            \
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)                                                            \
      _Pragma("GCC unroll 3") for (int v = 0; v < VECTORS; ++v) sums[r][v] = P##_setzero_##S();                       \
    for (int64_t k = 0; k < depth; ++k) {                                                                             \
      V b[VECTORS];                                                                                                   \
      _Pragma("GCC unroll 3") for (int v = 0; v < VECTORS; ++v)                                                       \
        b[v] = P##_loadu_##S(packed + (k * VECTORS + v) * kLanes);                                                    \
      _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {                                                        \
        const V broadcast = P##_set1_##S(a[r][k]);                                                                    \
        _Pragma("GCC unroll 3") for (int v = 0; v < VECTORS; ++v)                                                     \
          sums[r][v] = P##_fmadd_##S(broadcast, b[v], sums[r][v]);                                                    \
      }                                                                                                               \
    }                                                                                                                 \
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)                                                            \
      _Pragma("GCC unroll 3") for (int v = 0; v < VECTORS; ++v)                                                       \
        P##_storeu_##S(out + (r * VECTORS + v) * kLanes, sums[r][v]);                                                 \
  }                                                                                                                   \
  __attribute__((target(TARGET))) void NAME##_panels(const Product<T>& p, int64_t begin, int64_t end, T* packed) {    \
    run_panels<T, ROWS, VECTORS * sizeof(V) / sizeof(T)>(p, begin, end, packed, NAME##_tile);                         \
  }

FEDKERNELS_ENGINE(avx512f32, "arch=x86-64-v4", float, __m512, 8, 2, _mm512, ps)
FEDKERNELS_ENGINE(avx512f64, "arch=x86-64-v4", double, __m512d, 8, 2, _mm512, pd)
FEDKERNELS_ENGINE(avx2f32, "arch=x86-64-v3", float, __m256, 4, 3, _mm256, ps)
FEDKERNELS_ENGINE(avx2f64, "arch=x86-64-v3", double, __m256d, 4, 3, _mm256, pd)
#undef FEDKERNELS_ENGINE

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

Engine<float> fastest(float) {
  if (has_avx512()) return {32, 1, avx512f32_panels, nullptr, nullptr};
  if (has_avx2()) return {24, 1, avx2f32_panels, nullptr, nullptr};
  return {8, 1, plain_panels<float>, nullptr, nullptr};
}

Engine<double> fastest(double) {
  if (has_avx512()) return {16, 1, avx512f64_panels, nullptr, nullptr};
  if (has_avx2()) return {12, 1, avx2f64_panels, nullptr, nullptr};
  return {8, 1, plain_panels<double>, nullptr, nullptr};
}

#else

template <class T>
Engine<T> fastest(T) {
  return {8, 1, plain_panels<T>, nullptr, nullptr};
}

#endif

}  // namespace

template <class T>
const Engine<T>& engine() {
  static const Engine<T> chosen = fastest(T());
  return chosen;
}

template const Engine<float>& engine<float>();
template const Engine<double>& engine<double>();

}  // namespace fedkernels
