// The primitives of device.h on a CPU. Threads of a cluster are fibers, run one at a time until each waits; operations of
// a warp take place when the last of its lanes arrives, with the fragments that the PTX manual documents for them.
//
// Nothing between two barriers may depend on the order of warps or lanes. `fedkernels_emulator_order` sets that order,
// so that a missing barrier shows as results that differ; shared memory starts as NaN and ends at guarded bytes.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define DEVICE inline
#define HOST_DEVICE inline
#define KERNEL(threads) void
#define GRID_CONSTANT const

namespace fedkernels {

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace emulator {

constexpr int kLanes = 32, kStackBytes = 64 << 10, kGuardBytes = 4 << 10;
constexpr unsigned char kPoison = 0xff;  // a NaN in every format

// IEEE binary16, rounded to nearest even.
inline uint16_t to_half(float value) {
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {  // a multiple of 2⁻²⁴, which adding 0.5 leaves in the low bits
    const float shifted = bits_float(magnitude) + 0.5f;
    return sign | (float_bits(shifted) - float_bits(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23);
  return sign | rounded >> 13;
}

inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | fraction << 13);
  const float magnitude = exponent ? bits_float((exponent + 112) << 23 | fraction << 13)
                                   : static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

enum class Waits { nothing, warp, block, cluster, gone };
enum class Collective { none, ldmatrix, ldmatrix_transposed, mma, shuffle };

struct Operands {
  uint32_t* r;
  const void* row;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  float value;
  int mask;
};

struct Fiber {
  Waits waits = Waits::nothing;
  bool started = false;
  jmp_buf at;
  ucontext_t entry;
  Collective collective = Collective::none;
  Operands* operands = nullptr;
};

// One cluster of blocks at work.
struct Machine {
  int blocks, threads, first_block;
  void (*body)(void*);
  void* arguments;
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  std::vector<char> memory;
  int shared_bytes, current = 0;
  jmp_buf scheduler;
  const char* error = nullptr;

  char* shared(int block) { return memory.data() + block * (shared_bytes + kGuardBytes); }
};

inline Machine*& machine() {
  static Machine* running = nullptr;
  return running;
}

inline int& order() {
  static int seed = 0;
  return seed;
}

inline float half_at(const uint32_t* registers, int i) {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) all[bits] = from_half(static_cast<uint16_t>(bits));
    return all;
  }();
  return table[registers[i / 2] >> (i % 2 * 16) & 0xffff];
}

// Lane l holds two neighbours of row l / 4, from column 2 (l mod 4) on, of each matrix; of its transpose likewise.
inline void run_ldmatrix(Operands** lanes, bool transposed) {
  for (int l = 0; l < kLanes; ++l)
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? l % 4 * 2 + e : l / 4, column = transposed ? l / 4 : l % 4 * 2 + e;
        pair[e] = static_cast<const uint16_t*>(lanes[matrix * 8 + row]->row)[column];
      }
      lanes[l]->r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

// PTX manual, fragments of mma.m16n8k16 with group = l / 4 and t = l mod 4: a_i is at row group + 8 (i mod 4 ≥ 2) and
// column 2t + i mod 2 + 8 (i ≥ 4); b_i at row 2t + i mod 2 + 8 (i ≥ 2) and column group; d_i at row group + 8 (i ≥ 2)
// and column 2t + i mod 2.
inline void run_mma(Operands** lanes) {
  float a[16][16], b[8][16];
  for (int l = 0; l < kLanes; ++l) {
    const int group = l / 4, t = l % 4;
    for (int i = 0; i < 8; ++i) a[group + 8 * (i % 4 >= 2)][2 * t + i % 2 + 8 * (i >= 4)] = half_at(lanes[l]->a, i);
    for (int i = 0; i < 4; ++i) b[group][2 * t + i % 2 + 8 * (i >= 2)] = half_at(lanes[l]->b, i);
  }
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i >= 2), column = l % 4 * 2 + i % 2;
      float products = 0;
      for (int k = 0; k < 16; ++k) products += a[row][k] * b[column][k];
      lanes[l]->d[i] += products;
    }
}

