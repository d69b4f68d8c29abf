// X ← aX + b(XXᵀ)X + c(XXᵀ)²X, all steps of all matrices of a model in one launch.
//
// A block of 12 warps, alone or in a cluster that shares a matrix, holds in shared memory the fp16 operands of the
// products: its slab of X, `n × width`, and one symmetric n × n matrix, which is first G = XXᵀ and then P = bG + cG².
// Products accumulate in float32 in registers; X itself is carried in float32 in the output, which every step reads
// and writes once, while its products run. Blocks of a cluster add their shares of G through global memory.
//
// Matrices are made of 32×32 blocks of 2×2 tiles of 2×2 cores, a core being 8×8 halves in 128 neighbouring bytes: what
// ldmatrix loads and what a warp stores of an accumulator, either without bank conflicts. Cores of a tile are in the
// order of a fragment's registers, so that lane l of a load points 16 l bytes into the tile. Of a symmetric matrix only
// the blocks on and above the diagonal are computed and stored; others are loaded transposed.
#include "newton_schulz.h"

#include <algorithm>

#include "device.h"

namespace fedkernels {
namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;
constexpr int kSide = 32;                            // of a block of tiles
constexpr int kTileBytes = 512, kBlockBytes = 2048;  // 16×16 and 32×32 halves
constexpr int kSymmetric = 3;                        // blocks of a symmetric product in a warp's registers: 36 of 256²
constexpr int kPanel = 2;                            // blocks of the next X in a warp's registers, as fp16
constexpr int kScratchBytes = 128;                   // one float of each warp
constexpr int kMaxCluster = 8;                       // what every GPU with clusters allows
constexpr int kBlockFloats = 1024;                   // of a block of tiles in the workspace
constexpr int kSpareFloats = 32;                     // after the shares of a matrix: the largest entries

// A batch as the kernel knows it, by value in its arguments: a captured graph keeps it.
struct Placed {
  Batch batch;
  int64_t first_cluster, workspace;
  int32_t parts, slab, width;  // blocks of a matrix, columns of each, and how many of those are on chip at once
};

struct Arguments {
  Placed placed[kMaxBatches];
  float coefficients[3 * kMaxSteps];
  float* workspace;
  int32_t count, steps, cluster;
  float margin;
};

DEVICE int sides(int64_t length) { return static_cast<int>((length + kSide - 1) / kSide); }

DEVICE int lane() { return thread_index() % 32; }
DEVICE int warp() { return thread_index() / 32; }

// Float32 accumulators of a warp's block: [tile row][tile column][half of the tile's columns][element].
using Block = float[2][2][2][4];

template <int N>
DEVICE void clear(Block (&blocks)[N]) {
#pragma unroll
  for (int i = 0; i < N * 32; ++i) blocks[i / 32][i / 16 % 2][i / 8 % 2][i / 4 % 2][i % 4] = 0;
}

// Call `f(i, j, h, r)` for the pairs of neighbours that this thread holds of a block: elements 2r and 2r + 1 of [i][j][h]
// are in row `pair_row` and from column `pair_column` on.
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
DEVICE int pair_row(int i, int r) { return i * 16 + r * 8 + lane() / 4; }
DEVICE int pair_column(int j, int h) { return j * 16 + h * 8 + lane() % 4 * 2; }

// Where a pair lies in its tile: in core (r, h), at the place that ldmatrix gives to this lane.
DEVICE uint32_t* pair_in(char* tile, int h, int r) {
  return reinterpret_cast<uint32_t*>(tile + (h * 2 + r) * (kTileBytes / 4) + lane() * 4);
}

// A symmetric matrix of `side` × `side` blocks, those on and above the diagonal row after row.
struct Symmetric {
  char* data;
  int side;

  DEVICE int blocks() const { return side * (side + 1) / 2; }
  DEVICE int at(int i, int j) const { return i * side - i * (i - 1) / 2 + j - i; }
  DEVICE void find(int block, int& i, int& j) const {
    for (i = 0; block >= side - i; ++i) block -= side - i;
    j = i + block;
  }
  DEVICE char* tile(int block, int i, int j) const { return data + block * kBlockBytes + (i * 2 + j) * kTileBytes; }

