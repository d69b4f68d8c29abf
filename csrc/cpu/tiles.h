// Products in tiles of bfloat16, each factor in two parts.
#pragma once

#include "products.h"

namespace fedkernels {

// The shortest side with which they are faster than products of float32.
constexpr int64_t kTiledSide = 32;

// By AMX; null where the processor has none, the system does not lend it or the compiler does not know it.
const Engine<float>* amx();

// The same, with a loop in the place of each instruction: for tests. Null where the compiler is too old for either.
const Engine<float>* emulated_amx();

}  // namespace fedkernels
