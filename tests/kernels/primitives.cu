// Each primitive of a warp on its own, in the open: registers in, registers out.
#include "device.h"

namespace fedkernels {
namespace {

struct Registers {
  const uint32_t *matrices, *a, *b;
  uint32_t *loaded, *transposed;
  float* d;
};

// One block of one warp: `matrices` are four of 8×8 halves, the rest is [lane][register].
KERNEL(32) primitives_kernel(GRID_CONSTANT Registers given) {
  const int lane = thread_index();
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = 0; i < 4; ++i) shared[lane * 4 + i] = given.matrices[lane * 4 + i];
  sync_block();
  uint32_t loaded[4], transposed[4];
  ldmatrix(loaded, shared + lane * 4);
  ldmatrix_transposed(transposed, shared + lane * 4);
  for (int i = 0; i < 4; ++i) {
    given.loaded[lane * 4 + i] = loaded[i];
    given.transposed[lane * 4 + i] = transposed[i];
  }
  uint32_t a[4];
  float d[4] = {};
  for (int i = 0; i < 4; ++i) a[i] = given.a[lane * 4 + i];
  mma(d, a, given.b[lane * 2], given.b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) given.d[lane * 4 + i] = d[i];
}

struct Halves {
  const float* values;
  uint32_t* packed;
  float* unpacked;
};

KERNEL(32) halves_kernel(GRID_CONSTANT Halves given) {
  const int i = block_index() * 32 + thread_index();
  given.packed[i] = pack_halves(given.values[2 * i], given.values[2 * i + 1]);
  unpack_halves(given.packed[i], given.unpacked[2 * i], given.unpacked[2 * i + 1]);
}

// Every thread reads what its neighbour wrote: with a barrier in between, or without one.
struct Ring {
  int* values;
  int barrier;
};

KERNEL(64) ring_kernel(GRID_CONSTANT Ring given) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  shared[thread_index()] = 0;
  sync_block();
  shared[thread_index()] = thread_index() + 1;
  if (given.barrier) sync_block();
  given.values[thread_index()] = shared[(thread_index() + 33) % 64];
}

// Half of the threads wait where the others never come.
KERNEL(64) stuck_kernel(GRID_CONSTANT Ring given) {
  if (thread_index() < 32) shuffle_xor(0, 1);
  if (thread_index() % 2) shuffle_xor(0, 1);
  given.values[thread_index()] = 0;
}

KERNEL(32) overrun_kernel(GRID_CONSTANT Ring) { shared_memory()[256 + thread_index()] = 0; }

}  // namespace
}  // namespace fedkernels

using namespace fedkernels;

extern "C" int run_primitives(const uint32_t* matrices, const uint32_t* a, const uint32_t* b, uint32_t* loaded,
                              uint32_t* transposed, float* d) {
  return launch(primitives_kernel, Registers{matrices, a, b, loaded, transposed, d}, 1, 1, 32, 512, nullptr);
}
extern "C" int run_halves(const float* values, uint32_t* packed, float* unpacked, int pairs) {
  return launch(halves_kernel, Halves{values, packed, unpacked}, pairs / 32, 1, 32, 0, nullptr);
}
extern "C" int run_ring(int* values, int barrier) {
  return launch(ring_kernel, Ring{values, barrier}, 1, 1, 64, 256, nullptr);
}
extern "C" int run_stuck(int* values) { return launch(stuck_kernel, Ring{values, 0}, 1, 1, 64, 256, nullptr); }
extern "C" int run_overrun() { return launch(overrun_kernel, Ring{}, 1, 1, 32, 256, nullptr); }
