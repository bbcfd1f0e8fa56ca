// The matmuls of the loop, and the functions that arrange their factors in memory. They are in products.cc by
// themselves because they are compiled with more optimisation than the rest of the loop.

#pragma once

#include <vector>

#include "vectors.h"

#pragma GCC visibility push(hidden)

// The rows of a block of the product, which has 2 MR accumulators.
#if defined(__AVX512F__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif

// C (rows, UB) = init + A B, with A (rows, K) at a stride and B a packed panel (K, UB). A null init is zero. Any number
// of rows, in blocks of nearly equal size. `next` is the panel to prefetch, if it is far away.
void multiply(long rows, long K, const float* A, long lda, const float* B, const float* init, long ldi, float* C,
              long ldc, const float* next = nullptr);

// C (rows, count * UB) = init + A B for consecutive panels (K, UB) with a long K. K is cut into parts, so that the part
// of A that all panels read stays in a near cache.
void multiply_long(long rows, long K, const float* A, long lda, const float* B, long count, const float* init, long ldi,
                   float* C, long ldc);

// C (M, UB) = init + A B for at most MR rows, where A is stored column by column (K, M).
void multiply_strip(int M, long K, const float* A, const float* B, const float* init, long ldi, float* C, long ldc);

// The offsets at which a product of few rows reads init (`from`) and writes C (`to`), for each panel.
struct Panels {
  std::vector<long> from, to;  // a `from` of -1 stands for an init of zero
};

// The same product for at most FEW rows. One panel has too few accumulators to hide the latency of the multiplications,
// so several panels, K * UB apart, are computed at once.
constexpr int FEW = 3;
void narrow(long rows, long K, const float* A, long lda, const float* B, const Panels& at, long count,
            const float* init, long ldi, float* C, long ldc);

// C += A B for at most FEW rows and B unpacked: K rows at a stride, in which each of `gates` has `units` columns. C has
// blocks of units, `to` apart, and in each block the gates at the indices `place`.
void stream(long rows, long K, const float* A, long lda, const float* B, long stride, long gates, long units,
            long blocks, float* C, long ldc, long to, const int* place);

// to (rows, m) = from (rows, m) at a stride, times the mask at the same stride, unless that is null.
void gather(long rows, long m, const float* from, long stride, const float* mask, float* to);

// to (rows, UB) = from (rows, n) + b (UB), both at strides; columns of `from` beyond n are zero.
void add_columns(long rows, long n, const float* from, long stride, const float* b, float* to, long ldt);

// to (rows, UB) = from (rows, UB) at a stride; sums (UB), unless null, are the sums over rows.
void gather_block(long rows, const float* from, long stride, float* to, float* sums);

// A panel (K, UB) from the columns of w (K, n) at a stride, padded with zeros.
void pack_columns(long n, long K, const float* w, long stride, float* out);

// A panel (UB, UB) from the transpose of w (n, units) at a stride, padded with zeros.
void pack_rows(long n, long units, const float* w, long stride, float* out);

#pragma GCC visibility pop