  // The fragment of tile (i, k), whose rows are either those of a left operand or the columns of a right one.
  DEVICE void load(uint32_t (&r)[4], int i, int k) const {
    if (i / 2 <= k / 2) {
      ldmatrix(r, tile(at(i / 2, k / 2), i % 2, k % 2) + lane() * 16);
    } else {  // cores change places, and each is transposed
      const int swapped = (lane() & 7) | (lane() & 8) << 1 | (lane() & 16) >> 1;
      ldmatrix_transposed(r, tile(at(k / 2, i / 2), k % 2, i % 2) + swapped * 16);
    }
  }
};

// The columns of X that are on chip, tile after tile down each 16 of them.
struct Slab {
  char* data;
  int side;

  DEVICE char* tile(int i, int column) const { return data + (column * side * 2 + i) * kTileBytes; }
};

// X in float32, from the block's first column on.
template <class T>
struct Matrix {
  T* data;
  int64_t short_stride, long_stride;
  int rows, columns;
  bool pairs;  // neighbours of the long side may be read together

  DEVICE Matrix(T* first, int64_t short_step, int64_t long_step, int n, int m)
      : data(first), short_stride(short_step), long_stride(long_step), rows(n), columns(m) {
    pairs = long_step == 1 && short_step % 2 == 0 && reinterpret_cast<uintptr_t>(first) % 8 == 0;
  }

  DEVICE void load(int row, int column, float& left, float& right) const {
    left = right = 0;
    if (row >= rows || column >= columns) return;
    const T* at = data + row * short_stride + column * long_stride;
    if (pairs && column + 1 < columns) {
      const Float2 both = *reinterpret_cast<const Float2*>(at);
      left = both.x;
      right = both.y;
    } else {
      left = at[0];
      if (column + 1 < columns) right = at[long_stride];
    }
  }

