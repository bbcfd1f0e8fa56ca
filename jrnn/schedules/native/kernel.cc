// The loop of an affine cell and its derivative, for one CPU, in float32: everything but the cell's gates (cell.cc).
// This file sorts operands and results and calls the loops in forward.h, backward.h and chunks.h.
//
// Compiled once for a machine, with bind.cc. T steps, N sequences, F features, H units. Units are processed in blocks
// of UB. The library's own arrays are laid out by row (a step of a sequence), block, gate: [row][block][gate][UB]. A
// call packs the weights into panels of UB columns, unless it has few steps. Threads share the batch, the units, or
// both. Threads that share units meet at a barrier at each step.

#include "kernel.h"

#include "backward.h"
#include "chunks.h"
#include "forward.h"
#include "run.h"

namespace {

// Takes operands or results in order; an array without elements is null.
struct Arrays {
  const Array* next;
  bool fresh = false;  // results, which are written for the first time
  template <class Type = float>
  Type* take() {
    const Array& array = *next++;
    if (fresh) in_large_pages(array.data, array.count * sizeof(Type));
    return array.count ? static_cast<Type*>(array.data) : nullptr;
  }
  template <class List>
  void take(List& list, int count) {
    for (int i = 0; i < count; ++i) list.push_back(take());
  }
};

template <class Call>
Run start(const Cell& cell, Arrays& in, Call& f, bool reverse) {
  const Array &x = in.next[0], &w_hh = in.next[2];
  f.x = in.take();
  f.w_ih = in.take();
  f.w_hh = in.take();
  f.valid = in.take<uint8_t>();
  f.resets = in.take<uint8_t>();
  f.mask = in.take();
  in.take(f.theta, cell.thetas);
  in.take(f.state, cell.states);
  in.take(f.restart, cell.states);
  Run run{cell, x.dims[0], x.dims[1], x.dims[2], w_hh.dims[0], reverse, !f.w_ih && x.dims[2]};
  run.coupled = w_hh.dims[1] > 0;
  return run;
}

Met take_met(const Chunks& chunks, Arrays& from) {
  const int states = chunks.run.cell.states;
  Met met{};
  from.take(met.states, states);
  if (chunks.rest()) {
    from.take(met.rest_state, states);
    from.take(met.rest_after, states);
    met.rest_parts = from.take();
  }
  return met;
}

}  // namespace

void run_forward(const Cell& cell, const Array* args, const Array* rets, const Options& options) {
  Arrays in{args}, out{rets, true};
  Forward f{};
  const Run run = start(cell, in, f, options.reverse);
  f.b = in.take();
  f.parts_row = options.parts_row;
  out.take(f.last, cell.states);
  out.take(f.after, cell.states);
  if (options.chunk) {
    const Chunks chunks{run, options.chunk, options.together};
    return forward_in_chunks(chunks, f, take_met(chunks, out));
  }
  f.parts = out.take();
  Weights weights = forward_weights(run);
  forward_steps(run, f, weights);
}

void run_backward(const Cell& cell, const Array* args, const Array* rets, const Options& options) {
  Arrays in{args}, out{rets, true};
  Backward f{};
  const Run run = start(cell, in, f, options.reverse);
  const Chunks chunks{run, options.chunk, options.together};
  const float* b = in.take();
  Met met{};
  if (options.chunk) {
    met = take_met(chunks, in);
    f.after.resize(cell.states);
  } else {
    in.take(f.after, cell.states);
    f.parts = in.take();
  }
  f.parts_row = options.parts_row;
  f.kept_rows = run.N;
  in.take(f.dlast, cell.states);
  in.take(f.dafter, cell.states);
  f.dx = out.take();
  f.dw_ih = out.take();
  f.dw_hh = out.take();
  out.take(f.dtheta, cell.thetas);
  out.take(f.dstate, cell.states);
  out.take(f.drestart, cell.states);
  f.db = out.take();
  if (options.chunk) return backward_in_chunks(chunks, f, met, b, out.take());
  Weights weights = backward_weights(run, f.dx != nullptr);
  backward_steps(run, f, weights);
}
