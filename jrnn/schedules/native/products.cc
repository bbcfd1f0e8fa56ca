// See products.h.

#include "products.h"

#include <algorithm>
#include <cstring>

namespace {

// The layout of a block of rows of the left factor (M, K): rows at a stride, or stored column by column.
struct Rows {
  long stride;
  long at(long r, long k, int) const { return r * stride + k; }
};
struct Strip {
  long at(long r, long k, int M) const { return k * M + r; }
};

// The memory that a block of the product prefetches into the second cache, because it is read next.
struct Ahead {
  const float* next = nullptr;
  long lines = 0;  // cache lines of 64 bytes, for every STRIP of K
};
constexpr long STRIP = 32;

// Keeps a value in a register, which compilers would otherwise load again for every use.
inline void keep(vf& v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
}

// C (M, UB) = init + A B, with B a packed panel (K, UB). A null init is zero.
template <int M, class Left>
inline void block(long K, const float* A, Left left, const float* B, const float* init, long ldi, float* C, long ldc,
                  Ahead ahead) {
  vf acc[M][2];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    acc[r][0] = init ? load(init + r * ldi) : vf{};
    acc[r][1] = init ? load(init + r * ldi + VL) : vf{};
  }
  for (long k = 0; k < K;) {
    for (long i = 0; i < ahead.lines; ++i, ahead.next += 16) __builtin_prefetch(ahead.next, 0, 2);
    const long end = std::min(K, k + STRIP);
#pragma GCC unroll 4
    for (; k < end; ++k) {
      vf b0 = load(B + k * UB), b1 = load(B + k * UB + VL);
      keep(b0), keep(b1);
#pragma GCC unroll 12
      for (int r = 0; r < M; ++r) {
        const vf a = splat(A[left.at(r, k, M)]);
        acc[r][0] += a * b0;
        acc[r][1] += a * b1;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    store(C + r * ldc, acc[r][0]);
    store(C + r * ldc + VL, acc[r][1]);
  }
}

template <class Left, int M = MR>
inline void blocks(int rows, long K, const float* A, Left left, const float* B, const float* init, long ldi, float* C,
                   long ldc, Ahead ahead = {}) {
  if constexpr (M > 0) {
    if (rows == M)
      block<M>(K, A, left, B, init, ldi, C, ldc, ahead);
    else
      blocks<Left, M - 1>(rows, K, A, left, B, init, ldi, C, ldc, ahead);
  }
}

// P panels at once. Each product is the sum of S partial sums, one over every S-th k.
template <int M, int P, int S>
inline void narrow(long K, const float* A, long lda, const float* B, const Panels& at, long p, const float* init,
                   long ldi, float* C, long ldc) {
  const long *from = &at.from[p], *to = &at.to[p];
  vf acc[S][P][M][2];
#pragma GCC unroll 4
  for (int q = 0; q < P; ++q)
#pragma GCC unroll 3
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        acc[0][q][r][v] = from[q] < 0 ? vf{} : load(init + from[q] + r * ldi + v * VL);
#pragma GCC unroll 4
        for (int s = 1; s < S; ++s) acc[s][q][r][v] = vf{};
      }
  const auto add = [&](vf(&sums)[P][M][2], long k) __attribute__((always_inline)) {
#pragma GCC unroll 3
    for (int r = 0; r < M; ++r) {
      const vf a = splat(A[r * lda + k]);
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sums[q][r][v] += a * load(B + ((p + q) * K + k) * UB + v * VL);
    }
  };
  long k = 0;
  for (; k + S <= K; k += S)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) add(acc[s], k + s);
  for (; k < K; ++k) add(acc[0], k);
#pragma GCC unroll 4
  for (int q = 0; q < P; ++q)
#pragma GCC unroll 3
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        vf sum = acc[0][q][r][v];
#pragma GCC unroll 4
        for (int s = 1; s < S; ++s) sum += acc[s][q][r][v];
        store(C + to[q] + r * ldc + v * VL, sum);
      }
}

template <int M>
void narrow(long K, const float* A, long lda, const float* B, const Panels& at, long count, const float* init, long ldi,
            float* C, long ldc) {
  constexpr int P = M == 1 ? 4 : 2;
  long p = 0;
  for (; p + P <= count; p += P) narrow<M, P, 1>(K, A, lda, B, at, p, init, ldi, C, ldc);
  if (P > 2 && p + 2 <= count) narrow<M, 2, 2>(K, A, lda, B, at, p, init, ldi, C, ldc), p += 2;
  if (p < count) narrow<M, 1, P>(K, A, lda, B, at, p, init, ldi, C, ldc);
}

