// What the loop is made of: products, and what brings their factors into order. In products.cc, since they take another
// optimisation than the rest of the loop.

#pragma once

#include <vector>

#include "vectors.h"

#pragma GCC visibility push(hidden)

// Rows of a block of the product: 2 MR accumulators.
#if defined(__AVX512F__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif

// C (rows, UB) = init + A B, with A (rows, K) at a stride and B a packed panel (K, UB); no init is zero. Any number of
// rows, in blocks as even as can be; `next` is the panel after this one, where it is far.
void multiply(long rows, long K, const float* A, long lda, const float* B, const float* init, long ldi, float* C,
              long ldc, const float* next = nullptr);

// C (rows, count * UB) = init + A B for consecutive panels (K, UB) of a long K, in parts of it: so that what all panels
// read of A stays in a near cache.
void multiply_long(long rows, long K, const float* A, long lda, const float* B, long count, const float* init, long ldi,
                   float* C, long ldc);

// C (M, UB) = init + A B for at most MR rows, of which A holds K columns side by side.
void multiply_strip(int M, long K, const float* A, const float* B, const float* init, long ldi, float* C, long ldc);

// Where panels of a product of few rows begin and end: offsets from the pointers that it is given.
struct Panels {
  std::vector<long> from, to;  // from: of init, or none (-1), which is zero
};

// The same for at most FEW rows, whose accumulators for one panel are too few to wait for: several panels, K * UB apart,
// at once.
constexpr int FEW = 3;
void narrow(long rows, long K, const float* A, long lda, const float* B, const Panels& at, long count,
            const float* init, long ldi, float* C, long ldc);

// C += A B for at most FEW rows and B as it is given: K rows at a stride, in which each of `gates` has `units` columns.
// C has blocks of units, `to` from one to the next and of each gate at its own place.
void stream(long rows, long K, const float* A, long lda, const float* B, long stride, long gates, long units,
            long blocks, float* C, long ldc, long to, const int* place);

// to (rows, m) = from (rows, m) at a stride, times a mask at the same stride or null.
void gather(long rows, long m, const float* from, long stride, const float* mask, float* to);

// to (rows, UB) = from (rows, UB) at a stride; and the sums over rows (UB), or null.
void gather_block(long rows, const float* from, long stride, float* to, float* sums);

// A panel (K, UB) of n columns of w (K, n) at a stride; zeros where there is no column.
void pack_columns(long n, long K, const float* w, long stride, float* out);

// A panel (UB, UB) of the transpose of w (n, units) at a stride; zeros where there is nothing.
void pack_rows(long n, long units, const float* w, long stride, float* out);

#pragma GCC visibility pop
