// X ← aX + b(XXᵀ)X + c(XXᵀ)²X, all steps of all matrices of a model in one launch.
//
// A block of 12 warps, alone or in a cluster that shares a matrix, holds in shared memory the fp16 operands of the
// products: its slab of X, `n × width`, and one symmetric n × n matrix, which is first G = XXᵀ and then P = bG + cG².
// Products accumulate in float32 in registers; X itself is carried in float32 in the output, which every step reads
// and writes once, while its products run. Blocks of a cluster add their shares of G through global memory.
#include "newton_schulz.h"

#include <algorithm>

#include "device.h"
#include "tiles.h"

namespace fedkernels {
namespace {

constexpr int kPanel = kClusters ? 2 : 1;  // blocks of the next X in a warp's registers, as fp16
constexpr int kMaxCluster = 8;             // what every GPU with clusters allows
constexpr int kBlockFloats = 1024;         // of a block of tiles in the workspace
constexpr int kSpareFloats = 32;           // after the shares of a matrix: the largest entries

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

HOST_DEVICE int64_t symmetric_blocks(int64_t side) { return side * (side + 1) / 2; }

// Two sets of each part's share of G, and the largest entry that each found.
HOST_DEVICE int64_t workspace_floats(int64_t side, int64_t parts) {
  return 2 * parts * symmetric_blocks(side) * kBlockFloats + kSpareFloats;
}

HOST_DEVICE int sides(int64_t length) { return static_cast<int>((length + kSide - 1) / kSide); }

// What a block works on. It lies in shared memory, since the products need the registers.
struct Work {
  Matrix in, out;
  float* workspace;  // of the cluster, or null where the block has a matrix of its own
  int part, parts, width;
  bool resident;
  float scratch[kWarps];
};

static_assert(sizeof(Work) <= kWorkBytes, "the operands begin there");

DEVICE Work& work() { return *reinterpret_cast<Work*>(shared_memory()); }

// G += X Xᵀ over some blocks of columns.
DEVICE void add_gram(Block (&gram)[kSymmetric], const Symmetric& shape, const Slab& x, int blocks) {
  const Thread me;
  for_own_blocks(me, shape, [&](int slot, int, int i, int j) {
    for (int k = 0; k < 2 * blocks; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        ldmatrix(a[tile], x.tile(2 * i + tile, k) + me.lane * 16);
        ldmatrix(b[tile], x.tile(2 * j + tile, k) + me.lane * 16);
      }
      multiply<true>(gram[slot], a, b);
    }
  });
}

// S = G².
DEVICE void square(Block (&product)[kSymmetric], const Symmetric& g) {
  const Thread me;
  clear(product);
  for_own_blocks(me, g, [&](int slot, int, int i, int j) {
    for (int k = 0; k < 2 * g.side; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        g.load(a[tile], me, 2 * i + tile, k);
        g.load(b[tile], me, 2 * j + tile, k);
      }
      multiply<true>(product[slot], a, b);
    }
  });
}

// The fp16 of `factor² G`.
DEVICE void store_gram(const Block (&gram)[kSymmetric], const Symmetric& g, float factor) {
  const Thread me;
  for_own_blocks(me, g, [&](int slot, int block, int, int) {
    for_each_pair([&](int i, int j, int h, int r) {
      const float(&value)[4] = gram[slot][i][j][h];
      *me.pair_in(g.tile(block, i, j), h, r) =
          pack_halves(value[2 * r] * factor * factor, value[2 * r + 1] * factor * factor);
    });
  });
}

// P = bG + cS over G.
DEVICE void combine(const Block (&squared)[kSymmetric], const Symmetric& g, float b, float c) {
  const Thread me;
  for_own_blocks(me, g, [&](int slot, int block, int, int) {
    for_each_pair([&](int i, int j, int h, int r) {
      const float(&s)[4] = squared[slot][i][j][h];
      uint32_t* at = me.pair_in(g.tile(block, i, j), h, r);
      float pair[2];
      unpack_halves(*at, pair[0], pair[1]);
      *at = pack_halves(b * pair[0] + c * s[2 * r], b * pair[1] + c * s[2 * r + 1]);
    });
  });
}

