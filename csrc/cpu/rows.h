// What the CPU kernels share. They work on tiles of flat rows through plain pointers and include no torch header, so
// that they compile in a second; threads, checks and tensors are the business of csrc/bindings.
#pragma once

#include <cstdint>
#include <cstring>

// One body per instruction set, chosen when the library is loaded. With -ffp-contract=off all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace fedkernels {

// Elements between two bursts of prefetches: few, or a burst waits for more lines than a core can have on their way.
constexpr int64_t kTile = 64;
// Elements of a row that are one unit of work, the same whatever the number of threads.
constexpr int64_t kChunk = 16384;
// How far ahead of the computation memory is asked for: with five streams, more than the processor does by itself.
constexpr int64_t kAhead = 512;

struct Bf16 {
  uint16_t bits;
};

INLINE float widen(float value) { return value; }
INLINE double widen(double value) { return value; }
INLINE float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T>
INLINE void prefetch_tile(const T* stream) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  if (stream)
    for (int64_t i = 0; i < kTile; i += kPerLine) __builtin_prefetch(stream + i);
}

}  // namespace fedkernels
