// The loop over all steps of a run: the two matmuls and the gates.

#pragma once

#include "run.h"

namespace {

using Inputs = std::vector<const float*>;  // an array for each state, or each vector of theta
using Outputs = std::vector<float*>;

struct Forward {
  const float *x, *w_ih, *b, *w_hh;  // w_ih is null if x is given (see Run)
  const uint8_t *valid, *resets;  // (T, N) or null
  const float* mask;              // (N, H) or null: the dropout mask on h in the recurrent product
  Inputs theta, state, restart;
  Outputs last;
  float* parts;   // (T, N, parts_row) or null: the gate inputs, as residuals
  Outputs after;  // (T, N, H): the states after each step; null if not needed, except for h
  long parts_row;
};

// A call of few steps and few sequences reads the weights unpacked: packing them would take longer than using them.
inline bool reads_in_place(const Run& run) {
  return run.T <= 4 && run.N <= FEW && run.H % UB == 0 && run.coupled;
}

Weights forward_weights(const Run& run) {
  const size_t columns = reads_in_place(run) ? 0 : run.blocks * run.G * UB;
  const size_t thetas = run.cell.thetas * run.blocks * UB;
  return Weights(columns * run.depth, run.coupled ? columns * run.H : 0, columns, thetas);
}

// The inputs of a row that are the input part of a gate for a block of units: panel p of `given` inputs.
template <class Float>
Float* input_part(const Run& run, Float* x, long row, long p) {
  return x + row * run.F + p % run.G * run.H + p / run.G * UB;
}

// The states before and after a step, of which only `last` is kept where the states after each step are not needed.
void states_of(const Run& run, const Forward& f, long i, Inputs& old, Outputs& now) {
  const long size = run.N * run.H;
  for (int s = 0; s < run.cell.states; ++s) {
    old[s] = i == 0 ? f.state[s] : f.after[s] ? f.after[s] + run.time(i - 1) * size : f.last[s];
    now[s] = f.after[s] ? f.after[s] + run.time(i) * size : f.last[s];
  }
}

// A run without a recurrent product. A thread runs some units of some sequences for itself, a block of units at a time:
// the input product of a chunk of steps, and then these steps, whose gate inputs are still in the nearest cache.
void forward_apart(const Run& run, Crew& crew, const Forward& f, Weights& weights) {
  const Cell& cell = run.cell;
  const long T = run.T, N = run.N, F = run.F, H = run.H, G = run.G, P = cell.parts, S = cell.states;
  const long blocks = run.blocks, width = P * UB, hidden = blocks * UB;
  const long most_rows = (N + run.across - 1) / run.across, chunk = std::max(1L, std::min(T, 96 / most_rows));
  const size_t tile_size = f.parts ? 0 : Scratch::rounded(chunk * N * width);
  Scratch scratch(run.threads() * tile_size);
  std::vector<float*> tiles(run.threads());
  for (auto& tile : tiles) tile = scratch.take(tile_size);
  divide(run, crew, [&](const Part& part) {
    const long n0 = part.n0, n1 = part.n1;
    const auto [b0, b1] = ::share(blocks, part.units, part.unit);
    if (!weights.packed) {
      const auto [k0, k1] = part.share(blocks * G);
      for (long p = k0; p < k1; ++p) {
        pack(run, f.w_ih, run.depth, p / G, p % G, weights.ih + p * run.depth * UB);
        pack(run, f.b, 1, p / G, p % G, weights.b + p * UB);
      }
      if (part.id == 0) pack_theta(run, f.theta, weights.theta);
      part.all.wait();
    }
    Inputs old(S);
    Outputs now(S);
    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? T - start - count : start;
      for (long ub = b0; ub < b1; ++ub) {
        const long row = f.parts ? f.parts_row : width;
        float* parts = f.parts ? f.parts + low * N * row + ub * width : tiles[part.id];
        for (long g = 0; g < G; ++g) {
          const long p = ub * G + g;
          const auto project = [&](long first, long rows) {
            float* to = parts + first * row + g * UB;
            if (run.given)
              add_columns(rows, std::min<long>(UB, H - ub * UB), input_part(run, f.x, low * N + first, p), F,
                          weights.b + p * UB, to, row);
            else
              multiply(rows, F, f.x + (low * N + first) * F, F, weights.ih + p * F * UB, weights.b + p * UB, 0, to, row);
          };
          if (n1 - n0 == N)
            project(0, count * N);
          else
            for (long i = 0; i < count; ++i) project(i * N + n0, n1 - n0);
        }
        for (long i = start; i < start + count; ++i) {
          const long t = run.time(i);
          states_of(run, f, i, old, now);
          float* from = parts + ((t - low) * N + n0) * row;
          cell.forward({n0, n1, ub, ub + 1, H, f.valid ? f.valid + t * N : nullptr,
                        f.resets ? f.resets + t * N : nullptr, weights.theta, hidden, from, row, old.data(),
                        f.restart.data(), now.data()});
          for (long n = 0; n < n1 - n0 && f.parts && ub + 1 == blocks; ++n)  // padding that was never written
            std::fill(from + n * row + width, from + n * row + row - ub * width, 0.0f);
        }
      }
    }
    const long first = b0 * UB, units = std::min(H, b1 * UB) - first;
    for (long s = 0; s < S; ++s)
      for (long n = n0; n < n1 && f.after[s]; ++n)
        std::memcpy(f.last[s] + n * H + first, f.after[s] + (run.time(T - 1) * N + n) * H + first, 4 * units);
  });
  weights.packed = true;
}

