// Products by AMX: tiles of 16 × 32 bfloat16 times 32 × 16, added to 16 × 16 float32.
//
// A matrix is split: `x = high + low`, both bfloat16, which keeps 16 bits of its 24. A product is three of bfloat16,
// `low · high + high · high + high · low`; what is left out is 2⁻¹⁶ of the largest. 32 neighbouring elements of a row are
// 64 bytes of high parts and then 64 of low ones, in the place of the 128 bytes of float32 that they were.
#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "transpose.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 12)
#include <sys/syscall.h>
#include <unistd.h>
#define FEDKERNELS_AMX 1
#endif

#define ALWAYS __attribute__((always_inline))

namespace fedkernels {
namespace {

constexpr int64_t kSide = 32, kLanes = 16, kTileWords = kLanes * kLanes;  // of a block of four tiles; of a vector
constexpr uint32_t kHigh = 0xffff0000;
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef float Floats __attribute__((vector_size(64), may_alias));

// Line `k` of a row: words of two high parts each, and behind them those of low parts.
INLINE uint32_t* line(float* matrix, int64_t stride, int64_t row, int64_t k) {
  return reinterpret_cast<uint32_t*>(matrix + row * stride + k);
}
INLINE const uint32_t* line(const float* matrix, int64_t stride, int64_t row, int64_t k) {
  return reinterpret_cast<const uint32_t*>(matrix + row * stride + k);
}
INLINE Words& vector(uint32_t* words) { return *reinterpret_cast<Words*>(words); }
INLINE const Words& vector(const uint32_t* words) { return *reinterpret_cast<const Words*>(words); }

// A line of the even and of the odd elements; the nearest bfloat16 of each and the nearest of what that leaves.
INLINE void split(const Floats& even, const Floats& odd, uint32_t* to) {
  const Words high_even = ((Words)even + 0x8000) & kHigh, high_odd = ((Words)odd + 0x8000) & kHigh;
  const Words low_even = (Words)(even - (Floats)high_even) + 0x8000, low_odd = (Words)(odd - (Floats)high_odd) + 0x8000;
  vector(to) = (high_even >> 16) | high_odd;
  vector(to + kLanes) = (low_even >> 16) | (low_odd & kHigh);
}

INLINE void joined(const uint32_t* from, Floats& even, Floats& odd) {
  const Words high = vector(from), low = vector(from + kLanes);
  even = (Floats)(high << 16) + (Floats)(low << 16);
  odd = (Floats)(high & kHigh) + (Floats)(low & kHigh);
}

// Of two rows of words the pairs of their lower halves, which are even columns, and of their upper ones.
INLINE Words even_pairs(const Words& above, const Words& below) { return (above & 0xffff) | (below << 16); }
INLINE Words odd_pairs(const Words& above, const Words& below) { return (above >> 16) | (below & kHigh); }

// `to[j][i] = from[i][j]` of 16 × 16 words, in four rounds of a perfect shuffle; `row(i, words)` gives `from[i]`.
template <class Row>
INLINE void transpose_words(const Row& row, uint32_t* to, int64_t to_stride) {
  Words rows[kLanes], mixed[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) row(i, rows[i]);
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      const Words low = rows[i], high = rows[i + kLanes / 2];
      mixed[2 * i] = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] = __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int64_t j = 0; j < kLanes; ++j) vector(to + j * to_stride) = rows[j];
}