// Sum, or maximum, of a value of every thread, in an order of its own.
template <bool kMaximum>
DEVICE float reduce(float value) {
  const Thread me;
  const auto combine = [](float a, float b) { return kMaximum ? (a > b ? a : b) : a + b; };
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  if (me.lane == 0) work().scratch[me.warp] = value;
  sync_block();
  value = work().scratch[0];
  for (int i = 1; i < kWarps; ++i) value = combine(value, work().scratch[i]);
  sync_block();
  return value;
}

// The power of two that takes the largest entry into [1, 2), as far as its inverse is a normal number.
DEVICE float scale_of(float most) {
  const int exponent = 254 - static_cast<int>(float_bits(most) >> 23);
  return bits_float(static_cast<uint32_t>(exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
}

// Fill the slab with fp16 of `scale · X`, from some column on.
DEVICE void load_slab(const Slab& slab, const Matrix& x, int first, int blocks, float scale) {
  const Thread me;
  const int rows = 2 * slab.before.side;
#pragma unroll 2
  for (int tile = me.warp; tile < rows * 2 * blocks; tile += kWarps) {
    const int row = tile % rows, column = tile / rows;
    Tile values;
    x.load(me, row * kTileSide, first + column * kTileSide, values);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float *left = &values[pair / 2][pair % 2 * 2], *right = left + 1;
      *me.pair_in(slab.tile(row, column), pair / 2, pair % 2) = pack_halves(scale * *left, scale * *right);
    }
  }
}

// `out = factor (a · scale · from + P X)` over some blocks of columns. `keep` writes its fp16 over X in the slab.
DEVICE void update(const Symmetric& p, const Slab& slab, const Matrix& from, const Matrix& out, int first, int blocks,
                   float a, float scale, float factor, bool keep) {
  const Thread me;
  const int panel = kPanel * kWarps / p.side;
  for (int start = 0; start < blocks; start += panel) {
    uint32_t halves[kPanel][2][2][2][2];
    const auto for_own = [&](const auto& f) {
#pragma unroll
      for (int slot = 0; slot < kPanel; ++slot) {
        const int item = slot * kWarps + me.warp, row = item % p.side, column = start + item / p.side;
        if (item < panel * p.side && column < blocks) f(slot, row, column);
      }
    };
    for_own([&](int slot, int row, int column) {
      Block x, product[1];
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)  // on their way while products run
        from.load(me, row * kSide + tile / 2 * kTileSide, first + column * kSide + tile % 2 * kTileSide,
                  x[tile / 2][tile % 2]);
      clear(product);
      for (int k = 0; k < 2 * p.side; ++k) {
        uint32_t left[2][4], right[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          p.load(left[tile], me, 2 * row + tile, k);
          ldmatrix_transposed(right[tile], slab.tile(k, 2 * column + tile) + me.lane * 16);
        }
        multiply<false>(product[0], left, right);
      }
      for_each_pair([&](int i, int j, int h, int r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = x[i][j][h][2 * r + e];
          value = factor * (a * (scale * value) + product[0][i][j][h][2 * r + e]);
        }
        halves[slot][i][j][h][r] = pack_halves(x[i][j][h][2 * r], x[i][j][h][2 * r + 1]);
      });
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
        out.store(me, row * kSide + tile / 2 * kTileSide, first + column * kSide + tile % 2 * kTileSide,
                  x[tile / 2][tile % 2]);
    });
    if (!keep) continue;
    sync_block();  // all have read these columns
    for_own([&](int slot, int row, int column) {
      for_each_pair([&](int i, int j, int h, int r) {
        *me.pair_in(slab.tile(2 * row + i, 2 * column + j), h, r) = halves[slot][i][j][h][r];
      });
    });
  }
}