void forward_steps(Run run, const Forward& f, Weights& weights) {
  run.plan(processors());
  Crew crew(run.threads());
  if (crew.size() < run.threads()) run.plan(crew.size());
  if (!run.coupled) return forward_apart(run, crew, f, weights);
  const Cell& cell = run.cell;
  const long T = run.T, N = run.N, F = run.F, H = run.H, G = run.G, blocks = run.blocks, threads = run.threads();
  const long depth = run.depth, P = cell.parts, S = cell.states, hidden = blocks * UB;
  const long most_rows = (N + run.across - 1) / run.across, most_blocks = (blocks + run.units - 1) / run.units;
  const long chunk = std::max(1L, std::min(T, 96 / most_rows));
  const bool far = 4 * (depth + H) * run.width > NEAR, in_place = reads_in_place(run);
  const long u_row = padded(blocks * G * UB);
  const long at_once = most_rows > FEW ? 1 : most_blocks;  // blocks in one product, before their gates
  const size_t tile_size = most_rows * at_once * P * UB;
  const size_t u_size = chunk * most_rows * u_row;
  const size_t own = Scratch::rounded(tile_size) + Scratch::rounded(most_rows * H);
  Scratch scratch(run.across * Scratch::rounded(u_size) + threads * own);
  float *p_ih = weights.ih, *p_hh = weights.hh, *p_b = weights.b, *p_theta = weights.theta;
  std::vector<float*> projected(run.across), mine(threads);
  for (auto& u : projected) u = scratch.take(u_size);
  for (auto& m : mine) m = scratch.take(own);
  std::vector<Inputs> olds(threads, Inputs(S));
  std::vector<Outputs> news(threads, Outputs(S));
  std::vector<int> own_places(G);
  for (long g = 0; g < G; ++g) own_places[g] = g;

  divide(run, crew, [&](const Part& part) {
    const long id = part.id, n0 = part.n0, n1 = part.n1;
    if (!weights.packed) {
      const auto [k0, k1] = part.share(blocks * G);
      for (long p = k0; p < k1 && !in_place; ++p) {
        pack(run, f.w_ih, depth, p / G, p % G, p_ih + p * depth * UB);
        pack(run, f.w_hh, H, p / G, p % G, p_hh + p * H * UB);
        pack(run, f.b, 1, p / G, p % G, p_b + p * UB);
      }
      if (id == 0) pack_theta(run, f.theta, p_theta);
      part.all.wait();
    }
    const long rows = n1 - n0;
    const Split split{blocks, part.units, rows};
    float* us = projected[id / run.units];
    float* tile = mine[id];
    float* fed = tile + Scratch::rounded(tile_size);
    Inputs& old = olds[id];   // states before the step, (N, H)
    Outputs& now = news[id];  // states after the step
    Panels at;
    for (long p = 0; p < at_once * G; ++p) {
      const long g = p % G, slot = cell.slot[g];
      at.from.push_back(slot == g ? p * UB : -1);
      at.to.push_back((p / G * P + slot) * UB);
    }

    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? T - start - count : start;
      // The input product for some blocks and rows, for all steps of the chunk.
      const auto project = [&](long first, long end, long r0, long r1) {
        for (long p = first * G; p < end * G; ++p) {
          const float *panel = p_ih + p * depth * UB, *next = far ? panel + depth * UB : nullptr;
          if (run.given)
            for (long i = 0; i < count; ++i)
              add_columns(r1 - r0, std::min<long>(UB, H - p / G * UB),
                          input_part(run, f.x, (low + i) * N + n0 + r0, p), F, p_b + p * UB,
                          us + (i * rows + r0) * u_row + p * UB, u_row);
          else if (r1 - r0 == N)
            multiply(count * N, F, f.x + low * N * F, F, panel, p_b + p * UB, 0, us + p * UB, u_row, next);
          else
            for (long i = 0; i < count; ++i)
              multiply(r1 - r0, F, f.x + ((low + i) * N + n0 + r0) * F, F, panel, p_b + p * UB, 0,
                       us + (i * rows + r0) * u_row + p * UB, u_row, next);
        }
      };
      // The bias plus both products, for one step.
      const auto product = [&](long first, long end, const float* x, const float* h, float* parts, long row) {
        for (long n = 0; n < rows; ++n)
          for (long p = 0; p < (end - first) * P; ++p)
            for (long j = 0; j < UB; ++j) {
              const long column = p % P * H + (first + p / P) * UB + j;
              parts[n * row + p * UB + j] = p % P < G ? f.b[column] + (run.given ? x[n * F + column] : 0) : 0;
            }
        stream(rows, depth, x, F, f.w_ih + first * UB, run.width, G, H, end - first, parts, row, P * UB, own_places.data());
        stream(rows, H, h, H, f.w_hh + first * UB, run.width, G, H, end - first, parts, row, P * UB, cell.slot);
      };
      for (long i = start; i < start + count; ++i) {
        const long t = run.time(i);
        const uint8_t* valid = f.valid ? f.valid + t * N : nullptr;
        const uint8_t* resets = f.resets ? f.resets + t * N : nullptr;
        states_of(run, f, i, old, now);
        const float* h = old[cell.hidden_state] + n0 * H;
        if (resets || f.mask) {
          for (long n = n0; n < n1; ++n) {
            const float* from = (resets && resets[n] ? f.restart : old)[cell.hidden_state] + n * H;
            float* to = fed + (n - n0) * H;
            gather(1, H, from, H, f.mask ? f.mask + n * H : nullptr, to);
          }
          h = fed;
        }
        // The step for some blocks and rows.
        const auto advance = [&](long ub, long end, long r0, long r1) {
          const float *u = us + ((t - low) * rows + r0) * u_row + ub * G * UB, *from = h + r0 * H;
          float* parts = f.parts ? f.parts + (t * N + n0 + r0) * f.parts_row + ub * P * UB : tile;
          const long row = f.parts ? f.parts_row : at_once * P * UB;
          if (in_place)
            product(ub, end, f.x + t * N * F, h, parts, row);
          else if (rows <= FEW)
            narrow(rows, H, h, H, p_hh + ub * G * H * UB, at, (end - ub) * G, u, u_row, parts, row);
          else
            for (long g = 0; g < G; ++g)
              multiply(r1 - r0, H, from, H, p_hh + (ub * G + g) * H * UB, at.from[g] < 0 ? nullptr : u + at.from[g],
                       u_row, parts + at.to[g], row, far ? p_hh + (ub * G + g + 1) * H * UB : nullptr);
          for (long p = 0; p < (end - ub) * G && !in_place; ++p)
            if (at.from[p] < 0)
              for (long n = 0; n < r1 - r0; ++n)
                std::memcpy(parts + n * row + (p / G * P + p % G) * UB, u + n * u_row + p * UB, 4 * UB);
          cell.forward({n0 + r0, n0 + r1, ub, end, H, valid, resets, p_theta, hidden, parts, row, old.data(),
                        f.restart.data(), now.data()});
          // The padding of a row is never read, but it is returned, and memory that was never written may hold NaN.
          for (long n = 0; n < r1 - r0 && f.parts && end == blocks; ++n)
            std::fill(parts + n * row + (end - ub) * P * UB, parts + n * row + row - ub * P * UB, 0.0f);
        };
        // With few rows, each thread has one piece, with an equal number of blocks.
        const long pieces = at_once == 1 ? split.pieces() : part.units;
        for (;;) {
          const auto [p0, p1] = part.steps.take(i + 1, pieces, part.unit);
          if (p0 == p1) break;
          const auto work = [&](long b0, long b1, long r0, long r1) {
            if (i == start && !in_place) project(b0, b1, r0, r1);
            for (long ub = b0; ub < b1; ub += at_once) advance(ub, std::min(b1, ub + at_once), r0, r1);
          };
          if (at_once == 1)
            split.each(p0, p1, work);
          else
            work(blocks * p0 / pieces, blocks * p1 / pieces, 0L, rows);
        }
        part.group.wait();
      }
    }
    if (id % run.units == 0)
      for (long s = 0; s < S; ++s)
        if (f.after[s])
          std::memcpy(f.last[s] + n0 * H, f.after[s] + (run.time(T - 1) * N + n0) * H, 4 * rows * H);
  });
  weights.packed = !in_place;
}

}  // namespace