INLINE void run_enter(int64_t size, float* row) {
  for (int64_t k = 0; k < size; k += kSide) {
    const Floats first = *reinterpret_cast<const Floats*>(row + k), last = *reinterpret_cast<const Floats*>(row + k + kLanes);
    split(__builtin_shufflevector(first, last, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(first, last, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
          reinterpret_cast<uint32_t*>(row + k));
  }
}

INLINE void run_leave(int64_t size, float* row) {
  for (int64_t k = 0; k < size; k += kSide) {
    Floats even, odd;
    joined(reinterpret_cast<uint32_t*>(row + k), even, odd);
    *reinterpret_cast<Floats*>(row + k) =
        __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *reinterpret_cast<Floats*>(row + k + kLanes) =
        __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// The tiles of B for `kSide` columns: of every 32 rows those of high and those of low parts, of even columns before odd
// ones. A row of a tile has two rows of B.
struct Packing {
  int64_t first = 0;
  uint32_t* packed = nullptr;

  INLINE static int64_t steps(const Product<float>& p) { return p.depth / kSide * (p.b_transposed ? 4 : 2 * kLanes); }

  INLINE void step(const Product<float>& p, int64_t index) const {
    if (p.b_transposed) {
      const int64_t k = index / 4 * kSide, part = index / 2 % 2, odd = index % 2;
      const uint32_t* from = line(p.b, p.b_stride, first + odd, k) + part * kLanes;
      transpose_words([&](int64_t r, Words& row) ALWAYS { row = vector(from + 2 * r * p.b_stride); },
                      packed + index * kTileWords, kLanes);
      return;
    }
    const int64_t k = index / (2 * kLanes) * kSide, part = index / kLanes % 2, r = index % kLanes;
    const uint32_t* from = line(p.b, p.b_stride, k + 2 * r, first) + part * kLanes;
    uint32_t* to = packed + index / kLanes * 2 * kTileWords + r * kLanes;
    const Words above = vector(from), below = vector(from + p.b_stride);
    vector(to) = even_pairs(above, below);
    vector(to + kTileWords) = odd_pairs(above, below);
  }
};

// What is left to do for a block when its sums are there: `α sums + β D + γ I`, split, and above the diagonal its mirror.
struct Rest {
  static constexpr int64_t kQuarter = 4;  // rows that take as long as a quarter of the mirror

  int64_t i = 0, first = 0;
  const float* sums = nullptr;

  INLINE int64_t steps(const Product<float>& p) const { return p.symmetric && i != first ? kSide + 4 * kQuarter : kSide; }

  INLINE void step(const Product<float>& p, int64_t index) const {
    if (index < kSide) return finish_row(p, index);
    const int64_t quarter = (index - kSide) / kQuarter;
    if ((index - kSide) % kQuarter == 0) mirror(p, quarter / 2, quarter % 2);
  }

  INLINE void finish_row(const Product<float>& p, int64_t r) const {
    Floats even = p.alpha * *reinterpret_cast<const Floats*>(sums + r * kSide);
    Floats odd = p.alpha * *reinterpret_cast<const Floats*>(sums + r * kSide + kLanes);
    if (p.beta != 0) {
      Floats d_even, d_odd;
      joined(line(p.d, p.c_stride, i + r, first), d_even, d_odd);
      even += p.beta * d_even;
      odd += p.beta * d_odd;
    }
    if (p.gamma != 0 && i == first) (r % 2 == 0 ? even : odd)[r / 2] += p.gamma;
    split(even, odd, line(p.c, p.c_stride, i + r, first));
  }

  INLINE void mirror(const Product<float>& p, int64_t part, int64_t odd) const {
    const uint32_t* from = line(p.c, p.c_stride, i, first) + part * kLanes;
    uint32_t* to = line(p.c, p.c_stride, first + odd, i) + part * kLanes;
    const auto pairs = [&](int64_t r, Words& row) ALWAYS {
      const Words above = vector(from + 2 * r * p.c_stride), below = vector(from + (2 * r + 1) * p.c_stride);
      row = odd ? odd_pairs(above, below) : even_pairs(above, below);
    };
    transpose_words(pairs, to, 2 * p.c_stride);
  }
};

template <class Work>
struct Paced {
  Work work;
  int64_t steps = 0, slots = 1, done = 0, credit = 0;

  INLINE void turn(const Product<float>& p) {
    for (credit += steps; credit >= slots; credit -= slots) work.step(p, done++);
  }
  INLINE void finish(const Product<float>& p) {
    while (done < steps) work.step(p, done++);
  }
};

// One of the twelve products of 32 rows of B: high · low, then high · high, then low · high. Of eight tiles of 16 rows of
// 64 bytes four are sums of a block, two are of A and two of B, and each is loaded when the last of before is not needed.
template <class Unit>
INLINE void multiply(Unit& unit, int64_t product, const char* above, const char* below, int64_t a_bytes, const char* b) {
  constexpr int64_t kTile = kTileWords * sizeof(uint32_t), kLow = 2 * kTile, kRow = 64;
  switch (product) {
    case 0:
      unit.template load<4>(above, a_bytes);
      unit.template load<6>(b + kLow, kRow);
      return unit.template dot<0, 4, 6>();
    case 1:
      unit.template load<7>(b + kLow + kTile, kRow);
      return unit.template dot<1, 4, 7>();
    case 2:
      unit.template load<5>(below, a_bytes);
      return unit.template dot<2, 5, 6>();
    case 3:
      unit.template load<6>(b, kRow);
      return unit.template dot<3, 5, 7>();
    case 4:
      unit.template load<7>(b + kTile, kRow);
      return unit.template dot<0, 4, 6>();
    case 5:
      return unit.template dot<1, 4, 7>();
    case 6:
      unit.template load<4>(above + kRow, a_bytes);
      return unit.template dot<2, 5, 6>();
    case 7:
      return unit.template dot<3, 5, 7>();
    case 8:
      unit.template load<5>(below + kRow, a_bytes);
      return unit.template dot<0, 4, 6>();
    case 9:
      return unit.template dot<1, 4, 7>();
    case 10:
      return unit.template dot<2, 5, 6>();
    default:
      return unit.template dot<3, 5, 7>();
  }
}

// While the unit is busy
// the processor finishes the block before and packs the next panel, a bit after every product: it looks a few hundred
// instructions ahead, and the next product has to be among them.
template <class Unit>
INLINE void run_panels(const Product<float>& p, int64_t begin, int64_t end, float* memory) {
  constexpr int64_t kProducts = 12;
  alignas(64) float sums[2][kSide * kSide];
  const int64_t panels = p.cols / kSide, slots = p.depth / kSide * kProducts, a_bytes = p.a_stride * sizeof(float);
  const auto packing = [&](int64_t index) ALWAYS {
    return Packing{panel_of(index, panels) * kSide, reinterpret_cast<uint32_t*>(memory) + index % 2 * p.depth * kSide};
  };
  Unit unit;
  Paced<Rest> rest;
  Paced<Packing> current{packing(begin), Packing::steps(p)};
  current.finish(p);
  for (int64_t index = begin, turn = 0; index < end; ++index) {
    const int64_t first = current.work.first, rows = p.symmetric ? first + kSide : p.rows;
    Paced<Packing> next;
    if (index + 1 < end) next = {packing(index + 1), Packing::steps(p), rows / kSide * slots};
    for (int64_t i = 0; i < rows; i += kSide, turn = 1 - turn) {
      unit.template zero<0>(), unit.template zero<1>(), unit.template zero<2>(), unit.template zero<3>();
      for (int64_t k = 0; k < p.depth; k += kSide) {
        const char *above = reinterpret_cast<const char*>(p.a + i * p.a_stride + k), *below = above + kLanes * a_bytes;
        const char* b = reinterpret_cast<const char*>(current.work.packed + k * kSide);
#pragma GCC unroll 1
        for (int64_t product = 0; product < kProducts; ++product) {
          multiply(unit, product, above, below, a_bytes, b);
          rest.turn(p);
          next.turn(p);
        }
      }
      float* to = sums[turn];
      unit.template store<0>(to), unit.template store<1>(to + kLanes);
      unit.template store<2>(to + kLanes * kSide), unit.template store<3>(to + kLanes * kSide + kLanes);
      rest = {{i, first, to}};
      rest.steps = rest.work.steps(p), rest.slots = slots;
    }
    current = next;
  }
  rest.finish(p);
}

// What the instructions do, in the order of Intel's manual.
struct Emulated {
  float tiles[8][kLanes][kLanes];

  template <int kTo>
  void zero() {
    std::memset(tiles[kTo], 0, sizeof tiles[kTo]);
  }
  template <int kTo>
  void load(const char* from, int64_t stride) {
    for (int64_t r = 0; r < kLanes; ++r) std::memcpy(tiles[kTo][r], from + r * stride, 64);
  }
  template <int kFrom>
  void store(float* to) {
    for (int64_t r = 0; r < kLanes; ++r) std::memcpy(to + r * kSide, tiles[kFrom][r], 64);
  }
  template <int kSum, int kLeft, int kRight>
  void dot() {
    const auto half = [](float word, bool odd) {
      uint32_t bits;
      std::memcpy(&bits, &word, sizeof bits);
      bits = odd ? bits & kHigh : bits << 16;
      std::memcpy(&word, &bits, sizeof bits);
      return word;
    };
    for (int64_t i = 0; i < kLanes; ++i) {
      float even[kLanes] = {}, odd[kLanes] = {};
      for (int64_t k = 0; k < kLanes; ++k)
        for (int64_t j = 0; j < kLanes; ++j) {
          even[j] += half(tiles[kLeft][i][k], false) * half(tiles[kRight][k][j], false);
          odd[j] += half(tiles[kLeft][i][k], true) * half(tiles[kRight][k][j], true);
        }
      for (int64_t j = 0; j < kLanes; ++j) tiles[kSum][i][j] += even[j] + odd[j];
    }
  }
};

CLONES void emulated_enter(int64_t size, float* row) { run_enter(size, row); }
CLONES void emulated_leave(int64_t size, float* row) { run_leave(size, row); }
CLONES void emulated_panels(const Product<float>& p, int64_t begin, int64_t end, float* packed) {
  run_panels<Emulated>(p, begin, end, packed);
}

const Engine<float> kEmulated = {kSide, kSide, emulated_panels, emulated_enter, emulated_leave};

#ifdef FEDKERNELS_AMX

struct Amx {
  struct alignas(64) Shape {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shape before;  // libraries that multiply in tiles on this thread find theirs as they left it

  INLINE Amx() {
    Shape shape;
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = kLanes;
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  INLINE ~Amx() { asm volatile("ldtilecfg %0" ::"m"(before)); }

  template <int kTo>
  INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTo));
  }
  template <int kTo>
  INLINE void load(const char* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTo) : "memory");
  }
  template <int kFrom>
  INLINE void store(float* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(kSide * sizeof(float)), "i"(kFrom) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

#define FEDKERNELS_TARGET __attribute__((target("arch=x86-64-v4")))
FEDKERNELS_TARGET void amx_enter(int64_t size, float* row) { run_enter(size, row); }
FEDKERNELS_TARGET void amx_leave(int64_t size, float* row) { run_leave(size, row); }
FEDKERNELS_TARGET void amx_panels(const Product<float>& p, int64_t begin, int64_t end, float* packed) {
  run_panels<Amx>(p, begin, end, packed);
}
#undef FEDKERNELS_TARGET

const Engine<float> kAmx = {kSide, kSide, amx_panels, amx_enter, amx_leave};

// Linux lends the registers of tiles to processes that ask.
bool has_amx() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool lent = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bw") &&
                           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return lent;
}

#else

const Engine<float>& kAmx = kEmulated;
bool has_amx() { return false; }

#endif

}  // namespace

const Engine<float>* tile_engine() {
  const char* variable = std::getenv("FEDKERNELS_AMX");
  const std::string asked = variable ? variable : "";
  if (asked.empty() || asked == "0") return nullptr;
  if (asked == "emulated") return &kEmulated;
  if (asked != "1") throw std::invalid_argument("FEDKERNELS_AMX=" + asked + ": expected 0, 1 or emulated");
  if (!has_amx()) throw std::runtime_error("FEDKERNELS_AMX=1: no AMX tiles of bfloat16 here");
  return &kAmx;
}

}  // namespace fedkernels
