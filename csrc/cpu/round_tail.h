// The tail of a round: messages of clients, and sums over clients. Functions work on a part of one client's message, or
// on neighbouring columns of all clients.
#pragma once

#include "rows.h"

namespace fedkernels {

// What of a client's row is sent: span `s` of the row begins at `begins[s]` and ends at `ends[s]` in the message. Without
// a table the whole row is.
struct Spans {
  const int64_t *begins, *ends;
  int64_t count, size;  // spans, and values of the message
};

// One client's rows; null pointers are options that are not used. A value is `(values − x) + residual`.
template <class T>
struct Sent {
  Spans spans;
  const T *values, *x;
  T *residual, *decoded;
};

// Of which numbers the rounding of a message is drawn: Philox4x32-10 under `key`, word `p mod 4` of the counter
// `(p div 4, client, wire)` for position `p`.
struct Draws {
  uint64_t key;
  uint32_t client, wire;
};

// Add `weights[c] · rows[c]` in the order of clients; clients of weight 0 are not read.
template <class S, class R>
struct Weighted {
  const R* const* rows;
  const S* weights;
  int64_t clients;
};

// Elements of a message that are worked on at once, in the cache nearest to the core.
constexpr int64_t kMessageTile = 1024;

#define FEDKERNELS_DECLARE(T)                                                                                      \
  void encode_int8(int64_t first, int64_t size, int64_t chunk, const Draws&, const Sent<T>&, int8_t* q, float* scale); \
  void encode_bf16(int64_t first, int64_t size, const Sent<T>&, Bf16* payload);                                    \
  void accumulate(int64_t first, int64_t size, const Weighted<float, T>&, float* sums);                            \
  void accumulate(int64_t first, int64_t size, const Weighted<double, T>&, double* sums);
FEDKERNELS_DECLARE(float)
FEDKERNELS_DECLARE(double)
#undef FEDKERNELS_DECLARE

}  // namespace fedkernels
