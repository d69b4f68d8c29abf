#include "exact_sum.h"

#include <cmath>
#include <limits>

namespace fedkernels {
namespace {

constexpr double kHigh = 0x1p26, kBelow = 0x1p43;  // the coarse grid is 2⁻²⁶, the fine one 2⁻⁶⁹
constexpr double kClamp = 0x1p62;                  // what is too large will be refused, but must not be undefined

template <class R>
INLINE double add(int64_t n, const R* __restrict row, double weight, int64_t* __restrict high,
                  int64_t* __restrict low) {
  // As an integer: so compared, NaN is larger than infinity and infinity than any number.
  int64_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double t = weight * static_cast<double>(row[i]);
    int64_t bits;
    std::memcpy(&bits, &t, sizeof bits);
    bits &= std::numeric_limits<int64_t>::max();
    most = bits > most ? bits : most;
    double scaled = t * kHigh;
    scaled = scaled > -kClamp ? scaled : -kClamp;  // NaN too
    scaled = scaled < kClamp ? scaled : kClamp;
    const double h = std::nearbyint(scaled);
    high[i] += static_cast<int64_t>(h);
    low[i] += static_cast<int64_t>(std::nearbyint((scaled - h) * kBelow));
  }
  double largest;
  std::memcpy(&largest, &most, sizeof largest);
  return largest == largest ? largest : std::numeric_limits<double>::infinity();
}

INLINE void read(int64_t n, const int64_t* __restrict high, const int64_t* __restrict low, double* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t h = high[i] + (low[i] >> 43), l = low[i] & ((int64_t{1} << 43) - 1);
    const bool negative = h < 0;
    if (negative) h = -h - (l > 0), l = -l & ((int64_t{1} << 43) - 1);
    // Each of the three parts is a double without rounding.
    const int64_t rest = h & 0xFFFFFFFF, top = h - rest;
    const double below = static_cast<double>(rest) + static_cast<double>(l) / kBelow;
    const double magnitude = (static_cast<double>(top) + below) / kHigh;
    to[i] = negative ? -magnitude : magnitude;
  }
}

}  // namespace

CLONES void exact_value(int64_t n, const int64_t* high, const int64_t* low, double* to) { read(n, high, low, to); }
CLONES double exact_add(int64_t n, const float* row, double weight, int64_t* high, int64_t* low) {
  return add(n, row, weight, high, low);
}
CLONES double exact_add(int64_t n, const double* row, double weight, int64_t* high, int64_t* low) {
  return add(n, row, weight, high, low);
}

}  // namespace fedkernels
