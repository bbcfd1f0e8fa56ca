// The loop of an affine cell and its derivative, for one CPU, in float32.
//
// Compiled once for each cell by build.py, with bind.cc and with cell.h (written by emit.py), which gives
//   GATES, SUMS (gates that read u + v), PARTS (GATES, and one more for each gate that reads u and v apart), SLOT[g]
//   (where v of gate g goes among the parts), STATES, HIDDEN_STATE (which of them is h), THETAS, and the functions
//   gates(theta, parts, state, new) and gates_vjp(theta, parts, state, dnew, dtheta, dparts, dstate) on vectors.
//
// T steps, N sequences, F features, H units. Units are taken in blocks of UB; what the library owns is laid out by row
// (a step of a sequence), block, gate: [row][block][gate][UB]. Weights are packed once a call into panels of UB columns.
// Threads share the batch, the units, or both; those that share units meet at a barrier at each step.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "kernel.h"

namespace {

// --- vectors -----------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12;  // floats in a vector; rows of a block of the product (2 MR accumulators)
#elif defined(__AVX__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 6;
#endif
constexpr int UB = 2 * VL;

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));

inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, -0 too
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

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
  for (long i = std::max(n, 0L); i < VL; ++i) v[i] = 0;
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
  std::memcpy(&out, &bits, sizeof out);
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

#include "cell.h"

// --- products ----------------------------------------------------------------------------------------------------

// A block of rows of the left factor (M, K) at the pointer it is taken with: rows apart, or K columns of M side by side.
struct Rows {
  long stride;
  long at(long r, long k, int) const { return r * stride + k; }
};
struct Strip {
  long at(long r, long k, int M) const { return k * M + r; }
};

// C (M, UB) = init + A B, with B a packed panel (K, UB); no init is zero.
template <int M, class Left>
inline void block(long K, const float* A, Left left, const float* B, const float* init, long ldi, float* C, long ldc) {
  vf acc[M][2];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    acc[r][0] = init ? load(init + r * ldi) : vf{};
    acc[r][1] = init ? load(init + r * ldi + VL) : vf{};
  }
#pragma GCC unroll 4
  for (long k = 0; k < K; ++k) {
    const vf b0 = load(B + k * UB), b1 = load(B + k * UB + VL);
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const vf a = splat(A[left.at(r, k, M)]);
      acc[r][0] += a * b0;
      acc[r][1] += a * b1;
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
                   long ldc) {
  if constexpr (M > 0) {
    if (rows == M)
      block<M>(K, A, left, B, init, ldi, C, ldc);
    else
      blocks<Left, M - 1>(rows, K, A, left, B, init, ldi, C, ldc);
  }
}

// The same for any number of rows, A (rows, K) at a stride, in blocks as even as can be; in parts of a long K, so that
// what all rows read of B stays in the nearest cache.
void multiply(long rows, long K, const float* A, long lda, const float* B, const float* init, long ldi, float* C,
              long ldc) {
  const long count = (rows + MR - 1) / MR, parts = count > 1 && K > 1024 ? (K + 511) / 512 : 1;
  for (long part = 0, k = 0; part < parts; ++part) {
    const long depth = (K - k) / (parts - part);
    for (long i = 0, r = 0; i < count; ++i) {
      const long m = (rows - r) / (count - i);
      blocks(m, depth, A + r * lda + k, Rows{lda}, B + k * UB, init ? init + r * ldi : nullptr, ldi, C + r * ldc, ldc);
      r += m;
    }
    init = C, ldi = ldc;
    k += depth;
  }
}

// --- threads and memory ------------------------------------------------------------------------------------------

inline std::pair<long, long> share(long count, long parts, long i) {
  return {count * i / parts, count * (i + 1) / parts};
}

