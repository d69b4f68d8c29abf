// Sums over clients in two 64-bit integers a number; see fedkernels/kernels/exact_sum.
#pragma once

#include "rows.h"

namespace fedkernels {

// Add `split(weight · row)` to the coarse and the fine sums; returns the largest magnitude, infinite where one is NaN.
double exact_add(int64_t n, const float* row, double weight, int64_t* high, int64_t* low);
double exact_add(int64_t n, const double* row, double weight, int64_t* high, int64_t* low);

// The numbers that sums stand for.
void exact_value(int64_t n, const int64_t* high, const int64_t* low, double* to);

}  // namespace fedkernels