inline void run_shuffle(Operands** lanes) {
  float values[kLanes];
  for (int l = 0; l < kLanes; ++l) values[l] = lanes[l]->value;
  for (int l = 0; l < kLanes; ++l) lanes[l]->value = values[l ^ lanes[l]->mask];
}

inline void pause(Waits waits) {
  Machine& all = *machine();
  Fiber& fiber = all.fibers[all.current];
  fiber.waits = waits;
  if (!_setjmp(fiber.at)) _longjmp(all.scheduler, 1);
}

inline void fail(const char* error) {
  machine()->error = error;
  _longjmp(machine()->scheduler, 1);
}

// What a whole warp does together: the last lane to arrive does it for all.
inline void collective(Collective kind, Operands& operands) {
  Machine& all = *machine();
  Fiber* warp = &all.fibers[all.current / kLanes * kLanes];
  Fiber& fiber = all.fibers[all.current];
  fiber.collective = kind;
  fiber.operands = &operands;
  Operands* lanes[kLanes];
  bool complete = true;
  for (int l = 0; l < kLanes; ++l) {
    if (warp[l].collective != kind && warp[l].collective != Collective::none) fail("lanes of a warp went apart");
    complete = complete && warp[l].collective == kind;
    lanes[l] = warp[l].operands;
  }
  if (!complete) return pause(Waits::warp);
  switch (kind) {
    case Collective::ldmatrix: run_ldmatrix(lanes, false); break;
    case Collective::ldmatrix_transposed: run_ldmatrix(lanes, true); break;
    case Collective::mma: run_mma(lanes); break;
    case Collective::shuffle: run_shuffle(lanes); break;
    case Collective::none: break;
  }
  for (int l = 0; l < kLanes; ++l) {
    warp[l].collective = Collective::none;
    warp[l].waits = Waits::nothing;
  }
}

inline void begin() {
  Machine& all = *machine();
  all.body(all.arguments);
  all.fibers[all.current].waits = Waits::gone;
  _longjmp(all.scheduler, 1);
}

inline void resume(Machine& all, int thread) {
  Fiber& fiber = all.fibers[thread];
  all.current = thread;
  if (_setjmp(all.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = all.stacks.get() + static_cast<size_t>(thread) * kStackBytes;
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, begin, 0);
  setcontext(&fiber.entry);
}

// Let threads [first, last) go on if all that are not gone wait here, and one does.
inline bool release(Machine& all, int first, int last, Waits barrier) {
  bool any = false;
  for (int thread = first; thread < last; ++thread) {
    const Waits waits = all.fibers[thread].waits;
    if (waits != barrier && waits != Waits::gone) return false;
    any = any || waits == barrier;
  }
  for (int thread = first; any && thread < last; ++thread)
    if (all.fibers[thread].waits == barrier) all.fibers[thread].waits = Waits::nothing;
  return any;
}

// 0: forwards, 1: backwards, otherwise the seed of a new shuffle for every round.
inline std::vector<int> sequence(int n, std::mt19937& random) {
  std::vector<int> all(n);
  std::iota(all.begin(), all.end(), 0);
  if (order() == 1) std::reverse(all.begin(), all.end());
  if (order() > 1) std::shuffle(all.begin(), all.end(), random);
  return all;
}

// Until all lanes wait for others or are gone; whether one could move.
inline bool run_warp(Machine& all, int warp, std::mt19937& random) {
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int lane : sequence(kLanes, random))
      if (all.fibers[warp * kLanes + lane].waits == Waits::nothing) {
        resume(all, warp * kLanes + lane);
        if (all.error) throw std::runtime_error(all.error);
        moved = again = true;
      }
  }
  return moved;
}

