// Matrices in shared memory, in registers and in global memory, as products on tensor cores want them.
//
// Matrices are made of 32×32 blocks of 2×2 tiles of 2×2 cores, a core being 8×8 halves in 128 neighbouring bytes: what
// ldmatrix loads and what a warp stores of an accumulator, either without bank conflicts. Cores of a tile are in the
// order of a fragment's registers, so that lane l of a load points 16 l bytes into the tile. Of a symmetric matrix only
// the blocks on and above the diagonal are computed and stored; others are loaded transposed.
#pragma once

#include "device.h"

namespace fedkernels {
namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;
constexpr int kTileSide = 16, kSide = 32;            // of a tile, of a block of tiles
constexpr int kTileBytes = 512, kBlockBytes = 2048;  // 16×16 and 32×32 halves
constexpr int kSymmetric = 3;                        // blocks of a symmetric product in a warp's registers: 36 of 256²
constexpr int kWorkBytes = 256;                      // of Work

// Read anew by each phase: what follows from it would otherwise be kept in registers that the next phase needs.
struct Thread {
  int lane, warp;

  DEVICE Thread() {
    const int index = thread_index();
    lane = index % 32;
    warp = index / 32;
  }

  // The pairs of neighbours that a thread holds of a block: elements 2r and 2r + 1 of [i][j][h].
  DEVICE int row(int i, int r) const { return i * 16 + r * 8 + lane / 4; }
  DEVICE int column(int j, int h) const { return j * 16 + h * 8 + lane % 4 * 2; }

  // Where a pair lies in its tile: in core (r, h), at the place that ldmatrix gives to this lane.
  DEVICE uint32_t* pair_in(char* tile, int h, int r) const {
    return reinterpret_cast<uint32_t*>(tile + (h * 2 + r) * (kTileBytes / 4) + lane * 4);
  }
};

// What a thread holds in float32 of a warp's tile, [half of its columns][element], and of a block of tiles.
using Tile = float[2][4];
using Block = Tile[2][2];

template <int N>
DEVICE void clear(Block (&blocks)[N]) {
#pragma unroll
  for (int i = 0; i < N * 32; ++i) blocks[i / 32][i / 16 % 2][i / 8 % 2][i / 4 % 2][i % 4] = 0;
}

// Call `f(i, j, h, r)` for the pairs of a thread.
template <class F>
DEVICE void for_each_pair(const F& f) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int r = 0; r < 2; ++r) f(i, j, h, r);
}

// A symmetric matrix of `side` × `side` blocks in shared memory, those on and above the diagonal row after row.
struct Symmetric {
  int side;

  DEVICE int blocks() const { return side * (side + 1) / 2; }
  DEVICE int at(int i, int j) const { return i * side - i * (i - 1) / 2 + j - i; }
  DEVICE void find(int block, int& i, int& j) const {
    for (i = 0; block >= side - i; ++i) block -= side - i;
    j = i + block;
  }
  DEVICE char* tile(int block, int i, int j) const {
    return shared_memory() + kWorkBytes + block * kBlockBytes + (i * 2 + j) * kTileBytes;
  }

  // The fragment of tile (i, k), whose rows are either those of a left operand or the columns of a right one.
  DEVICE void load(uint32_t (&r)[4], const Thread& me, int i, int k) const {
    if (i / 2 <= k / 2) {
      ldmatrix(r, tile(at(i / 2, k / 2), i % 2, k % 2) + me.lane * 16);
    } else {  // cores change places, and each is transposed
      const int swapped = (me.lane & 7) | (me.lane & 8) << 1 | (me.lane & 16) >> 1;
      ldmatrix_transposed(r, tile(at(k / 2, i / 2), k % 2, i % 2) + swapped * 16);
    }
  }
};

// Behind it the columns of X that are on chip, tile after tile down each 16 of them.
struct Slab {
  Symmetric before;

  DEVICE char* tile(int i, int column) const {
    return before.tile(before.blocks(), 0, 0) + (column * before.side * 2 + i) * kTileBytes;
  }
};

// A slab in global memory, in float32.
struct Matrix {
  float* data;
  int64_t short_stride, long_stride;
  int rows, columns;
  bool pairs;  // neighbours of the long side may be read together

  DEVICE void place(float* first, int64_t short_step, int64_t long_step, int n, int m) {
    *this = {first, short_step, long_step, n, m,
             long_step == 1 && short_step % 2 == 0 && reinterpret_cast<uintptr_t>(first) % 8 == 0};
  }

  DEVICE bool has_pairs(int row, int column) const {
    return pairs && row + kTileSide <= rows && column + kTileSide <= columns;
  }

  // The tile from an element on; zeros beyond the end.
  DEVICE void load(const Thread& me, int row, int column, Tile& tile) const {
    const float* corner = data + (row + me.row(0, 0)) * short_stride + (column + me.column(0, 0)) * long_stride;
    if (has_pairs(row, column)) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float* at = corner + pair % 2 * 8 * short_stride + pair / 2 * 8;
        const Float2 both = *reinterpret_cast<const Float2*>(at);
        tile[pair / 2][pair % 2 * 2] = both.x;
        tile[pair / 2][pair % 2 * 2 + 1] = both.y;
      }
    } else {
#pragma unroll
      for (int element = 0; element < 8; ++element) {
        const int h = element / 4, r = element / 2 % 2, e = element % 2;
        const bool inside = row + me.row(0, r) < rows && column + me.column(0, h) + e < columns;
        tile[h][2 * r + e] = inside ? corner[r * 8 * short_stride + (h * 8 + e) * long_stride] : 0;
      }
    }
  }

  DEVICE void store(const Thread& me, int row, int column, const Tile& tile) const {
    float* corner = data + (row + me.row(0, 0)) * short_stride + (column + me.column(0, 0)) * long_stride;
    if (has_pairs(row, column)) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float* at = corner + pair % 2 * 8 * short_stride + pair / 2 * 8;
        *reinterpret_cast<Float2*>(at) = {tile[pair / 2][pair % 2 * 2], tile[pair / 2][pair % 2 * 2 + 1]};
      }
    } else {
#pragma unroll
      for (int element = 0; element < 8; ++element) {
        const int h = element / 4, r = element / 2 % 2, e = element % 2;
        const bool inside = row + me.row(0, r) < rows && column + me.column(0, h) + e < columns;
        if (inside) corner[r * 8 * short_stride + (h * 8 + e) * long_stride] = tile[h][2 * r + e];
      }
    }
  }
};

// Call `f(slot, block, i, j)` for the blocks (i, j) of a symmetric matrix that are this warp's.
template <class F>
DEVICE void for_own_blocks(const Thread& me, const Symmetric& matrix, const F& f) {
#pragma unroll
  for (int slot = 0; slot < kSymmetric; ++slot) {
    const int block = slot * kWarps + me.warp;
    if (block < matrix.blocks()) {
      int i, j;
      matrix.find(block, i, j);
      f(slot, block, i, j);
    }
  }
}

// Products of two rows by two columns of tiles, whose right fragments are those of their transposes, as symmetric
// products have them, or their own.
template <bool kTransposed>
DEVICE void multiply(Block& product, const uint32_t (&a)[2][4], const uint32_t (&b)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      mma(product[i][j][0], a[i], b[j][0], b[j][kTransposed ? 2 : 1]);
      mma(product[i][j][1], a[i], b[j][kTransposed ? 1 : 2], b[j][3]);
    }
}

}  // namespace
}  // namespace fedkernels