class Barrier {
 public:
  void reset(int count) { count_ = count; }
  void wait() {
    if (count_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      if (spins > 4000) sched_yield();
  }

 private:
  int count_ = 1;
  std::atomic<int> arrived_{0}, turn_{0};
};

// Memory for the time of a call, kept for the next: fresh pages cost more than what is written to them.
class Scratch {
 public:
  explicit Scratch(size_t floats) : size_((floats * 4 + 4095) / 4096 * 4096) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& block : free_)
      if (block.second >= size_ && block.second <= 4 * size_) {
        data_ = block.first, size_ = block.second;
        std::swap(block, free_.back());
        free_.pop_back();
        return;
      }
    data_ = static_cast<float*>(std::aligned_alloc(4096, std::max<size_t>(size_, 4096)));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.size() >= 8) {
      std::free(free_.front().first);
      free_.erase(free_.begin());
    }
    free_.push_back({data_, size_});
  }
  Scratch(const Scratch&) = delete;
  float* take(size_t floats) {
    float* p = data_ + used_;
    used_ += (floats + 15) / 16 * 16;
    return p;
  }
  static size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }

 private:
  float* data_ = nullptr;
  size_t size_, used_ = 0;
  static inline std::mutex mutex_;
  static inline std::vector<std::pair<float*, size_t>> free_;
};

int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : std::max(1, CPU_COUNT(&set));
}

// The sizes of a run, and how threads share it: `across` parts of the batch times `units` parts of the units.
struct Run {
  long T, N, F, H, blocks, across = 1, units = 1;
  bool reverse;
  long width() const { return GATES * H; }
  long threads() const { return across * units; }
  long time(long i) const { return reverse ? T - 1 - i : i; }

  void plan() {
    blocks = (H + UB - 1) / UB;
    const double work = 2.0 * T * N * (F + H) * width(), step = 2.0 * N * H * width();
    const long most = std::min<long>(processors(), std::max(1.0, work / 4e6));
    const double weights = 4.0 * width() * (F + H);
    units = 1;
    while (units * 2 <= most && (weights / units > 5e5 || N / (most / units) < 4) && blocks >= 2 * units &&
           step / units > 1.5e5)
      units *= 2;
    across = std::max(1L, std::min(most / units, N / 4));
  }
};

// Moves the calling thread to the i-th processor after the given one: a new thread is often begun on its parent's, and
// moved only after milliseconds.
void move(int from, long i) {
  cpu_set_t all, one;
  if (sched_getaffinity(0, sizeof all, &all) || CPU_COUNT(&all) < 2) return;
  int cpu = from;
  for (; i > 0; --i)
    do
      cpu = (cpu + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(cpu, &all));
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof one, &one);
}

template <class Function>
void parallel(long count, Function work) {
  std::vector<std::thread> others;
  const int here = sched_getcpu();
  for (long i = 1; i < count; ++i)
    others.emplace_back([&work, here, i] {
      move(here, i);
      work(i);
    });
  work(0);
  for (auto& thread : others) thread.join();
}

// Columns of w (K, GATES * H), units of one block of one gate, as a panel (K, UB).
void pack(const Run& run, const float* w, long K, long ub, long g, float* out) {
  const long n = std::min<long>(UB, run.H - ub * UB);
  const float* from = w + g * run.H + ub * UB;
  for (long k = 0; k < K; ++k, from += run.width(), out += UB) {
    if (n == UB)
      std::memcpy(out, from, 4 * UB);
    else
      for (long j = 0; j < UB; ++j) out[j] = j < n ? from[j] : 0.0f;
  }
}

// Rows first .. first + UB of w (K, GATES * H) as a panel (blocks * GATES * UB, UB) of its transpose.
void pack_transposed(const Run& run, const float* w, long K, long first, float* out) {
  const long n = std::min<long>(UB, K - first);
  for (long ub = 0; ub < run.blocks; ++ub)
    for (long g = 0; g < GATES; ++g)
      for (long c = 0; c < UB; ++c, out += UB) {
        const long unit = ub * UB + c;
        const float* from = w + first * run.width() + g * run.H + unit;
        for (long j = 0; j < UB; ++j) out[j] = j < n && unit < run.H ? from[j * run.width()] : 0.0f;
      }
}

// Vectors (H) of theta, in whole blocks.
void pack_theta(const Run& run, const float* const* theta, float* out) {
  for (int i = 0; i < THETAS; ++i)
    for (long u = 0; u < run.blocks * UB; ++u) *out++ = u < run.H ? theta[i][u] : 0.0f;
}

// A length of row that is no multiple of a page, so that rows do not share the few places of a cache.
inline long padded(long floats) { return floats % 256 ? floats : floats + 16; }

// --- the loop ----------------------------------------------------------------------------------------------------

