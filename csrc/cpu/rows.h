// What the CPU kernels share. They work on tiles of flat rows through plain pointers and include no torch header, so
// that they compile in a second; threads, checks and tensors are the business of bindings.cpp.
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

// Elements whose intermediate values stay in the first-level cache while simple loops go over them one after another.
constexpr int64_t kTile = 256;
// Elements of a row that are one unit of work: four pages of float32, the same whatever the number of threads.
constexpr int64_t kChunk = 4096;

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

}  // namespace fedkernels