// The shares of G of a cluster's blocks, added in the order of blocks by each of them. There are two sets of shares to
// take turns: when a block writes one, nobody reads it any more.
DEVICE void add_shares(Block (&gram)[kSymmetric], const Symmetric& shape, int set) {
  const Thread me;
  const int part = work().part, parts = work().parts;
  auto* shares = reinterpret_cast<Float4*>(work().workspace);
  const auto at = [&](int share, int block, int quad) {
    return shares + (((set * parts + share) * shape.blocks() + block) * 8 + quad) * 32 + me.lane;
  };
  for_own_blocks(me, shape, [&](int slot, int block, int, int) {
#pragma unroll
    for (int quad = 0; quad < 8; ++quad) {
      const float(&g)[4] = gram[slot][quad / 4][quad / 2 % 2][quad % 2];
      *at(part, block, quad) = {g[0], g[1], g[2], g[3]};
    }
  });
  sync_cluster();
  clear(gram);
  for_own_blocks(me, shape, [&](int slot, int block, int, int) {
#pragma unroll 1
    for (int share = 0; share < parts; ++share)
#pragma unroll
      for (int quad = 0; quad < 8; ++quad) {
        float(&g)[4] = gram[slot][quad / 4][quad / 2 % 2][quad % 2];
        const Float4 other = load_past_l1(at(share, block, quad));
        g[0] += other.x;
        g[1] += other.y;
        g[2] += other.z;
        g[3] += other.w;
      }
  });
}

DEVICE float trace(const Block (&gram)[kSymmetric], const Symmetric& shape) {
  const Thread me;
  float sum = 0;
  for_own_blocks(me, shape, [&](int slot, int, int i, int j) {
    for_each_pair([&](int tile_i, int tile_j, int h, int r) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (i == j && me.row(tile_i, r) == me.column(tile_j, h) + e) sum += gram[slot][tile_i][tile_j][h][2 * r + e];
    });
  });
  return reduce<false>(sum);
}

// Find the block's matrix and slab; whether there is one.
DEVICE bool assign(const Arguments& given) {
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
  if (index >= batch.count) return false;
  if (thread_index() == 0) {
    const int part = alone ? 0 : rank, n = static_cast<int>(batch.short_side);
    const int64_t start = static_cast<int64_t>(part) * placed.slab, left = batch.long_side - start;
    const int m = static_cast<int>(left < 0 ? 0 : left < placed.slab ? left : placed.slab);
    const int64_t outer = index / batch.inner, inner = index % batch.inner;
    float* in = const_cast<float*>(batch.in) + outer * batch.in_outer + inner * batch.in_inner;
    float* out = batch.out + outer * batch.out_outer + inner * batch.out_inner;
    Work& own = work();
    own.in.place(in + start * batch.in_long, batch.in_short, batch.in_long, n, m);
    own.out.place(out + start * batch.out_long, batch.out_short, batch.out_long, n, m);
    own.workspace = alone ? nullptr : given.workspace + placed.workspace + nth * workspace_floats(sides(n), placed.parts);
    own.part = part;
    own.parts = placed.parts;
    own.width = placed.width;
    own.resident = placed.slab == placed.width;
  }
  sync_block();
  return true;
}

// The power of two by which a matrix is multiplied, so that fp16 holds it whatever its size.
DEVICE float find_scale(int side) {
  const Thread me;
  const Matrix& in = work().in;
  float most = 0;
#pragma unroll 4
  for (int tile = me.warp; tile < 2 * side * 2 * sides(in.columns); tile += kWarps) {
    Tile values;
    in.load(me, tile % (2 * side) * kTileSide, tile / (2 * side) * kTileSide, values);
#pragma unroll
    for (int element = 0; element < 8; ++element) {
      const float magnitude = bits_float(float_bits(values[element / 4][element % 4]) & 0x7fffffffu);
      if (magnitude > most) most = magnitude;
    }
  }
  most = reduce<true>(most);
  if (float* workspace = work().workspace; kClusters && workspace) {
    const int parts = work().parts;
    float* all = workspace + workspace_floats(side, parts) - kSpareFloats;
    if (thread_index() == 0) all[work().part] = most;
    sync_cluster();
    for (int part = 0; part < parts; ++part) {
      const float other = load_past_l1(all + part);
      if (other > most) most = other;
    }
  }
  return scale_of(most);
}