struct Forward {
  const float *x, *w_ih, *b, *w_hh;
  const uint8_t *valid, *resets;  // (T, N) or null
  const float *theta[THETAS + 1], *state[STATES], *restart[STATES];
  float *last[STATES], *hs;
  float* parts;           // (T, N, parts_row) or null: what the gates read, for the derivative
  float* after[STATES];   // (T, N, H): the other states after each step, likewise; hs for h
  long parts_row;
};

void run_forward(Run run, const Forward& f) {
  run.plan();
  const long T = run.T, N = run.N, F = run.F, H = run.H, blocks = run.blocks, threads = run.threads();
  const long most_rows = (N + run.across - 1) / run.across, most_blocks = (blocks + run.units - 1) / run.units;
  const long chunk = std::max(1L, std::min(T, 96 / most_rows));
  const long u_row = padded(most_blocks * GATES * UB);
  const size_t panels = blocks * GATES * UB;
  const size_t shared = Scratch::rounded(panels * F) + Scratch::rounded(panels * H) + Scratch::rounded(panels) +
                        Scratch::rounded(THETAS * blocks * UB);
  const size_t own = Scratch::rounded(chunk * most_rows * u_row) + Scratch::rounded(most_rows * PARTS * UB) +
                     Scratch::rounded(most_rows * H);
  Scratch scratch(shared + threads * own);
  float *p_ih = scratch.take(panels * F), *p_hh = scratch.take(panels * H), *p_b = scratch.take(panels),
        *p_theta = scratch.take(THETAS * blocks * UB);
  std::vector<float*> mine(threads);
  for (auto& m : mine) m = scratch.take(own);
  Barrier all;
  std::vector<Barrier> group(run.across);
  all.reset(threads);
  for (auto& g : group) g.reset(run.units);

  parallel(threads, [&](long id) {
    const long across = id / run.units;
    const auto [n0, n1] = share(N, run.across, across);
    const auto [b0, b1] = share(blocks, run.units, id % run.units);
    const auto [k0, k1] = share(blocks * GATES, threads, id);
    for (long p = k0; p < k1; ++p) {
      pack(run, f.w_ih, F, p / GATES, p % GATES, p_ih + p * F * UB);
      pack(run, f.w_hh, H, p / GATES, p % GATES, p_hh + p * H * UB);
      pack(run, f.b, 1, p / GATES, p % GATES, p_b + p * UB);
    }
    if (id == 0) pack_theta(run, f.theta, p_theta);
    all.wait();
    const long rows = n1 - n0;
    float* us = mine[id];
    float* tile = us + Scratch::rounded(chunk * most_rows * u_row);
    float* fed = tile + Scratch::rounded(most_rows * PARTS * UB);

    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? T - start - count : start;
      for (long p = b0 * GATES; p < b1 * GATES; ++p) {
        float* to = us + (p - b0 * GATES) * UB;
        if (rows == N)
          multiply(count * N, F, f.x + low * N * F, F, p_ih + p * F * UB, p_b + p * UB, 0, to, u_row);
        else
          for (long i = 0; i < count; ++i)
            multiply(rows, F, f.x + ((low + i) * N + n0) * F, F, p_ih + p * F * UB, p_b + p * UB, 0,
                     to + i * rows * u_row, u_row);
      }
      for (long i = start; i < start + count; ++i) {
        const long t = run.time(i), before = run.time(i - 1);
        const uint8_t* valid = f.valid ? f.valid + t * N : nullptr;
        const uint8_t* resets = f.resets ? f.resets + t * N : nullptr;
        const float* met[STATES];  // states before the step, (N, H)
        float* made[STATES];       // and after it
        for (int s = 0; s < STATES; ++s) {
          float* all_steps = s == HIDDEN_STATE ? f.hs : f.after[s];
          met[s] = i == 0 ? f.state[s] : all_steps ? all_steps + before * N * H : f.last[s];
          made[s] = all_steps ? all_steps + t * N * H : f.last[s];
        }
        const float* h = met[HIDDEN_STATE] + n0 * H;
        if (resets) {
          for (long n = n0; n < n1; ++n)
            std::memcpy(fed + (n - n0) * H, (resets[n] ? f.restart : met)[HIDDEN_STATE] + n * H, 4 * H);
          h = fed;
        }
        for (long ub = b0; ub < b1; ++ub) {
          const float* u = us + (t - low) * rows * u_row + (ub - b0) * GATES * UB;
          float* parts = f.parts ? f.parts + (t * N + n0) * f.parts_row + ub * PARTS * UB : tile;
          const long row = f.parts ? f.parts_row : PARTS * UB;
          for (int g = 0; g < GATES; ++g) {
            multiply(rows, H, h, H, p_hh + (ub * GATES + g) * H * UB, SLOT[g] == g ? u + g * UB : nullptr, u_row,
                     parts + SLOT[g] * UB, row);
            if (SLOT[g] != g)
              for (long n = 0; n < rows; ++n) std::memcpy(parts + n * row + g * UB, u + n * u_row + g * UB, 4 * UB);
          }
          for (long n = n0; n < n1; ++n) {
            const bool held = valid && !valid[n], reset = resets && resets[n];
            for (int v = 0; v < 2; ++v) {
              const long unit = ub * UB + v * VL, lanes = H - unit;
              if (lanes <= 0) break;
              vf theta[THETAS + 1], part[PARTS], old[STATES], now[STATES];
              for (int s = 0; s < STATES; ++s) old[s] = load((reset ? f.restart : met)[s] + n * H + unit, lanes);
              if (held) {
                for (int s = 0; s < STATES; ++s) now[s] = old[s];
              } else {
                for (int j = 0; j < THETAS; ++j) theta[j] = load(p_theta + j * blocks * UB + unit);
                for (int j = 0; j < PARTS; ++j) part[j] = load(parts + (n - n0) * row + j * UB + v * VL);
                gates(theta, part, old, now);
              }
              for (int s = 0; s < STATES; ++s) store(made[s] + n * H + unit, now[s], lanes);
            }
          }
        }
        group[across].wait();
      }
    }
    for (int s = 0; s < STATES; ++s) {
      const float* all_steps = s == HIDDEN_STATE ? f.hs : f.after[s];
      if (all_steps && id % run.units == 0)
        std::memcpy(f.last[s] + n0 * H, all_steps + (run.time(T - 1) * N + n0) * H, 4 * rows * H);
    }
  });
}

