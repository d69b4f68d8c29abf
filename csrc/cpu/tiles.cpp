// AMX multiplies tiles of 16 × 32 and 32 × 16 bfloat16 and adds up in float32, sixteen times as fast as vectors do.
//
// A matrix is split: `x = high + low`, both bfloat16, keeps 16 of the 24 bits of x. A product is three of bfloat16,
// `high · low + high · high + low · high`, without what is 2⁻¹⁶ of it at most. A line, 32 neighbours in a row, has 64
// bytes of high parts and then 64 of low ones in the place of the 128 bytes of float32.
//
// In a block of C, 32 × 32, one tile has the even columns and one the odd: no element leaves its lane on the way from
// two sums to a line, or from two lines of B to its tiles.
#include "tiles.h"

#include "rows.h"

#if defined(__clang__) || __GNUC__ >= 12
#define FEDKERNELS_TILES 1
#if defined(FEDKERNELS_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define FEDKERNELS_AMX 1
#endif
#endif

namespace fedkernels {

#ifdef FEDKERNELS_TILES

namespace {

constexpr int64_t kSide = 32, kLanes = 16, kTileWords = kLanes * kLanes;  // of a block; of a vector; of a tile
constexpr uint32_t kUpper = 0xffff0000, kLower = 0x0000ffff, kHalf = 0x8000;
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef float Floats __attribute__((vector_size(64), may_alias));

// The words of a line, two elements each, from column k on: those of high parts, and `kLanes` later those of low ones.
INLINE uint32_t* line(float* matrix, int64_t stride, int64_t row, int64_t k) {
  return reinterpret_cast<uint32_t*>(matrix + row * stride + k);
}
INLINE const uint32_t* line(const float* matrix, int64_t stride, int64_t row, int64_t k) {
  return reinterpret_cast<const uint32_t*>(matrix + row * stride + k);
}

INLINE Words& words(uint32_t* at) { return *reinterpret_cast<Words*>(at); }
INLINE const Words& words(const uint32_t* at) { return *reinterpret_cast<const Words*>(at); }
INLINE Floats& floats(float* at) { return *reinterpret_cast<Floats*>(at); }
INLINE const Floats& floats(const float* at) { return *reinterpret_cast<const Floats*>(at); }

// The nearest bfloat16, and the nearest of what that leaves.
INLINE void split(const Floats& even, const Floats& odd, uint32_t* to) {
  const Words high_even = ((Words)even + kHalf) & kUpper, high_odd = ((Words)odd + kHalf) & kUpper;
  const Words low_even = (Words)(even - (Floats)high_even) + kHalf, low_odd = (Words)(odd - (Floats)high_odd) + kHalf;
  words(to) = (high_even >> 16) | high_odd;
  words(to + kLanes) = (low_even >> 16) | (low_odd & kUpper);
}

INLINE void join(const uint32_t* from, Floats& even, Floats& odd) {
  const Words high = words(from), low = words(from + kLanes);
  even = (Floats)(high << 16) + (Floats)(low << 16);
  odd = (Floats)(high & kUpper) + (Floats)(low & kUpper);
}

INLINE void run_enter(int64_t size, float* row) {
  for (int64_t k = 0; k < size; k += kSide) {
    const Floats first = floats(row + k), last = floats(row + k + kLanes);
    split(__builtin_shufflevector(first, last, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(first, last, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
          reinterpret_cast<uint32_t*>(row + k));
  }
}

INLINE void run_leave(int64_t size, float* row) {
  for (int64_t k = 0; k < size; k += kSide) {
    Floats even, odd;
    join(reinterpret_cast<uint32_t*>(row + k), even, odd);
    floats(row + k) = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    floats(row + k + kLanes) =
        __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Of two rows the words that pair their elements in even columns, or in odd ones.
INLINE void pair(bool odd, const uint32_t* above, const uint32_t* below, Words& pairs) {
  pairs = odd ? (words(above) >> 16) | (words(below) & kUpper) : (words(above) & kLower) | (words(below) << 16);
}

// `to[j][i] = rows[i][j]` of 16 × 16 words, in four rounds of a perfect shuffle.
INLINE void transpose_words(Words* rows, uint32_t* to, int64_t to_stride) {
  Words mixed[kLanes];
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      const Words low = rows[i], high = rows[i + kLanes / 2];
      mixed[2 * i] = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] =
          __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int64_t j = 0; j < kLanes; ++j) words(to + j * to_stride) = rows[j];
}

// Four tiles of 32 rows of B and the columns from `first` on: high parts before low ones, and of either the even
// columns before the odd ones. A row of a tile has two rows of B.
INLINE void pack(const Product<float>& p, int64_t k, int64_t first, uint32_t* packed) {
  for (int64_t tile = 0; tile < 4; ++tile, packed += kTileWords) {
    const int64_t part = tile / 2 * kLanes, odd = tile % 2;
    if (p.b_transposed) {
      const uint32_t* from = line(p.b, p.b_stride, first + odd, k) + part;
      Words rows[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = words(from + 2 * i * p.b_stride);
      transpose_words(rows, packed, kLanes);
    } else {
      const uint32_t* from = line(p.b, p.b_stride, k, first) + part;
      for (int64_t i = 0; i < kLanes; ++i, from += 2 * p.b_stride)
        pair(odd, from, from + p.b_stride, words(packed + i * kLanes));
    }
  }
}

// What is left to do when the sums of a block are there, in steps: a row of `α sums + β D + γ I`, or a quarter of the
// mirror of what lies above the diagonal.
struct Rest {
  int64_t i = 0, first = 0, done = 0, steps = 0;
  const float* sums = nullptr;

  Rest() = default;
  INLINE Rest(const Product<float>& p, int64_t row, int64_t col, const float* from)
      : i(row), first(col), steps(p.symmetric && row != col ? kSide + 4 : kSide), sums(from) {}

  INLINE void advance(const Product<float>& p, int64_t until) {
    for (; done < until && done < kSide; ++done) finish_row(p, done);
    for (; done < until; ++done) mirror(p, (done - kSide) / 2 * kLanes, done % 2);
  }

  INLINE void finish_row(const Product<float>& p, int64_t r) const {
    Floats even = p.alpha * floats(sums + r * kSide), odd = p.alpha * floats(sums + r * kSide + kLanes);
    if (p.beta != 0) {
      Floats d_even, d_odd;
      join(line(p.d, p.c_stride, i + r, first), d_even, d_odd);
      even += p.beta * d_even;
      odd += p.beta * d_odd;
    }
    if (p.gamma != 0 && i == first) (r % 2 == 0 ? even : odd)[r / 2] += p.gamma;
    split(even, odd, line(p.c, p.c_stride, i + r, first));
  }

  INLINE void mirror(const Product<float>& p, int64_t part, int64_t odd) const {
    const uint32_t* from = line(p.c, p.c_stride, i, first) + part;
    Words rows[kLanes];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kLanes; ++r)
      pair(odd, from + 2 * r * p.c_stride, from + (2 * r + 1) * p.c_stride, rows[r]);
    transpose_words(rows, line(p.c, p.c_stride, first + odd, i) + part, 2 * p.c_stride);
  }
};

// Of eight tiles, four are the sums of a block, upper rows before lower ones; two are of A and two of B. Blocks on the
// diagonal are computed whole. While the unit multiplies, the processor finishes the block before.
template <class Unit>
INLINE void run_panels(const Product<float>& p, int64_t begin, int64_t end, float* memory) {
  alignas(64) float sums[2][kSide * kSide];
  uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
  const int64_t panels = p.cols / kSide, a_bytes = p.a_stride * sizeof(float);
  Unit unit;
  Rest rest;
  for (int64_t index = begin, turn = 0; index < end; ++index) {
    const int64_t first = panel_of(index, panels) * kSide, rows = p.symmetric ? first + kSide : p.rows;
    pack(p, 0, first, packed);
    for (int64_t i = 0; i < rows; i += kSide, turn = 1 - turn) {
      unit.template zero<0>(), unit.template zero<1>(), unit.template zero<2>(), unit.template zero<3>();
      for (int64_t k = 0; k < p.depth; k += kSide) {
        // One ahead: a tile is loaded from the cache, where what was stored has to arrive first.
        if (i == 0 && k + kSide < p.depth) pack(p, k + kSide, first, packed + (k + kSide) * kSide);
        const char *upper = reinterpret_cast<const char*>(p.a + i * p.a_stride + k), *lower = upper + kLanes * a_bytes;
        const char *high = reinterpret_cast<const char*>(packed + k * kSide), *low = high + 8 * kTileWords;
        unit.template load<4>(upper, a_bytes), unit.template load<5>(lower, a_bytes);
        unit.template load<6>(low, 64), unit.template load<7>(low + 4 * kTileWords, 64);
        unit.add_products();  // high · low
        unit.template load<6>(high, 64), unit.template load<7>(high + 4 * kTileWords, 64);
        unit.add_products();  // high · high
        unit.template load<4>(upper + 64, a_bytes), unit.template load<5>(lower + 64, a_bytes);
        unit.add_products();  // low · high
        rest.advance(p, rest.steps * (k + kSide) / p.depth);
      }
      float* to = sums[turn];
      unit.template store<0>(to), unit.template store<1>(to + kLanes);
      unit.template store<2>(to + kLanes * kSide), unit.template store<3>(to + kLanes * kSide + kLanes);
      rest = Rest(p, i, first, to);
    }
  }
  rest.advance(p, rest.steps);
}

// The instructions one after the other, with the roundings of Intel's manual; denormal numbers stay what they are.
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
  void store(float* to) const {
    for (int64_t r = 0; r < kLanes; ++r) std::memcpy(to + r * kSide, tiles[kFrom][r], 64);
  }
  void add_products() {
    for (int64_t c = 0; c < 4; ++c)
      for (int64_t i = 0; i < kLanes; ++i) {
        Floats sums[2] = {};
        for (int64_t k = 0; k < kLanes; ++k) {
          uint32_t left;
          std::memcpy(&left, &tiles[4 + c / 2][i][k], sizeof left);
          Words right;
          std::memcpy(&right, tiles[6 + c % 2][k], sizeof right);
          sums[0] += (Floats)(Words{} + (left << 16)) * (Floats)(right << 16);
          sums[1] += (Floats)(Words{} + (left & kUpper)) * (Floats)(right & kUpper);
        }
        for (int64_t j = 0; j < kLanes; ++j) tiles[c][i][j] += sums[0][j] + sums[1][j];
      }
  }
};

CLONES void emulated_enter(int64_t size, float* row) { run_enter(size, row); }
CLONES void emulated_leave(int64_t size, float* row) { run_leave(size, row); }
CLONES void emulated_panels(const Product<float>& p, int64_t begin, int64_t end, float* packed) {
  run_panels<Emulated>(p, begin, end, packed);
}

}  // namespace

const Engine<float>* emulated_amx() {
  static const Engine<float> engine{kSide, kSide, emulated_panels, emulated_enter, emulated_leave};
  return &engine;
}

#else

const Engine<float>* emulated_amx() { return nullptr; }

#endif

#ifdef FEDKERNELS_AMX

namespace {

struct Amx {
  struct alignas(64) Shapes {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shapes before;  // libraries that multiply on this thread find theirs as they left them

  INLINE Amx() {
    Shapes shapes;
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = kLanes;
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  Amx(const Amx&) = delete;
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
  INLINE void add_products() {
    asm volatile(
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
        "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
        "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
  }
};

#define FEDKERNELS_AVX512 __attribute__((target("arch=x86-64-v4")))
FEDKERNELS_AVX512 void amx_enter(int64_t size, float* row) { run_enter(size, row); }
FEDKERNELS_AVX512 void amx_leave(int64_t size, float* row) { run_leave(size, row); }
FEDKERNELS_AVX512 void amx_panels(const Product<float>& p, int64_t begin, int64_t end, float* packed) {
  run_panels<Amx>(p, begin, end, packed);
}
#undef FEDKERNELS_AVX512

// Linux lends the registers of tiles to a process that asks for them.
bool is_lent() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

const Engine<float>* amx() {
  static const Engine<float> engine{kSide, kSide, amx_panels, amx_enter, amx_leave};
  static const bool lent = is_lent();
  return lent ? &engine : nullptr;
}

#else

const Engine<float>* amx() { return nullptr; }

#endif

}  // namespace fedkernels
