// Matrix products for the CPU: `C = α A B + β D + γ I`, whole or, where the result is symmetric, of the upper triangle alone.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 12)
#define FEDKERNELS_X86 1
#endif

namespace fedkernels {

// All matrices are row-major; a stride is the distance of two rows.
template <class T>
struct Product {
  int64_t rows, cols, depth;
  const T* a;
  int64_t a_stride;
  const T* b;  // `[depth, cols]`, or `[cols, depth]` where it is given transposed
  int64_t b_stride;
  bool b_transposed, symmetric;
  T alpha, beta, gamma;
  const T* d;  // not read where β = 0; its rows are as far apart as those of `c`
  T* c;        // overlaps none of the others but `d`
  int64_t c_stride;
};

// How this processor multiplies. The units of work of a product are panels of `cols` columns, which threads can share:
// every element is one chain of additions over the depth, whoever computes it.
template <class T>
struct Engine {
  int64_t cols, block;  // sides of what it multiplies are multiples of `block`
  // Panels from the begin-th to the end-th; `packed` holds `cols · depth` elements.
  void (*panels)(const Product<T>&, int64_t begin, int64_t end, T* packed);
  // Null where matrices are what they seem. Else they change a row, of a multiple of `block` elements, into what the
  // engine multiplies, and back.
  void (*enter)(int64_t size, T* row);
  void (*leave)(int64_t size, T* row);
};

// Panels of a triangle grow: the last and the first take turns, so that half of them is half of the work.
inline int64_t panel_of(int64_t index, int64_t panels) { return index % 2 == 0 ? panels - 1 - index / 2 : index / 2; }

// The fastest that the processor can run. All that have fused multiply-adds give the same bits.
template <class T>
const Engine<T>& engine();

#ifdef FEDKERNELS_X86
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace fedkernels
