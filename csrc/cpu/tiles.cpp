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

// The tiles of B for `kSide` columns, packed in steps: of every 32 rows those of high and those of low parts, of even
// columns before odd ones. A row of a tile has two rows of B.
struct Packing {
  int64_t first = 0, done = 0, steps = 0;
  uint32_t* packed = nullptr;

  INLINE void advance(const Product<float>& p, int64_t until) {
    for (; done < until; ++done) pack(p, done / 2 * kSide, done % 2, packed + done * 2 * kTileWords);
  }

  INLINE void pack(const Product<float>& p, int64_t k, int64_t part, uint32_t* to) const {
    if (p.b_transposed) {
      for (int64_t odd = 0; odd < 2; ++odd) {
        const uint32_t* from = line(p.b, p.b_stride, first + odd, k) + part * kLanes;
        transpose_words([&](int64_t r, Words& row) ALWAYS { row = vector(from + 2 * r * p.b_stride); },
                        to + odd * kTileWords, kLanes);
      }
      return;
    }
    for (int64_t r = 0; r < kLanes; ++r) {
      const uint32_t* rows = line(p.b, p.b_stride, k + 2 * r, first) + part * kLanes;
      const Words above = vector(rows), below = vector(rows + p.b_stride);
      vector(to + r * kLanes) = even_pairs(above, below);
      vector(to + kTileWords + r * kLanes) = odd_pairs(above, below);
    }
  }
};

// What is left to do for a block when its sums are there, in steps that are short beside the products of the next one:
// a row of `α sums + β D + γ I`, split, and above the diagonal a quarter of its mirror.
constexpr int64_t kQuarter = 5;  // rows that take as long as a quarter

struct Rest {
  int64_t i = 0, first = 0, done = 0, steps = 0;
  const float* sums = nullptr;

  INLINE void advance(const Product<float>& p, int64_t until) {
    for (; done < until && done < kSide; ++done) finish_row(p, done);
    for (; done < until; ++done)
      if (const int64_t quarter = (done - kSide) / kQuarter; (done - kSide) % kQuarter == 0)
        mirror(p, quarter / 2, quarter % 2);
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

// A unit has eight tiles of 16 rows of 64 bytes. Four are sums of a block, two are of A and two of B. While it is busy
// the processor finishes the block before and packs the next panel, a bit after every four products: nothing waits for
// what was just written, and what waits for its turn fits the buffers of the processor.
template <class Unit>
INLINE void run_panels(const Product<float>& p, int64_t begin, int64_t end, float* memory) {
  alignas(64) float sums[2][kSide * kSide];
  const int64_t panels = p.cols / kSide, depth = p.depth / kSide, a_bytes = p.a_stride * sizeof(float);
  const auto packing = [&](int64_t index) ALWAYS {
    return Packing{panel_of(index, panels) * kSide, 0, index < end ? 2 * depth : 0,
                   reinterpret_cast<uint32_t*>(memory) + index % 2 * p.depth * kSide};
  };
  Unit unit;
  Rest rest;
  Packing current = packing(begin);
  current.advance(p, current.steps);
  for (int64_t index = begin, turn = 0; index < end; ++index) {
    Packing next = packing(index + 1);
    const int64_t first = current.first, rows = p.symmetric ? first + kSide : p.rows;
    for (int64_t i = 0; i < rows; i += kSide, turn = 1 - turn) {
      unit.template zero<0>(), unit.template zero<1>(), unit.template zero<2>(), unit.template zero<3>();
      for (int64_t k = 0; k < depth; ++k) {
        const auto beside = [&](int64_t third) ALWAYS {
          const int64_t turns = 3 * k + third + 1;
          rest.advance(p, rest.steps * turns / (3 * depth));
          next.advance(p, next.steps * (i / kSide * 3 * depth + turns) / (rows / kSide * 3 * depth));
        };
        constexpr int64_t kTile = kTileWords * sizeof(uint32_t), kPart = 2 * kTile;
        const char *above = reinterpret_cast<const char*>(p.a + i * p.a_stride + k * kSide), *below = above + kLanes * a_bytes;
        const char* b = reinterpret_cast<const char*>(current.packed) + k * 2 * kPart;
        unit.template load<4>(above, a_bytes), unit.template load<5>(below, a_bytes);
        unit.template load<6>(b + kPart, 64), unit.template load<7>(b + kPart + kTile, 64);
        unit.dots();  // high · low
        beside(0);
        unit.template load<6>(b, 64), unit.template load<7>(b + kTile, 64);
        unit.dots();  // high · high
        beside(1);
        unit.template load<4>(above + 64, a_bytes), unit.template load<5>(below + 64, a_bytes);
        unit.dots();  // low · high
        beside(2);
      }
      float* to = sums[turn];
      unit.template store<0>(to), unit.template store<1>(to + kLanes);
      unit.template store<2>(to + kLanes * kSide), unit.template store<3>(to + kLanes * kSide + kLanes);
      rest = {i, first, 0, p.symmetric && i != first ? kSide + 4 * kQuarter : kSide, to};
    }
    current = next;
  }
  rest.advance(p, rest.steps);
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
  void dots() { dot<0, 4, 6>(), dot<1, 4, 7>(), dot<2, 5, 6>(), dot<3, 5, 7>(); }
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
  INLINE void dots() { dot<0, 4, 6>(), dot<1, 4, 7>(), dot<2, 5, 6>(), dot<3, 5, 7>(); }
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