  DEVICE void store(int row, int column, float left, float right) const {
    if (row >= rows || column >= columns) return;
    T* at = data + row * short_stride + column * long_stride;
    if (pairs && column + 1 < columns) {
      *reinterpret_cast<Float2*>(at) = {left, right};
    } else {
      at[0] = left;
      if (column + 1 < columns) at[long_stride] = right;
    }
  }
};

// Call `f(slot, block, i, j)` for the blocks (i, j) of a symmetric matrix that are this warp's.
template <class F>
DEVICE void for_own_blocks(const Symmetric& matrix, const F& f) {
#pragma unroll
  for (int slot = 0; slot < kSymmetric; ++slot) {
    const int block = slot * kWarps + warp();
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

// G += X Xᵀ over some blocks of columns.
DEVICE void add_gram(Block (&gram)[kSymmetric], const Symmetric& shape, const Slab& x, int blocks) {
  for_own_blocks(shape, [&](int slot, int, int i, int j) {
    for (int k = 0; k < 2 * blocks; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        ldmatrix(a[tile], x.tile(2 * i + tile, k) + lane() * 16);
        ldmatrix(b[tile], x.tile(2 * j + tile, k) + lane() * 16);
      }
      multiply<true>(gram[slot], a, b);
    }
  });
}

// S = G².
DEVICE void square(Block (&product)[kSymmetric], const Symmetric& g) {
  clear(product);
  for_own_blocks(g, [&](int slot, int, int i, int j) {
    for (int k = 0; k < 2 * g.side; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        g.load(a[tile], 2 * i + tile, k);
        g.load(b[tile], 2 * j + tile, k);
      }
      multiply<true>(product[slot], a, b);
    }
  });
}

// Sum, or maximum, of a value of every thread, in an order of its own.
template <bool kMaximum>
DEVICE float reduce(float value, float* scratch) {
  const auto combine = [](float a, float b) { return kMaximum ? (a > b ? a : b) : a + b; };
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  if (lane() == 0) scratch[warp()] = value;
  sync_block();
  value = scratch[0];
  for (int i = 1; i < kWarps; ++i) value = combine(value, scratch[i]);
  sync_block();
  return value;
}

// The power of two that takes the largest entry into [1, 2), as far as its inverse is a normal number.
DEVICE float scale_of(float most) {
  const int exponent = 254 - static_cast<int>(float_bits(most) >> 23);
  return bits_float(static_cast<uint32_t>(exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
}

// Fill the slab with fp16 of `scale · X`, from some column on.
template <class T>
DEVICE void load_slab(const Slab& slab, const Matrix<T>& x, int first, int blocks, float scale) {
  for (int block = warp(); block < slab.side * blocks; block += kWarps) {
    const int row = block % slab.side, column = block / slab.side;
    for_each_pair([&](int i, int j, int h, int r) {
      float left, right;
      x.load(row * kSide + pair_row(i, r), first + column * kSide + pair_column(j, h), left, right);
      *pair_in(slab.tile(2 * row + i, 2 * column + j), h, r) = pack_halves(scale * left, scale * right);
    });
  }
}

// `out = factor (a · scale · from + P X)` over some blocks of columns. `keep` writes its fp16 over X in the slab.
template <class T>
DEVICE void update(const Symmetric& p, const Slab& slab, const Matrix<T>& from, const Matrix<float>& out, int first,
                   int blocks, float a, float scale, float factor, bool keep) {
  const int panel = kPanel * kWarps / p.side;
  for (int start = 0; start < blocks; start += panel) {
    uint32_t halves[kPanel][2][2][2][2];
    const auto for_own = [&](const auto& f) {
#pragma unroll
      for (int slot = 0; slot < kPanel; ++slot) {
        const int item = slot * kWarps + warp(), row = item % p.side, column = start + item / p.side;
        if (item < panel * p.side && column < blocks) f(slot, row, column);
      }
    };
    for_own([&](int slot, int row, int column) {
      Block x[1], product[1];
      for_each_pair([&](int i, int j, int h, int r) {  // on their way while products run
        from.load(row * kSide + pair_row(i, r), first + column * kSide + pair_column(j, h), x[0][i][j][h][2 * r],
                  x[0][i][j][h][2 * r + 1]);
      });
      clear(product);
      for (int k = 0; k < 2 * p.side; ++k) {
        uint32_t left[2][4], right[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          p.load(left[tile], 2 * row + tile, k);
          ldmatrix_transposed(right[tile], slab.tile(k, 2 * column + tile) + lane() * 16);
        }
        multiply<false>(product[0], left, right);
      }
      for_each_pair([&](int i, int j, int h, int r) {
        float next[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          next[e] = factor * (a * (scale * x[0][i][j][h][2 * r + e]) + product[0][i][j][h][2 * r + e]);
        out.store(row * kSide + pair_row(i, r), first + column * kSide + pair_column(j, h), next[0], next[1]);
        halves[slot][i][j][h][r] = pack_halves(next[0], next[1]);
      });
    });
    if (!keep) continue;
    sync_block();  // all have read these columns
    for_own([&](int slot, int row, int column) {
      for_each_pair([&](int i, int j, int h, int r) {
        *pair_in(slab.tile(2 * row + i, 2 * column + j), h, r) = halves[slot][i][j][h][r];
      });
    });
  }
}

// The shares of G of a cluster's blocks, added in the order of blocks by each of them.
DEVICE void add_shares(Block (&gram)[kSymmetric], const Symmetric& shape, float* workspace, int part, int parts) {
  auto* shares = reinterpret_cast<Float4*>(workspace);
  const auto at = [&](int share, int block, int quad) {
    return shares + ((static_cast<int64_t>(share) * shape.blocks() + block) * 8 + quad) * 32 + lane();
  };
  for_own_blocks(shape, [&](int slot, int block, int, int) {
#pragma unroll
    for (int quad = 0; quad < 8; ++quad) {
      const float(&g)[4] = gram[slot][quad / 4][quad / 2 % 2][quad % 2];
      *at(part, block, quad) = {g[0], g[1], g[2], g[3]};
    }
  });
  sync_cluster();
  for_own_blocks(shape, [&](int slot, int block, int, int) {
#pragma unroll
    for (int quad = 0; quad < 8; ++quad) {
      float(&g)[4] = gram[slot][quad / 4][quad / 2 % 2][quad % 2];
      g[0] = g[1] = g[2] = g[3] = 0;
      for (int share = 0; share < parts; ++share) {
        const Float4 other = load_past_l1(at(share, block, quad));
        g[0] += other.x;
        g[1] += other.y;
        g[2] += other.z;
        g[3] += other.w;
      }
    }
  });
}

DEVICE float trace(const Block (&gram)[kSymmetric], const Symmetric& shape, float* scratch) {
  float sum = 0;
  for_own_blocks(shape, [&](int slot, int, int i, int j) {
    for_each_pair([&](int tile_i, int tile_j, int h, int r) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (i == j && pair_row(tile_i, r) == pair_column(tile_j, h) + e) sum += gram[slot][tile_i][tile_j][h][2 * r + e];
    });
  });
  return reduce<false>(sum, scratch);
}

KERNEL(kThreads) newton_schulz_kernel(GRID_CONSTANT Arguments given) {
  // The block's matrix, and its slab.
  const int cluster = block_index() / given.cluster, rank = block_index() % given.cluster;
  int last = 0;
  for (int end = given.count; end - last > 1;) {
    const int middle = (last + end) / 2;
    (given.placed[middle].first_cluster <= cluster ? last : end) = middle;
  }
  const Placed& placed = given.placed[last];
  const Batch& batch = placed.batch;
  const bool alone = placed.parts == 1;
  const int64_t nth = cluster - placed.first_cluster, index = alone ? nth * given.cluster + rank : nth;
  if (index >= batch.count) return;
  const int part = alone ? 0 : rank, n = static_cast<int>(batch.short_side), side = sides(n);
  const int64_t start = static_cast<int64_t>(part) * placed.slab, left = batch.long_side - start;
  const int columns = static_cast<int>(left < 0 ? 0 : left < placed.slab ? left : placed.slab);
  const int64_t outer = index / batch.inner, inner = index % batch.inner;
  const Matrix<const float> in(
      batch.in + outer * batch.in_outer + inner * batch.in_inner + start * batch.in_long, batch.in_short, batch.in_long,
      n, columns);
  const Matrix<float> out(
      batch.out + outer * batch.out_outer + inner * batch.out_inner + start * batch.out_long, batch.out_short,
      batch.out_long, n, columns);

  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const Symmetric p{shared_memory() + kScratchBytes, side};
  const Slab slab{p.data + p.blocks() * kBlockBytes, side};
  const bool resident = placed.slab == placed.width;
  const int64_t share_floats = static_cast<int64_t>(placed.parts) * p.blocks() * kBlockFloats;
  float* workspace = given.workspace + placed.workspace + nth * (2 * share_floats + kSpareFloats);

  // fp16 holds a matrix of any size after division by a power of two.
  float most = 0;
  for (int block = warp(); block < side * sides(columns); block += kWarps)
    for_each_pair([&](int i, int j, int h, int r) {
      float pair[2];
      in.load(block % side * kSide + pair_row(i, r), block / side * kSide + pair_column(j, h), pair[0], pair[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float magnitude = bits_float(float_bits(pair[e]) & 0x7fffffffu);
        if (magnitude > most) most = magnitude;
      }
    });
  most = reduce<true>(most, scratch);
  if (!alone) {
    float* largest = workspace + 2 * share_floats;
    if (thread_index() == 0) largest[part] = most;
    sync_cluster();
    for (int other = 0; other < placed.parts; ++other) {
      const float theirs = load_past_l1(largest + other);
      if (theirs > most) most = theirs;
    }
  }

  float scale = scale_of(most), factor = 1;
  for (int step = 0; step < given.steps; ++step) {
    const auto load = [&](int first, int blocks) {
      if (step == 0)
        load_slab(slab, in, first, blocks, scale);
      else
        load_slab(slab, out, first, blocks, 1);
      sync_block();
    };
    Block product[kSymmetric];
    clear(product);
    for (int first = 0; first < columns; first += placed.width) {
      const int blocks = sides(columns - first < placed.width ? columns - first : placed.width);
      if (step == 0 || !resident) load(first, blocks);
      add_gram(product, p, slab, blocks);
      if (!resident) sync_block();
    }
    // Two sets of shares in turn: when a block writes one, nobody reads it any more.
    if (!alone) add_shares(product, p, workspace + step % 2 * share_floats, part, placed.parts);
    if (step == 0) factor = 1 / (square_root(trace(product, p, scratch)) * given.margin + 1e-7f * scale);

    for_own_blocks(p, [&](int slot, int block, int, int) {
      for_each_pair([&](int i, int j, int h, int r) {
        const float(&g)[4] = product[slot][i][j][h];
        *pair_in(p.tile(block, i, j), h, r) =
            pack_halves(g[2 * r] * factor * factor, g[2 * r + 1] * factor * factor);
      });
    });
    sync_block();
    square(product, p);
    const float a = given.coefficients[3 * step], b = given.coefficients[3 * step + 1],
                c = given.coefficients[3 * step + 2];
    sync_block();
    for_own_blocks(p, [&](int slot, int block, int, int) {
      for_each_pair([&](int i, int j, int h, int r) {
        const float(&s)[4] = product[slot][i][j][h];
        uint32_t* pair = pair_in(p.tile(block, i, j), h, r);
        float g[2];
        unpack_halves(*pair, g[0], g[1]);
        *pair = pack_halves(b * g[0] + c * s[2 * r], b * g[1] + c * s[2 * r + 1]);
      });
    });
    sync_block();

    const bool keep = resident && step + 1 < given.steps;
    for (int first = 0; first < columns; first += placed.width) {
      const int blocks = sides(columns - first < placed.width ? columns - first : placed.width);
      if (!resident) load(first, blocks);
      if (step == 0)
        update(p, slab, in, out, first, blocks, a, scale, factor, keep);
      else
        update(p, slab, out, out, first, blocks, a, 1, 1, keep);
      sync_block();
    }
    factor = 1;
  }
}

int64_t symmetric_blocks(int64_t side) { return side * (side + 1) / 2; }

// Columns of X, a multiple of 32, that a block has room for beside P.
int64_t width_limit(int64_t side, int64_t shared_limit) {
  const int64_t room = shared_limit - kScratchBytes - symmetric_blocks(side) * kBlockBytes;
  return room / (side * kBlockBytes) * kSide;
}

// Fill in where matrices go, those with most work for a block first.
Plan place(Arguments& arguments, const Batch* batches, int count, int shared_limit, int max_cluster) {
  const auto blocks = [](int64_t length) { return (length + kSide - 1) / kSide; };
  const auto slab = [&](const Batch& batch, int64_t parts) {
    return (blocks(batch.long_side) + parts - 1) / parts * kSide;
  };
  const auto fits = [&](const Batch& batch, int64_t parts) {
    return slab(batch, parts) <= width_limit(blocks(batch.short_side), shared_limit);
  };
  // The smallest cluster on which every matrix is on chip, as far as there is one.
  const int most = std::min(max_cluster, kMaxCluster);
  int cluster = 1;
  while (2 * cluster <= most && !std::all_of(batches, batches + count, [&](auto& b) { return fits(b, cluster); }))
    cluster *= 2;

  for (int i = 0; i < count; ++i) {
    Placed& placed = arguments.placed[i];
    placed.batch = batches[i];
    placed.parts = fits(batches[i], 1) ? 1 : cluster;
    placed.slab = static_cast<int32_t>(slab(batches[i], placed.parts));
    placed.width = static_cast<int32_t>(
        std::min<int64_t>(placed.slab, width_limit(blocks(batches[i].short_side), shared_limit)));
  }
  const auto work = [&](const Placed& placed) {  // multiplications of a block and step, in 32³
    const int64_t side = blocks(placed.batch.short_side);
    return symmetric_blocks(side) * side + (symmetric_blocks(side) + side * side) * (placed.slab / kSide);
  };
  std::stable_sort(arguments.placed, arguments.placed + count,
                   [&](const Placed& one, const Placed& other) { return work(one) > work(other); });

  Plan plan{cluster, 0, 0, 0};
  for (int i = 0; i < count; ++i) {
    Placed& placed = arguments.placed[i];
    const int64_t side = blocks(placed.batch.short_side), all = symmetric_blocks(side);
    placed.first_cluster = plan.clusters;
    placed.workspace = plan.workspace_floats;
    plan.clusters += placed.parts > 1 ? placed.batch.count : (placed.batch.count + cluster - 1) / cluster;
    if (placed.parts > 1) plan.workspace_floats += placed.batch.count * (2 * placed.parts * all * kBlockFloats + kSpareFloats);
    const int64_t shared = kScratchBytes + all * kBlockBytes + placed.width / kSide * side * kBlockBytes;
    plan.shared_bytes = std::max(plan.shared_bytes, static_cast<int32_t>(shared));
  }
  arguments.count = count;
  arguments.cluster = cluster;
  return plan;
}

}  // namespace
}  // namespace fedkernels

extern "C" int fedkernels_newton_schulz_plan(const fedkernels::Batch* batches, int count, int shared_limit,
                                             int max_cluster, fedkernels::Plan* plan) {
  fedkernels::Arguments arguments{};
  *plan = fedkernels::place(arguments, batches, count, shared_limit, max_cluster);
  return 0;
}

extern "C" int fedkernels_newton_schulz(const fedkernels::Batch* batches, int count, const float* coefficients,
                                        int steps, float margin, int shared_limit, int max_cluster, float* workspace,
                                        void* stream) {
  fedkernels::Arguments arguments{};
  const fedkernels::Plan plan = fedkernels::place(arguments, batches, count, shared_limit, max_cluster);
  std::copy(coefficients, coefficients + 3 * steps, arguments.coefficients);
  arguments.workspace = workspace;
  arguments.steps = steps;
  arguments.margin = margin;
  return fedkernels::launch(fedkernels::newton_schulz_kernel, arguments, static_cast<int>(plan.clusters * plan.cluster),
                            plan.cluster, fedkernels::kThreads, plan.shared_bytes, stream);
}
