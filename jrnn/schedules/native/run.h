// The sizes of a run, how threads share it, and its weights packed into panels.

#pragma once

#include <deque>

#include "kernel.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

// The sizes of a run, and its division among threads: `across` parts of the batch times `units` parts of the units.
struct Run {
  const Cell& cell;
  long T, N, F, H;
  bool reverse;
  bool given;  // x holds the input parts of all gates, side by side, instead of what w_ih multiplies: F = G * H
  long G = cell.gates, blocks = (H + UB - 1) / UB, width = G * H, across = 1, units = 1;
  long depth = given ? 0 : F;  // rows of w_ih
  bool apart = cell.sums != cell.gates;  // whether u and v have gradients of their own
  bool coupled = true;                   // whether there is a recurrent product: without one, units are independent
  long threads() const { return across * units; }
  long time(long i) const { return reverse ? T - 1 - i : i; }

  // Chooses the number of threads that pays, up to `most`, and the division among them.
  void plan(long most) {
    const double work = 2.0 * T * N * (depth + H) * width, step = 2.0 * N * H * width;
    const double weights = 4.0 * width * (depth + H);
    most = std::min<long>(most, std::max(1.0, work / 4e6));
    if (!coupled) {
      units = std::min(most, blocks);
      across = std::max(1L, std::min(most / units, N));
      return;
    }
    units = 1;
    while (units * 2 <= most && (weights / units > 5e5 || N / (most / units) < 4) && blocks >= 2 * units &&
           step / units > 1.5e5)
      units *= 2;
    across = std::max(1L, std::min(most / units, N / 4));
  }
};

// The part of a run that one thread does: sequences n0 to n1, and a share of the work that it shares with others.
struct Part {
  long id, threads, n0, n1, unit, units;  // unit: its index among the threads that share its sequences
  Barrier &all, &group;                   // group: of the threads that share its sequences
  Pieces &steps, &panels, &rows;          // work on a step (in the group), on the gradients of weights, of inputs
  std::pair<long, long> share(long count) const { return ::share(count, threads, id); }
};

template <class Function>
void divide(const Run& run, Crew& crew, Function work) {
  const long threads = run.threads();
  Barrier all;
  std::vector<Barrier> groups(run.across);
  std::deque<Pieces> steps;
  Pieces panels(threads), rows(threads);
  all.reset(threads);
  for (auto& group : groups) {
    group.reset(run.units);
    steps.emplace_back(run.units);
  }
  crew.run(threads, [&](long id) {
    const long across = id / run.units;
    const auto [n0, n1] = share(run.N, run.across, across);
    work(Part{id, threads, n0, n1, id % run.units, run.units, all, groups[across], steps[across], panels, rows});
  });
}

// The columns of w (K, G * H) that belong to one block of units of one gate, as a panel (K, UB).
void pack(const Run& run, const float* w, long K, long ub, long g, float* out) {
  pack_columns(std::min<long>(UB, run.H - ub * UB), K, w + g * run.H + ub * UB, run.width, out);
}

// The rows first .. first + UB of w (K, G * H), as a panel (blocks * G * UB, UB) of its transpose.
void pack_transposed(const Run& run, const float* w, long K, long first, float* out) {
  for (long ub = 0; ub < run.blocks; ++ub)
    for (long g = 0; g < run.G; ++g, out += UB * UB)
      pack_rows(std::min<long>(UB, K - first), std::min<long>(UB, run.H - ub * UB),
                w + first * run.width + g * run.H + ub * UB, run.width, out);
}

// The vectors (H) of theta, padded to whole blocks.
void pack_theta(const Run& run, const std::vector<const float*>& theta, float* out) {
  for (const float* from : theta)
    for (long u = 0; u < run.blocks * UB; ++u) *out++ = u < run.H ? from[u] : 0.0f;
}

// The bytes of weights that stay in a core's own cache from step to step.
constexpr long NEAR = 1 << 18;

// A row length that is not a multiple of a page, so that rows do not compete for the same sets of a cache.
inline long padded(long floats) { return floats % 256 ? floats : floats + 16; }

// Room for the packed parameters, of the given numbers of floats. The first run that gets it packs them.
class Weights {
 public:
  Weights(size_t ih, size_t hh, size_t b, size_t theta)
      : scratch_(Scratch::rounded(ih) + Scratch::rounded(hh) + Scratch::rounded(b) + Scratch::rounded(theta)),
        ih(scratch_.take(ih)), hh(scratch_.take(hh)), b(scratch_.take(b)), theta(scratch_.take(theta)) {}

 private:
  Scratch scratch_;

 public:
  float *const ih, *const hh, *const b, *const theta;
  bool packed = false;
};

}  // namespace