// B is read once, in order, R rows at a time.
template <int M, int R>
void stream(long K, const float* A, long lda, const float* B, long stride, long gates, long units, long blocks, float* C,
            long ldc, long to, const int* place) {
  for (long k = 0; k + R <= K; k += R) {
    vf a[M][R];
#pragma GCC unroll 3
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) a[r][i] = splat(A[r * lda + k + i]);
    for (long g = 0; g < gates; ++g)
      for (long b = 0; b < blocks; ++b)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const float* row = B + k * stride + g * units + b * UB + v * VL;
          float* c = C + b * to + place[g] * UB + v * VL;
          vf sum[M];
#pragma GCC unroll 3
          for (int r = 0; r < M; ++r) sum[r] = load(c + r * ldc);
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) {
            const vf w = load(row + i * stride);
#pragma GCC unroll 3
            for (int r = 0; r < M; ++r) sum[r] += a[r][i] * w;
          }
#pragma GCC unroll 3
          for (int r = 0; r < M; ++r) store(c + r * ldc, sum[r]);
        }
  }
  if constexpr (R > 1) {
    const long whole = K / R * R;
    stream<M, 1>(K - whole, A + whole, lda, B + whole * stride, stride, gates, units, blocks, C, ldc, to, place);
  }
}

}  // namespace

void multiply(long rows, long K, const float* A, long lda, const float* B, const float* init, long ldi, float* C,
              long ldc, const float* next) {
  if (rows <= 0) return;  // a thread's share is empty if there are fewer rows than threads
  const long count = (rows + MR - 1) / MR, strips = (K + STRIP - 1) / STRIP;
  const long lines = next ? (STRIP * UB / 16 + count - 1) / count : 0;
  for (long i = 0, r = 0; i < count; ++i) {
    const long m = (rows - r) / (count - i);
    blocks(m, K, A + r * lda, Rows{lda}, B, init ? init + r * ldi : nullptr, ldi, C + r * ldc, ldc,
           Ahead{next + i * strips * lines * 16, lines});
    r += m;
  }
}

void multiply_long(long rows, long K, const float* A, long lda, const float* B, long count, const float* init, long ldi,
                   float* C, long ldc) {
  const long parts = (K + 511) / 512;
  for (long part = 0, k = 0; part < parts; ++part) {
    const long depth = (K - k) / (parts - part);
    for (long p = 0; p < count; ++p)
      multiply(rows, depth, A + k, lda, B + (p * K + k) * UB, init ? init + p * UB : nullptr, ldi, C + p * UB, ldc,
               B + (p + 1 < count ? (p + 1) * K + k : k + depth) * UB);
    init = C, ldi = ldc;
    k += depth;
  }
}

void multiply_strip(int M, long K, const float* A, const float* B, const float* init, long ldi, float* C, long ldc) {
  blocks(M, K, A, Strip{}, B, init, ldi, C, ldc);
}

void narrow(long rows, long K, const float* A, long lda, const float* B, const Panels& at, long count,
            const float* init, long ldi, float* C, long ldc) {
  if (rows == 1) narrow<1>(K, A, lda, B, at, count, init, ldi, C, ldc);
  if (rows == 2) narrow<2>(K, A, lda, B, at, count, init, ldi, C, ldc);
  if (rows == 3) narrow<3>(K, A, lda, B, at, count, init, ldi, C, ldc);
}

void stream(long rows, long K, const float* A, long lda, const float* B, long stride, long gates, long units,
            long blocks, float* C, long ldc, long to, const int* place) {
  if (rows == 1) stream<1, 8>(K, A, lda, B, stride, gates, units, blocks, C, ldc, to, place);
  if (rows == 2) stream<2, 4>(K, A, lda, B, stride, gates, units, blocks, C, ldc, to, place);
  if (rows == 3) stream<3, 4>(K, A, lda, B, stride, gates, units, blocks, C, ldc, to, place);
}

void gather(long rows, long m, const float* from, long stride, const float* mask, float* to) {
  for (long r = 0; r < rows; ++r, from += stride, to += m)
    for (long j = 0; j < m; ++j) to[j] = mask ? from[j] * mask[r * stride + j] : from[j];
}

void add_columns(long rows, long n, const float* from, long stride, const float* b, float* to, long ldt) {
  for (long r = 0; r < rows; ++r, from += stride, to += ldt)
    for (long j = 0; j < UB; j += VL) store(to + j, load(from + j, n - j) + load(b + j));
}

void gather_block(long rows, const float* from, long stride, float* to, float* sums) {
  vf sum[2] = {};
  for (long r = 0; r < rows; ++r)
    for (int v = 0; v < 2; ++v) {
      const vf x = load(from + r * stride + v * VL);
      store(to + r * UB + v * VL, x);
      sum[v] += x;
    }
  if (sums) std::memcpy(sums, sum, sizeof sum);
}

void pack_columns(long n, long K, const float* w, long stride, float* out) {
  for (long k = 0; k < K; ++k, w += stride, out += UB) {
    if (n == UB)
      std::memcpy(out, w, 4 * UB);
    else
      for (long j = 0; j < UB; ++j) out[j] = j < n ? w[j] : 0.0f;
  }
}

void pack_rows(long n, long units, const float* w, long stride, float* out) {
  for (long c = 0; c < UB; ++c, ++w, out += UB)
    for (long j = 0; j < UB; ++j) out[j] = j < n && c < units ? w[j * stride] : 0.0f;
}
