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

}  // namespace

CLONES double exact_add(int64_t n, const float* row, double weight, int64_t* high, int64_t* low) {
  return add(n, row, weight, high, low);
}
CLONES double exact_add(int64_t n, const double* row, double weight, int64_t* high, int64_t* low) {
  return add(n, row, weight, high, low);
}

}  // namespace fedkernels