KERNEL(kThreads) newton_schulz_kernel(GRID_CONSTANT Arguments given) {
  if (!assign(given)) return;
  const Symmetric p{sides(work().in.rows)};
  const Slab slab{p};
  float scale = find_scale(p.side), factor = 1;  // X is factor · scale · what `from` has
  for (int step = 0; step < given.steps; ++step) {
    const Matrix& from = step == 0 ? work().in : work().out;
    const auto for_each_chunk = [&](bool load, const auto& f) {
      const int columns = work().in.columns, width = work().width;
      for (int first = 0; first < columns; first += width) {
        const int blocks = sides(columns - first < width ? columns - first : width);
        if (load) load_slab(slab, from, first, blocks, scale);
        sync_block();
        f(first, blocks);
        sync_block();
      }
    };

    Block product[kSymmetric];
    clear(product);
    for_each_chunk(step == 0 || !work().resident, [&](int, int blocks) { add_gram(product, p, slab, blocks); });
    if (kClusters && work().workspace) add_shares(product, p, step % 2);
    if (step == 0) factor = 1 / (square_root(trace(product, p)) * given.margin + 1e-7f * scale);

    store_gram(product, p, factor);
    sync_block();
    square(product, p);
    sync_block();
    const float* coefficients = given.coefficients + 3 * step;
    combine(product, p, coefficients[1], coefficients[2]);
    sync_block();

    for_each_chunk(!work().resident, [&](int first, int blocks) {
      const bool keep = work().resident && step + 1 < given.steps;
      update(p, slab, from, work().out, first, blocks, coefficients[0], scale, factor, keep);
    });
    scale = factor = 1;
  }
}

// Columns of X, a multiple of 32, that a block has room for beside P.
int64_t width_limit(int64_t side, int64_t shared_limit) {
  const int64_t room = shared_limit - kWorkBytes - symmetric_blocks(side) * kBlockBytes;
  return room / (side * kBlockBytes) * kSide;
}

// Fill in where matrices go, those with most work for a block first.
Plan place(Arguments& arguments, const Batch* batches, int count, int shared_limit, int max_cluster) {
  const auto slab = [&](const Batch& batch, int64_t parts) {
    return (sides(batch.long_side) + parts - 1) / parts * kSide;
  };
  const auto fits = [&](const Batch& batch, int64_t parts) {
    return slab(batch, parts) <= width_limit(sides(batch.short_side), shared_limit);
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
        std::min<int64_t>(placed.slab, width_limit(sides(batches[i].short_side), shared_limit)));
  }
  const auto work = [&](const Placed& placed) {  // multiplications of a block and step, in 32³
    const int64_t side = sides(placed.batch.short_side);
    return symmetric_blocks(side) * side + (symmetric_blocks(side) + side * side) * (placed.slab / kSide);
  };
  std::stable_sort(arguments.placed, arguments.placed + count,
                   [&](const Placed& one, const Placed& other) { return work(one) > work(other); });

  Plan plan{cluster, 0, 0, 0};
  for (int i = 0; i < count; ++i) {
    Placed& placed = arguments.placed[i];
    const int64_t side = sides(placed.batch.short_side), all = symmetric_blocks(side);
    placed.first_cluster = plan.clusters;
    placed.workspace = plan.workspace_floats;
    plan.clusters += placed.parts > 1 ? placed.batch.count : (placed.batch.count + cluster - 1) / cluster;
    if (placed.parts > 1) plan.workspace_floats += placed.batch.count * workspace_floats(side, placed.parts);
    const int64_t shared = kWorkBytes + all * kBlockBytes + placed.width / kSide * side * kBlockBytes;
    plan.shared_bytes = std::max(plan.shared_bytes, static_cast<int32_t>(shared));
  }
  arguments.count = count;
  arguments.cluster = cluster;
  return plan;
}

}  // namespace
}  // namespace fedkernels

extern "C" int fedkernels_newton_schulz_max_cluster(int* max_cluster) {
  int arch = 0;
  const int error = fedkernels::compiled_for(fedkernels::newton_schulz_kernel, arch);
  *max_cluster = arch >= 90 ? fedkernels::kMaxCluster : 1;
  return error;
}

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