// --- its derivative ----------------------------------------------------------------------------------------------

struct Backward {
  const float *x, *w_ih, *w_hh;
  const uint8_t *valid, *resets;
  const float *theta[THETAS + 1], *state[STATES], *restart[STATES];
  const float *after[STATES], *parts;  // after[HIDDEN_STATE] is hs
  long parts_row;
  const float *dlast[STATES], *dhs;
  float *dx, *dw_ih, *db, *dw_hh, *dtheta[THETAS + 1], *dstate[STATES], *drestart[STATES];  // dx, drestart may be null
};

// out (M, UB) += A B for the gradient of weights, where the last block of units may be short.
void accumulate(const Run& run, long M, long K, const float* A, const float* B, long ub, bool fresh, float* out) {
  const long n = std::min<long>(UB, run.H - ub * UB);
  if (n == UB) return blocks(M, K, A, Strip{}, B, fresh ? nullptr : out, run.width(), out, run.width());
  float tile[MR * UB];
  blocks(M, K, A, Strip{}, B, nullptr, 0, tile, UB);
  for (long r = 0; r < M; ++r)
    for (long j = 0; j < n; ++j) out[r * run.width() + j] = tile[r * UB + j] + (fresh ? 0 : out[r * run.width() + j]);
}

void run_backward(Run run, const Backward& f) {
  run.plan();
  const long T = run.T, N = run.N, F = run.F, H = run.H, blocks = run.blocks, threads = run.threads();
  const long K = blocks * GATES * UB, row = padded(K), hidden = blocks * UB;
  const long chunk = std::max(1L, std::min(T, 160 / N)), most = chunk * N;
  const bool apart = SUMS != GATES;  // whether u and v have gradients of their own
  const long f_blocks = (F + UB - 1) / UB, f_strips = (F + MR - 1) / MR, h_strips = (H + MR - 1) / MR;
  const size_t sizes[] = {
      f.dx ? size_t(f_blocks * K * UB) : 0, size_t(blocks * K * UB), size_t(THETAS * hidden), size_t(most * row),
      apart ? size_t(most * row) : 0, size_t(STATES * N * hidden), size_t(threads * THETAS * hidden),
      size_t(most * f_strips * MR), size_t(most * h_strips * MR), size_t(threads * most * UB)};
  size_t total = 0;
  for (size_t size : sizes) total += Scratch::rounded(size);
  Scratch scratch(total);
  float *p_ih = scratch.take(sizes[0]), *p_hh = scratch.take(sizes[1]), *p_theta = scratch.take(sizes[2]),
        *du = scratch.take(sizes[3]), *dv = apart ? scratch.take(sizes[4]) : du, *carry = scratch.take(sizes[5]),
        *dtheta = scratch.take(sizes[6]), *strips_x = scratch.take(sizes[7]), *strips_h = scratch.take(sizes[8]),
        *panels = scratch.take(sizes[9]);
  Barrier all;
  std::vector<Barrier> group(run.across);
  all.reset(threads);
  for (auto& g : group) g.reset(run.units);

  parallel(threads, [&](long id) {
    const long across = id / run.units;
    const auto [n0, n1] = share(N, run.across, across);
    const auto [b0, b1] = share(blocks, run.units, id % run.units);
    {
      const auto [k0, k1] = share(blocks, threads, id);
      for (long p = k0; p < k1; ++p) pack_transposed(run, f.w_hh, H, p * UB, p_hh + p * K * UB);
      const auto [i0, i1] = share(f.dx ? f_blocks : 0, threads, id);
      for (long p = i0; p < i1; ++p) pack_transposed(run, f.w_ih, F, p * UB, p_ih + p * K * UB);
    }
    if (id == 0) pack_theta(run, f.theta, p_theta);
    float* my_theta = dtheta + id * THETAS * hidden;
    std::memset(my_theta, 0, 4 * THETAS * hidden);
    for (long n = n0; n < n1; ++n)
      for (int s = 0; s < STATES; ++s)
        for (long unit = b0 * UB; unit < b1 * UB; unit += VL)
          store(carry + (s * N + n) * hidden + unit, load(f.dlast[s] + n * H + unit, H - unit));
    if (f.drestart[0])
      for (int s = 0; s < STATES; ++s)
        for (long n = n0; n < n1; ++n)
          for (long unit = b0 * UB; unit < std::min(H, b1 * UB); ++unit) f.drestart[s][n * H + unit] = 0;
    all.wait();

    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? start : T - start - count;
      for (long i = start; i < start + count; ++i) {
        const long t = run.time(T - 1 - i), before = run.time(T - 2 - i);
        const bool opens = i == T - 1;  // the first step of the loop, the last of its derivative
        const uint8_t* valid = f.valid ? f.valid + t * N : nullptr;
        const uint8_t* resets = f.resets ? f.resets + t * N : nullptr;
        const float* met[STATES];
        for (int s = 0; s < STATES; ++s) met[s] = opens ? f.state[s] : f.after[s] + before * N * H;
        for (long ub = b0; ub < b1; ++ub)
          for (int v = 0; v < 2; ++v) {
            const long unit = ub * UB + v * VL, lanes = H - unit;
            vf theta[THETAS + 1], sums[THETAS + 1];
            for (int j = 0; j < THETAS; ++j) {
              theta[j] = load(p_theta + j * hidden + unit);
              sums[j] = load(my_theta + j * hidden + unit);
            }
            for (long n = n0; n < n1; ++n) {
              const long place = ((t - low) * N + n) * row + ub * GATES * UB + v * VL;
              vf dnew[STATES], old[STATES], part[PARTS], dpart[PARTS], dold[STATES], dth[THETAS + 1];
              for (int s = 0; s < STATES; ++s) dnew[s] = load(carry + (s * N + n) * hidden + unit);
              dnew[HIDDEN_STATE] += load(f.dhs + (t * N + n) * H + unit, lanes);
              if (lanes <= 0 || (valid && !valid[n])) {
                for (int g = 0; g < GATES; ++g) {
                  store(du + place + g * UB, vf{});
                  if (apart) store(dv + place + g * UB, vf{});
                }
                store(carry + (HIDDEN_STATE * N + n) * hidden + unit, dnew[HIDDEN_STATE]);
                continue;
              }
              const bool reset = resets && resets[n];
              for (int s = 0; s < STATES; ++s) old[s] = load((reset ? f.restart : met)[s] + n * H + unit, lanes);
              for (int j = 0; j < PARTS; ++j)
                part[j] = load(f.parts + (t * N + n) * f.parts_row + (ub * PARTS + j) * UB + v * VL);
              gates_vjp(theta, part, old, dnew, dth, dpart, dold);
              if (lanes < VL)  // a lane that is no unit may hold anything, NaN too
                for (int j = 0; j < PARTS; ++j) dpart[j] = first(dpart[j], lanes);
              for (int g = 0; g < GATES; ++g) {
                store(du + place + g * UB, dpart[g]);
                if (apart) store(dv + place + g * UB, dpart[SLOT[g]]);
              }
              for (int s = 0; s < STATES; ++s)
                store(carry + (s * N + n) * hidden + unit, lanes < VL ? first(dold[s], lanes) : dold[s]);
              for (int j = 0; j < THETAS; ++j) sums[j] += dth[j];
            }
            for (int j = 0; j < THETAS; ++j) store(my_theta + j * hidden + unit, sums[j]);
          }
        group[across].wait();
        float* dh = carry + (HIDDEN_STATE * N + n0) * hidden;
        for (long ub = b0; ub < b1; ++ub)
          multiply(n1 - n0, K, dv + ((t - low) * N + n0) * row, row, p_hh + ub * K * UB, dh + ub * UB, hidden,
                   dh + ub * UB, hidden);
        if (resets)
          for (long n = n0; n < n1; ++n)
            for (int s = 0; s < STATES && resets[n]; ++s)
              for (long unit = b0 * UB; unit < b1 * UB; ++unit) {
                float& d = carry[(s * N + n) * hidden + unit];
                if (unit < H) f.drestart[s][n * H + unit] += d;
                d = 0;
              }
      }

      // Of the chunk at once: the gradients of weights, by columns, and of the inputs, by rows.
      const long rows = count * N;
      const bool fresh = start == 0;
      {
        const auto [s0, s1] = share(f_strips + h_strips, threads, id);
        for (long s = s0; s < s1; ++s) {
          const bool recurrent = s >= f_strips;
          const long k = (recurrent ? s - f_strips : s) * MR, m = std::min<long>(MR, (recurrent ? H : F) - k);
          float* to = (recurrent ? strips_h : strips_x) + k * most;
          for (long r = 0; r < rows; ++r, to += m) {
            const long t = low + r / N, n = r % N;
            const float* from = f.x + (low * N + r) * F + k;
            if (recurrent) {
              const bool opens = t == run.time(0);
              const long before = run.reverse ? t + 1 : t - 1;
              from = f.resets && f.resets[t * N + n] ? f.restart[HIDDEN_STATE] + n * H
                     : opens                         ? f.state[HIDDEN_STATE] + n * H
                                                     : f.after[HIDDEN_STATE] + (before * N + n) * H;
              from += k;
            }
            for (long j = 0; j < m; ++j) to[j] = from[j];
          }
        }
      }
      all.wait();
      const auto [k0, k1] = share(blocks * GATES, threads, id);
      float* panel = panels + id * most * UB;
      for (long p = k0; p < k1; ++p) {
        const long ub = p / GATES, column = p % GATES * H + ub * UB;
        vf sum[2] = {};
        for (long r = 0; r < rows; ++r)
          for (int v = 0; v < 2; ++v) {
            const vf d = load(du + r * row + p * UB + v * VL);
            store(panel + r * UB + v * VL, d);
            sum[v] += d;
          }
        for (long j = 0; j < UB && ub * UB + j < H; ++j)
          f.db[column + j] = sum[j / VL][j % VL] + (fresh ? 0 : f.db[column + j]);
        for (long k = 0; k < F; k += MR)
          accumulate(run, std::min<long>(MR, F - k), rows, strips_x + k * most, panel, ub, fresh,
                     f.dw_ih + k * run.width() + column);
        if (apart)
          for (long r = 0; r < rows; ++r) std::memcpy(panel + r * UB, dv + r * row + p * UB, 4 * UB);
        for (long k = 0; k < H; k += MR)
          accumulate(run, std::min<long>(MR, H - k), rows, strips_h + k * most, panel, ub, fresh,
                     f.dw_hh + k * run.width() + column);
      }
      if (f.dx) {
        const auto [r0, r1] = share(rows, threads, id);
        for (long p = 0; p < f_blocks; ++p) {
          const long n = std::min<long>(UB, F - p * UB);
          float* to = f.dx + low * N * F + p * UB;
          if (n == UB) {
            multiply(r1 - r0, K, du + r0 * row, row, p_ih + p * K * UB, nullptr, 0, to + r0 * F, F);
            continue;
          }
          float tile[MR * UB];
          for (long r = r0; r < r1; r += MR) {
            const long m = std::min<long>(MR, r1 - r);
            multiply(m, K, du + r * row, row, p_ih + p * K * UB, nullptr, 0, tile, UB);
            for (long j = 0; j < m; ++j) std::memcpy(to + (r + j) * F, tile + j * UB, 4 * n);
          }
        }
      }
      all.wait();
    }
    for (int s = 0; s < STATES; ++s)
      for (long n = n0; n < n1; ++n)
        for (long unit = b0 * UB; unit < b1 * UB; unit += VL)
          store(f.dstate[s] + n * H + unit, load(carry + (s * N + n) * hidden + unit), H - unit);
    all.wait();
    if (id == 0)
      for (int j = 0; j < THETAS; ++j)
        for (long u = 0; u < H; ++u) {
          float sum = 0;
          for (long i = 0; i < threads; ++i) sum += dtheta[(i * THETAS + j) * hidden + u];
          f.dtheta[j][u] = sum;
        }
  });
}

