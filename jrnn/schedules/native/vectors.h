// Vectors of floats of this processor's width, and functions of them. It includes no headers, so a cell compiles fast.

#pragma once

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr int UB = 2 * VL;

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int vi __attribute__((vector_size(4 * VL)));
typedef unsigned vu __attribute__((vector_size(4 * VL)));

inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, also for -0
inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n lanes, followed by zeros.
inline vf load(const float* p, long n) {
  if (n >= VL) return load(p);
  vf v = {};
  for (long i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store(float* p, vf v, long n) {
  if (n >= VL) return store(p, v);
  for (long i = 0; i < n; ++i) p[i] = v[i];
}
inline vf first(vf v, long n) {
  for (long i = n < 0 ? 0 : n; i < VL; ++i) v[i] = 0;
  return v;
}

template <class Function>
inline vf each(Function f, vf x) {
  for (int i = 0; i < VL; ++i) x[i] = f(x[i]);
  return x;
}
template <class Function>
inline vf each(Function f, vf x, vf y) {
  for (int i = 0; i < VL; ++i) x[i] = f(x[i], y[i]);
  return x;
}

inline vf vabs(vf x) { return each([](float a) { return __builtin_fabsf(a); }, x); }

// 2^n for integers n in [-126, 127], and infinity for n = 128.
inline vf exp2i(vf n) {
  return (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

// The Taylor series of exp without its first term, up to r^7, at r = x - n log 2 in [-log(2)/2, log(2)/2]. The error is
// about one ulp.
inline vf series_m1(vf x, vf n) {
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * r * r + r;
}
inline vf series(vf x, vf n) { return series_m1(x, n) + 1.0f; }

inline vf rounded(vf x) { return (x + 12582912.0f) - 12582912.0f; }  // adding 1.5 * 2^23 rounds to an integer

inline vf vexp(vf x) {
  x = x > 89.0f ? splat(89.0f) : x;  // comparisons with NaN are false, so NaN stays
  x = x < -104.0f ? splat(-104.0f) : x;
  const vf n = rounded(x * 1.44269504f), half = rounded(n * 0.5f);
  return series(x, n) * exp2i(half) * exp2i(n - half);  // two factors, so that 2^n overflows and underflows like exp
}

// exp(x) - 1 = 2^n ((e^r - 1) + (1 - 2^-n)). Nothing cancels: where n is 0, only e^r - 1 is left.
inline vf vexpm1(vf x) {
  vf c = x > 89.0f ? splat(89.0f) : x;
  c = c < -20.0f ? splat(-20.0f) : c;
  const vf n = rounded(c * 1.44269504f), half = rounded(n * 0.5f);
  const vf rest = 1.0f - exp2i(n > 126.0f ? splat(-126.0f) : -n);
  return x == 0.0f ? x : (series_m1(c, n) + rest) * exp2i(half) * exp2i(n - half);  // -0 stays -0
}

// n log 2 + log m, for x = 2^n m with m in [sqrt(1/2), sqrt(2)). The polynomial is that of Cephes, and the error about
// one ulp. As in XLA, subnormal numbers are zeros.
inline vf vlog(vf x) {
  const vi n = ((vi)x - 0x3f3504f3) >> 23;
  const vf f = (vf)((vi)x - (n << 23)) - 1.0f, e = __builtin_convertvector(n, vf), square = f * f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf y = f + (p * square * f + e * -2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
  const vf in = x <= 3.4028235e38f ? y : x;  // infinity and NaN stay
  return x >= 1.17549435e-38f ? in : x > -1.17549435e-38f ? splat(-__builtin_inff()) : splat(__builtin_nanf(""));
}

// log u, with u = 1 + x, and what was rounded away there.
inline vf vlog1p(vf x) {
  const vf u = 1.0f + x, lost = (x - (u - 1.0f)) / u;
  const vf y = vlog(u) + ((vabs(u) <= 3.4028235e38f) & (u != 0.0f) ? lost : vf{});
  return x == 0.0f ? x : y;  // -0 stays -0
}

// XLA's result is zero below -87.34, where it would be subnormal. Here it is zero below -88.4, from 1 / (1 + inf).
inline vf vlogistic(vf x) {
  x = x > 87.0f ? splat(87.0f) : x;
  x = x < -89.0f ? splat(-89.0f) : x;
  const vf n = rounded(x * -1.44269504f);
  return 1.0f / (1.0f + series(-x, n) * exp2i(n));  // 2^128 has the bits of infinity
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr float TANH_LIMIT = 7.99881172180175781f;
inline vf vfma(vf a, vf b, float c) {  // one rounding, however the compiler treats a * b + c
  for (int i = 0; i < VL; ++i) a[i] = __builtin_fmaf(a[i], b[i], c);
  return a;
}
#else
constexpr float TANH_LIMIT = 7.90531110763549805f;
inline vf vfma(vf a, vf b, float c) { return a * b + c; }
#endif

// A quotient of an odd and an even polynomial, with an error of a few ulp. The coefficients and limits are those of
// Eigen and XLA. At the limit and beyond, the quotient is exactly 1, or 1 - h^2 would not be zero for a saturated gate.
// There are two limits, since fused multiplications round differently.
inline vf vtanh(vf x) {
  vf c = x > TANH_LIMIT ? splat(TANH_LIMIT) : x;  // comparisons with NaN are false, so NaN stays
  c = c < -TANH_LIMIT ? splat(-TANH_LIMIT) : c;
  const vf s = c * c;
  vf p = splat(-2.76076847742355e-16f);
  p = vfma(p, s, 2.00018790482477e-13f);
  p = vfma(p, s, -8.60467152213735e-11f);
  p = vfma(p, s, 5.12229709037114e-08f);
  p = vfma(p, s, 1.48572235717979e-05f);
  p = vfma(p, s, 6.37261928875436e-04f);
  p = vfma(p, s, 4.89352455891786e-03f);
  vf q = splat(1.19825839466702e-06f);
  q = vfma(q, s, 1.18534705686654e-04f);
  q = vfma(q, s, 2.26843463243900e-03f);
  q = vfma(q, s, 4.89352518554385e-03f);
  return vabs(x) < 4e-4f ? x : c * p / q;
}

inline vf vsqrt(vf x) { return each([](float a) { return __builtin_sqrtf(a); }, x); }
inline vf vsquare(vf x) { return x * x; }

// The result is NaN if an operand is, and 0 is greater than -0, as in XLA.
inline vf vmax(vf a, vf b) {
  const vf larger = a > b ? a : b, even = a == b ? (vf)((vi)a & (vi)b) : larger;
  return a != a ? a : even;
}
inline vf vmin(vf a, vf b) {
  const vf smaller = a < b ? a : b, even = a == b ? (vf)((vi)a | (vi)b) : smaller;
  return a != a ? a : even;
}
inline vi vmax(vi a, vi b) { return a > b ? a : b; }
inline vi vmin(vi a, vi b) { return a < b ? a : b; }
inline vu vmax(vu a, vu b) { return a > b ? a : b; }
inline vu vmin(vu a, vu b) { return a < b ? a : b; }
inline vf vsign(vf x) { return x > 0.0f ? splat(1) : (x < 0.0f ? splat(-1) : x); }


// Conversion to an integer, rounding towards zero. As in XLA, values out of range saturate, and NaN becomes 0.
inline vi vint(vf x) {
  const vf low = x > -2147483648.0f ? x : splat(-2147483648.0f), in = low < 2147483520.0f ? low : splat(2147483520.0f);
  const vi bits = __builtin_convertvector(in, vi);
  return x == x ? (x >= 2147483648.0f ? vi{} + 2147483647 : bits) : vi{};
}

// Rounding, half to even, to a format with these numbers of bits. As in XLA, values out of range become 0 or infinity.
template <int exponent_bits, int mantissa_bits>
inline vf vreduce(vf x) {
  constexpr int dropped = 23 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  vi bits = (vi)x;
  if (dropped > 0) {
    const vi last = (bits >> dropped) & 1;
    bits = (bits + (last + ((1 << (dropped - 1)) - 1))) & ~((1 << dropped) - 1);
  }
  if (exponent_bits < 8) {
    const vi size = bits & 0x7fffffff, sign = bits - size;
    bits = size > ((127 + bias) << 23 | (0x7fffff & ~((1 << dropped) - 1))) ? sign | 0x7f800000 : bits;
    bits = size < (127 - bias + 1) << 23 ? sign : bits;
  }
  return x == x ? (vf)bits : x;
}

}  // namespace
