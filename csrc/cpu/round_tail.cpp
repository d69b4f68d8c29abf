// Messages of clients in one pass over memory (delta, error feedback, int8 or bfloat16, what was lost), and sums of them.
#include "round_tail.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fedkernels {
namespace {

// Call `work(offset, column, length)` for the runs of a row that lie side by side at `[first, first + size)` of a message.
template <class F>
INLINE void for_each_run(const Spans& spans, int64_t first, int64_t size, const F& work) {
  if (!spans.ends) return work(int64_t{0}, first, size);
  const int64_t* end = std::upper_bound(spans.ends, spans.ends + spans.count, first);
  for (int64_t done = 0; done < size; ++end) {
    const int64_t at = first + done, length = std::min(*end - at, size - done), span = end - spans.ends;
    work(done, spans.begins[span] + at - (span ? spans.ends[span - 1] : 0), length);
    done += length;
  }
}

template <class T>
INLINE void gather(const Sent<T>& sent, int64_t first, int64_t size, T* __restrict v) {
  for_each_run(sent.spans, first, size, [&](int64_t to, int64_t from, int64_t length) {
    const T* __restrict values = sent.values + from;
    if (sent.x) {
      const T* __restrict x = sent.x + from;
      for (int64_t i = 0; i < length; ++i) v[to + i] = values[i] - x[i];
    } else {
      std::memcpy(v + to, values, length * sizeof(T));
    }
    if (!sent.residual) return;
    const T* __restrict residual = sent.residual + from;
    for (int64_t i = 0; i < length; ++i) v[to + i] += residual[i];
  });
}

// Write what the server makes of values `v`, and what it lost of them.
template <class T>
INLINE void scatter(const Sent<T>& sent, int64_t first, int64_t size, const T* v, const T* received) {
  for_each_run(sent.spans, first, size, [&](int64_t from, int64_t to, int64_t length) {
    if (sent.decoded) std::memcpy(sent.decoded + to, received + from, length * sizeof(T));
    if (!sent.residual) return;
    T* __restrict residual = sent.residual + to;
    for (int64_t i = 0; i < length; ++i) residual[i] = v[from + i] - received[from + i];
  });
}

// Words of the counters from `counter` on, in their order. Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
// SC 2011. Rounds are unrolled, so that the compiler makes vectors of counters.
INLINE void philox(uint64_t counter, int64_t counters, const Draws& draws, uint32_t* __restrict words) {
  for (int64_t i = 0; i < counters; ++i) {
    const uint64_t at = counter + static_cast<uint64_t>(i);
    uint32_t a = static_cast<uint32_t>(at), b = static_cast<uint32_t>(at >> 32), c = draws.client, d = draws.wire;
    uint32_t low = static_cast<uint32_t>(draws.key), high = static_cast<uint32_t>(draws.key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p = uint64_t{0xD2511F53} * a, q = uint64_t{0xCD9E8D57} * c;
      a = static_cast<uint32_t>(q >> 32) ^ b ^ low;
      b = static_cast<uint32_t>(q);
      c = static_cast<uint32_t>(p >> 32) ^ d ^ high;
      d = static_cast<uint32_t>(p);
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
    words[4 * i] = a;
    words[4 * i + 1] = b;
    words[4 * i + 2] = c;
    words[4 * i + 3] = d;
  }
}

// The words of `size` positions from `first` on; some before and behind are made as well.
struct Words {
  static constexpr int64_t kTogether = 16;  // counters of the widest vectors
  alignas(64) uint32_t memory[kMessageTile + 4 + 4 * kTogether];

  INLINE const uint32_t* draw(const Draws& draws, int64_t first, int64_t size) {
    const int64_t begin = first / 4, end = (first + size + 3) / 4;
    philox(begin, (end - begin + kTogether - 1) / kTogether * kTogether, draws, memory);
    return memory + first % 4;
  }
};

template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Bits = int32_t;
};
template <>
struct Magnitude<double> {
  using Bits = int64_t;
};

// The largest magnitude, as an integer: so compared, NaN is larger than infinity and infinity than any number.
template <class T>
INLINE T largest(int64_t size, const T* __restrict v) {
  using Bits = typename Magnitude<T>::Bits;
  Bits most = 0;
  for (int64_t i = 0; i < size; ++i) {
    Bits bits;
    std::memcpy(&bits, v + i, sizeof bits);
    most = std::max<Bits>(most, bits & std::numeric_limits<Bits>::max());
  }
  T value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

// `max|v|/127` within the normal numbers of float32; NaN where a value is not finite, so that no scale hides it.
template <class T>
INLINE float scale_of(T most) {
  constexpr T low = std::numeric_limits<float>::min(), high = std::numeric_limits<float>::max() / 128;
  if (!(most <= std::numeric_limits<T>::max())) return std::numeric_limits<float>::quiet_NaN();
  return static_cast<float>(std::min(std::max(most / 127, low), high));
}

// `q = ⌊v/s⌋`, and one more where u, uniform in (0, 1), is below the fraction.
template <class T>
INLINE void quantise(int64_t size, float scale, const uint32_t* __restrict words, const T* __restrict v,
                     int8_t* __restrict q, T* __restrict received) {
  const T s = scale;
  if (scale != scale) {
    for (int64_t i = 0; i < size; ++i) q[i] = 0, received[i] = s;
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const T t = std::min(std::max(v[i] / s, T(-127)), T(127)), low = std::floor(t);
    // Twenty-four bits of which the last is set: exact, and as often below a half as above.
    const T u = static_cast<T>(static_cast<int32_t>(words[i] >> 8 | 1)) * T(1.0 / (1 << 24));
    const T level = low + (u < t - low ? T(1) : T(0));
    received[i] = level * s;
    q[i] = static_cast<int8_t>(static_cast<int32_t>(level));
  }
}

template <class T>
INLINE void run_int8(int64_t first, int64_t size, int64_t chunk, const Draws& draws, const Sent<T>& sent, int8_t* q,
                     float* scales) {
  alignas(64) T v[kMessageTile];
  alignas(64) T received[kMessageTile];
  alignas(64) int8_t own[kMessageTile];
  Words words;
  const int64_t stop = first + size;
  const auto round = [&](int64_t tile, int64_t k, int64_t n, float scale, const uint32_t* drawn) {
    const int64_t i = k - tile;
    quantise(n, scale, drawn + i, v + i, q ? q + k : own, received + i);
    if (scales && k % chunk == 0) scales[k / chunk] = scale;
  };
  if (chunk <= kMessageTile) {
    const int64_t step = kMessageTile / chunk * chunk;
    for (int64_t tile = first; tile < stop; tile += step) {
      const int64_t length = std::min(step, stop - tile);
      gather(sent, tile, length, v);
      const uint32_t* drawn = words.draw(draws, tile, length);
      for (int64_t k = tile; k < tile + length; k += chunk) {
        const int64_t n = std::min(chunk, tile + length - k);
        round(tile, k, n, scale_of(largest(n, v + (k - tile))), drawn);
      }
      scatter(sent, tile, length, v, received);
    }
    return;
  }
  for (int64_t k = first; k < stop; k += chunk) {
    const int64_t end = std::min(k + chunk, stop);
    T most = 0;
    for (int64_t tile = k; tile < end; tile += kMessageTile) {
      const int64_t length = std::min(kMessageTile, end - tile);
      gather(sent, tile, length, v);
      if (const T here = largest(length, v); !(here <= most)) most = here;
      if (most != most) break;
    }
    const float scale = scale_of(most);
    for (int64_t tile = k; tile < end; tile += kMessageTile) {
      const int64_t length = std::min(kMessageTile, end - tile);
      gather(sent, tile, length, v);
      round(tile, tile, length, scale, words.draw(draws, tile, length));
      scatter(sent, tile, length, v, received);
    }
  }
}

// To the nearest, ties to even; every NaN becomes the one that torch writes.
INLINE Bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded)};
}

