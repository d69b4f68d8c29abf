// Transposition in registers.
#pragma once

#include "rows.h"

namespace fedkernels {

constexpr int64_t kBlock = 8;  // side of a block

// `to[j][i] = from[i][j]` of a block, in three rounds of a perfect shuffle of its rows.
template <class T>
INLINE void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
#if defined(__clang__) || __GNUC__ >= 12
  typedef T Row __attribute__((vector_size(kBlock * sizeof(T))));
  Row rows[kBlock], mixed[kBlock];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlock; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      const Row low = rows[i], high = rows[i + kBlock / 2];
      mixed[2 * i] = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBlock; ++i) rows[i] = mixed[i];
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < kBlock; ++j) std::memcpy(to + j * to_stride, &rows[j], sizeof(Row));
#else
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t j = 0; j < kBlock; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// `to[j][i] = from[i][j]` of `rows · cols` elements.
template <class T>
INLINE void transpose(int64_t rows, int64_t cols, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_cols = cols / kBlock * kBlock;
  for (int64_t i = 0; i < whole_rows; i += kBlock)
    for (int64_t j = 0; j < whole_cols; j += kBlock)
      transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

}  // namespace fedkernels