// --- the way in --------------------------------------------------------------------------------------------------

// Operands in order; those without elements are null.
struct Arguments {
  const Array* next;
  template <class Type = float>
  const Type* take() {
    const Array& array = *next++;
    return array.count ? static_cast<const Type*>(array.data) : nullptr;
  }
};

struct Results {
  const Array* next;
  float* take() {
    const Array& array = *next++;
    return array.count ? static_cast<float*>(array.data) : nullptr;
  }
};

template <class Call>
Run start(Arguments& in, Call& f, bool reverse) {
  Run run;
  const Array &x = in.next[0], &w_hh = in.next[2];
  run.T = x.dims[0], run.N = x.dims[1], run.F = x.dims[2], run.H = w_hh.dims[0], run.reverse = reverse;
  f.x = in.take();
  f.w_ih = in.take();
  f.w_hh = in.take();
  f.valid = in.take<uint8_t>();
  f.resets = in.take<uint8_t>();
  for (int i = 0; i < THETAS; ++i) f.theta[i] = in.take();
  for (auto& s : f.state) s = in.take();
  for (auto& s : f.restart) s = in.take();
  return run;
}

}  // namespace

extern "C" {

void jrnn_run_forward(const Array* args, const Array* rets, bool reverse, long parts_row) {
  Arguments in{args};
  Results out{rets};
  Forward f{};
  const Run run = start(in, f, reverse);
  f.b = in.take();
  for (auto& s : f.last) s = out.take();
  f.hs = out.take();
  f.parts = out.take();
  f.parts_row = parts_row;
  for (int s = 0; s < STATES; ++s) f.after[s] = s == HIDDEN_STATE ? nullptr : out.take();
  run_forward(run, f);
}

void jrnn_run_backward(const Array* args, const Array* rets, bool reverse, long parts_row) {
  Arguments in{args};
  Results out{rets};
  Backward f{};
  const Run run = start(in, f, reverse);
  const float* hs = in.take();
  f.parts = in.take();
  f.parts_row = parts_row;
  for (int s = 0; s < STATES; ++s) f.after[s] = s == HIDDEN_STATE ? hs : in.take();
  for (auto& s : f.dlast) s = in.take();
  f.dhs = in.take();
  f.dx = out.take();
  f.dw_ih = out.take();
  f.dw_hh = out.take();
  for (int i = 0; i < THETAS; ++i) f.dtheta[i] = out.take();
  for (auto& s : f.dstate) s = out.take();
  for (auto& s : f.drestart) s = out.take();
  f.db = out.take();
  run_backward(run, f);
}

int jrnn_unit_block() { return UB; }
}
