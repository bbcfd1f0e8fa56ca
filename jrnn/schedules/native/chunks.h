// A run in chunks of steps: only the states before each chunk are stored, and the derivative recomputes the rest.

#pragma once

#include "backward.h"
#include "forward.h"

namespace {

// The steps of a run from `start` on.
template <class Call>
Call beginning(const Run& run, Call f, long start) {
  f.x += start * run.N * run.F;
  if (f.valid) f.valid += start * run.N;
  if (f.resets) f.resets += start * run.N;
  return f;
}

// A group is `together` chunks of `length` steps. The steps that fill no group run last, with all residuals stored.
struct Chunks {
  const Run& run;
  long length, together;
  long groups() const { return run.T / (length * together); }
  long rest() const { return run.T - groups() * together * length; }
  long rest_start() const { return run.reverse ? 0 : run.T - rest(); }
  // The first step in time of the i-th chunk that is run.
  long start(long i) const { return run.reverse ? run.T - (i + 1) * length : i * length; }
  Run steps(long count, long sequences) const {
    Run some = run;
    some.T = count, some.N = sequences;
    return some;
  }
};

// The residuals of a run in chunks: the states (groups, together, N, H) before each chunk; the state before the steps
// that do not fill a group, and all residuals of these steps.
struct Met {
  Outputs states, rest_state, rest_after;
  float* rest_parts;
};

void forward_in_chunks(const Chunks& chunks, const Forward& f, const Met& met) {
  const Run& run = chunks.run;
  const long S = run.cell.states, size = run.N * run.H, count = chunks.groups() * chunks.together;
  const long rest = chunks.rest();
  Weights weights = forward_weights(run);
  for (long s = 0; s < S; ++s) std::memcpy(count ? met.states[s] : met.rest_state[s], f.state[s], 4 * size);
  for (long i = 0; i < count; ++i) {
    Forward part = beginning(run, f, chunks.start(i));
    for (long s = 0; s < S; ++s) {
      part.state[s] = met.states[s] + i * size;
      part.last[s] = i + 1 < count ? met.states[s] + (i + 1) * size : rest ? met.rest_state[s] : f.last[s];
      if (f.after[s]) part.after[s] = f.after[s] + chunks.start(i) * size;
    }
    forward_steps(chunks.steps(chunks.length, run.N), part, weights);
  }
  if (!rest) return;
  Forward part = beginning(run, f, chunks.rest_start());
  for (long s = 0; s < S; ++s) part.state[s] = met.rest_state[s];
  part.after = met.rest_after;
  part.parts = met.rest_parts;
  forward_steps(chunks.steps(rest, run.N), part, weights);
  for (long s = 0; s < S; ++s)
    if (f.after[s]) std::memcpy(f.after[s] + chunks.rest_start() * size, met.rest_after[s], 4 * rest * size);
}

// `b` is the bias, and `work` has room for the recomputed residuals of a group.
void backward_in_chunks(const Chunks& chunks, const Backward& f, const Met& met, const float* b, float* work) {
  const Run& run = chunks.run;
  const Cell& cell = run.cell;
  const long S = cell.states, N = run.N, H = run.H, size = N * H, together = chunks.together, length = chunks.length;
  const long wide = together * N;  // sequences of a group
  const Run group_run = chunks.steps(length, wide);
  Weights forward = forward_weights(group_run), backward = backward_weights(run, f.dx != nullptr);
  bool more = false;
  const auto differentiate = [&](long start, long count, Backward part) {
    for (long s = 0; s < S; ++s)
      if (f.dafter[s]) part.dafter[s] = f.dafter[s] + start * size;
    if (f.dx) part.dx = f.dx + start * N * run.F;
    part.more = more;
    if (more)
      for (long s = 0; s < S; ++s) part.dlast[s] = f.dstate[s];
    backward_steps(chunks.steps(count, N), part, backward);
    more = true;
  };
  if (chunks.rest()) {
    Backward part = beginning(run, f, chunks.rest_start());
    part.state.assign(met.rest_state.begin(), met.rest_state.end());
    part.after.assign(met.rest_after.begin(), met.rest_after.end());
    part.parts = met.rest_parts;
    differentiate(chunks.rest_start(), chunks.rest(), part);
  }

  if (!chunks.groups()) return;

  Forward again{};
  again.w_ih = f.w_ih, again.b = b, again.w_hh = f.w_hh, again.theta = f.theta;
  again.parts = work, again.parts_row = f.parts_row;
  for (long s = 0; s < S; ++s) again.after.push_back(work + length * wide * (f.parts_row + s * H));
  Scratch beside(Scratch::rounded(length * wide * run.F) + Scratch::rounded(length * wide / 2 + 1) +
                 (2 * S + 1) * Scratch::rounded(wide * H));
  float* xs = beside.take(length * wide * run.F);
  uint8_t* marks = reinterpret_cast<uint8_t*>(beside.take(length * wide / 2 + 1));
  const auto tiled = [&](const float* from) {  // repeated for each chunk of a group
    float* to = from ? beside.take(wide * H) : nullptr;
    for (long i = 0; i < together && from; ++i) std::memcpy(to + i * size, from, 4 * size);
    return to;
  };
  for (long s = 0; s < S; ++s) {
    again.last.push_back(beside.take(wide * H));
    again.restart.push_back(tiled(f.restart[s]));
  }
  again.mask = tiled(f.mask);
  for (long group = chunks.groups() - 1; group >= 0; --group) {
    // The inputs of the chunks of the group side by side.
    for (long i = 0; i < together; ++i) {
      const long start = chunks.start(group * together + i);
      for (long t = 0; t < length; ++t) {
        const long to = t * wide + i * N, at = (start + t) * N;
        std::memcpy(xs + to * run.F, f.x + at * run.F, 4 * N * run.F);
        if (f.valid) std::memcpy(marks + to, f.valid + at, N);
        if (f.resets) std::memcpy(marks + length * wide + to, f.resets + at, N);
      }
    }
    again.x = xs;
    again.valid = f.valid ? marks : nullptr;
    again.resets = f.resets ? marks + length * wide : nullptr;
    again.state.clear();
    for (long s = 0; s < S; ++s) again.state.push_back(met.states[s] + group * together * size);
    forward_steps(group_run, again, forward);
    for (long i = together - 1; i >= 0; --i) {
      Backward part = beginning(run, f, chunks.start(group * together + i));
      for (long s = 0; s < S; ++s) {
        part.state[s] = met.states[s] + (group * together + i) * size;
        part.after[s] = again.after[s] + i * size;
      }
      part.parts = again.parts + i * N * f.parts_row;
      part.kept_rows = wide;
      differentiate(chunks.start(group * together + i), length, part);
    }
  }
}

}  // namespace