inline void run(Machine& all) {
  std::mt19937 random(order());
  machine() = &all;
  const int threads = all.blocks * all.threads;
  for (bool alive = true; alive;) {
    bool moved = false;
    // A block goes as far as it can before the next one begins, which shows what a cluster does not wait for.
    for (int block : sequence(all.blocks, random)) {
      const int warps = all.threads / kLanes;
      do {
        for (int warp : sequence(warps, random)) moved |= run_warp(all, block * warps + warp, random);
      } while (release(all, block * all.threads, (block + 1) * all.threads, Waits::block));
    }
    moved |= release(all, 0, threads, Waits::cluster);
    alive = false;
    for (const Fiber& fiber : all.fibers) alive = alive || fiber.waits != Waits::gone;
    if (alive && !moved) throw std::runtime_error("deadlock: threads wait for others that never arrive");
  }
  for (int block = 0; block < all.blocks; ++block)
    for (int i = 0; i < kGuardBytes; ++i)
      if (static_cast<unsigned char>(all.shared(block)[all.shared_bytes + i]) != kPoison)
        throw std::runtime_error("shared memory was written beyond its end");
}

}  // namespace emulator

inline int thread_index() { return emulator::machine()->current % emulator::machine()->threads; }
inline int block_index() {
  const emulator::Machine& all = *emulator::machine();
  return all.first_block + all.current / all.threads;
}
inline char* shared_memory() {
  emulator::Machine& all = *emulator::machine();
  return all.shared(all.current / all.threads);
}

#ifdef FEDKERNELS_EMULATE_SM80
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

inline void sync_block() { emulator::pause(emulator::Waits::block); }
inline void sync_cluster() { emulator::pause(emulator::Waits::cluster); }

inline float shuffle_xor(float value, int mask) {
  emulator::Operands operands{};
  operands.value = value;
  operands.mask = mask;
  emulator::collective(emulator::Collective::shuffle, operands);
  return operands.value;
}

inline void load_matrices(emulator::Collective kind, uint32_t* r, const void* row) {
  const auto at = static_cast<const char*>(row) - shared_memory();
  if (at < 0 || at % 16 != 0 || at + 16 > emulator::machine()->shared_bytes)
    emulator::fail("ldmatrix of a row that is not 16 aligned bytes of the block's shared memory");
  emulator::Operands operands{};
  operands.r = r;
  operands.row = row;
  emulator::collective(kind, operands);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row) { load_matrices(emulator::Collective::ldmatrix, r, row); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices(emulator::Collective::ldmatrix_transposed, r, row);
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Operands operands{};
  operands.d = d;
  operands.a = a;
  operands.b[0] = b0;
  operands.b[1] = b1;
  emulator::collective(emulator::Collective::mma, operands);
}

inline uint32_t pack_halves(float low, float high) {
  return emulator::to_half(low) | static_cast<uint32_t>(emulator::to_half(high)) << 16;
}

inline void unpack_halves(uint32_t packed, float& low, float& high) {
  low = emulator::half_at(&packed, 0);
  high = emulator::half_at(&packed, 1);
}

inline float load_past_l1(const float* from) { return *from; }
inline Float4 load_past_l1(const Float4* from) { return *from; }
inline float square_root(float value) { return std::sqrt(value); }

template <class Arguments>
int compiled_for(void (*)(Arguments), int& arch) {
  arch = kClusters ? 90 : 80;
  return 0;
}

template <class Arguments>
int launch(void (*kernel)(Arguments), const Arguments& arguments, int blocks, int cluster, int threads,
           int shared_bytes, void*) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  } call{kernel, &arguments};
  try {
    for (int first = 0; first < blocks; first += cluster) {
      emulator::Machine all{};
      all.blocks = cluster;
      all.threads = threads;
      all.first_block = first;
      all.shared_bytes = shared_bytes;
      all.body = [](void* given) { static_cast<Call*>(given)->kernel(*static_cast<Call*>(given)->arguments); };
      all.arguments = &call;
      all.fibers.resize(cluster * threads);
      all.stacks.reset(new char[static_cast<size_t>(cluster) * threads * emulator::kStackBytes]);
      all.memory.assign(static_cast<size_t>(cluster) * (shared_bytes + emulator::kGuardBytes),
                        static_cast<char>(emulator::kPoison));
      emulator::run(all);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulator: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace fedkernels

extern "C" __attribute__((used)) inline void fedkernels_emulator_order(int order) {
  fedkernels::emulator::order() = order;
}
