// Vectors of floats as long as this processor's, and functions of them. No headers: a cell is compiled in no time.

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

inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, -0 too
inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n lanes, zeros after them.
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

// 2^n for integers n in [-126, 127].
inline vf exp2i(vf n) {
  vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  vf out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// The series of exp to the seventh power at r = x - n log 2, in [-log(2)/2, log(2)/2]: error about one ulp.
inline vf series(vf x, vf n) {
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * r * r + r + 1.0f;
}

inline vf rounded(vf x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: what is added to it is an integer

inline vf vexp(vf x) {
  x = x > 89.0f ? splat(89.0f) : x;  // comparisons with NaN are false: it stays
  x = x < -104.0f ? splat(-104.0f) : x;
  const vf n = rounded(x * 1.44269504f), half = rounded(n * 0.5f);
  return series(x, n) * exp2i(half) * exp2i(n - half);  // two factors: so 2^n overflows and underflows as exp does
}

inline vf vlogistic(vf x) {
  x = x > 87.0f ? splat(87.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const vf n = rounded(x * -1.44269504f);
  return 1.0f / (1.0f + series(-x, n) * exp2i(n));
}

// A quotient of odd and even polynomials on [-7.9, 7.9], where tanh reaches 1 in float32: error a few ulp. The
// coefficients are those of Eigen and XLA.
inline vf vtanh(vf x) {
  const float limit = 7.90531110763549805f;
  vf c = x > limit ? splat(limit) : x;
  c = c < -limit ? splat(-limit) : c;
  const vf s = c * c;
  vf p = splat(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  const vf small = (x < 4e-4f) & (x > -4e-4f) ? x : c * p / q;
  return small;
}

inline vf vsqrt(vf x) { return each([](float a) { return __builtin_sqrtf(a); }, x); }
inline vf vabs(vf x) { return each([](float a) { return __builtin_fabsf(a); }, x); }
inline vf vmax(vf a, vf b) { return (a > b) | (a != a) ? a : b; }  // NaN wins, as in XLA
inline vf vmin(vf a, vf b) { return (a < b) | (a != a) ? a : b; }
inline vf vsign(vf x) { return x > 0.0f ? splat(1) : (x < 0.0f ? splat(-1) : x); }

}  // namespace