template <class T>
INLINE void run_bf16(int64_t first, int64_t size, const Sent<T>& sent, Bf16* payload) {
  alignas(64) T v[kMessageTile];
  alignas(64) T received[kMessageTile];
  for (int64_t tile = first; tile < first + size; tile += kMessageTile) {
    const int64_t length = std::min(kMessageTile, first + size - tile);
    gather(sent, tile, length, v);
    for (int64_t i = 0; i < length; ++i) received[i] = widen(narrow(static_cast<float>(v[i])));
    if (payload)
      for (int64_t i = 0; i < length; ++i) payload[tile + i] = narrow(static_cast<float>(v[i]));
    scatter(sent, tile, length, v, received);
  }
}

// A tile of the sums stays in the nearest cache while the rows of all clients pass.
template <class S, class R>
INLINE void add(int64_t first, int64_t size, const Weighted<S, R>& sent, S* sums) {
  constexpr int64_t kSums = 512;
  for (int64_t tile = first; tile < first + size; tile += kSums) {
    const int64_t length = std::min(kSums, first + size - tile);
    S* __restrict to = sums + tile;
    for (int64_t c = 0; c < sent.clients; ++c) {
      const S weight = sent.weights[c];
      if (weight == 0) continue;
      const R* __restrict row = sent.rows[c] + tile;
      for (int64_t i = 0; i < length; ++i) to[i] += weight * static_cast<S>(row[i]);
    }
  }
}

}  // namespace

#define FEDKERNELS_DEFINE(T)                                                                                           \
  CLONES void encode_int8(int64_t first, int64_t size, int64_t chunk, const Draws& d, const Sent<T>& s, int8_t* q,     \
                          float* scale) {                                                                              \
    run_int8(first, size, chunk, d, s, q, scale);                                                                      \
  }                                                                                                                    \
  CLONES void encode_bf16(int64_t first, int64_t size, const Sent<T>& s, Bf16* payload) {                              \
    run_bf16(first, size, s, payload);                                                                                 \
  }                                                                                                                    \
  CLONES void accumulate(int64_t first, int64_t size, const Weighted<float, T>& w, float* to) { add(first, size, w, to); } \
  CLONES void accumulate(int64_t first, int64_t size, const Weighted<double, T>& w, double* to) { add(first, size, w, to); }
FEDKERNELS_DEFINE(float)
FEDKERNELS_DEFINE(double)
#undef FEDKERNELS_DEFINE

}  // namespace fedkernels
