// A cell's gates over a tile. Compiled once for each cell, with cell.h, which emit.py writes and which defines
//   GATES, SUMS (gates that use only u + v), PARTS (GATES, and one more for each gate that uses u and v separately),
//   SLOT[g] (the index of v of gate g among the parts), STATES, HIDDEN_STATE (the index of h), THETAS, TABLES (constant
//   arrays), and the functions load_tables(unit, tables), gates(theta, parts, state, tables, new) and
//   gates_vjp(theta, parts, state, dnew, tables, dtheta, dparts, dstate) on vectors.

#include "kernel.h"
#include "vectors.h"

namespace {

#include "cell.h"

void forward(const ForwardTile& t) {
  for (long n = t.n0; n < t.n1; ++n) {
    const bool held = t.valid && !t.valid[n], reset = t.resets && t.resets[n];
    const float* const* from = reset ? t.restart : t.old;
    for (long v = 2 * t.b0; v < 2 * t.b1; ++v) {
      const long unit = v * VL, lanes = t.H - unit, at = n * t.H + unit;
      if (lanes <= 0) break;
      vf theta[THETAS + 1], table[TABLES + 1], part[PARTS], old[STATES], now[STATES];
      for (int s = 0; s < STATES; ++s) old[s] = load(from[s] + at, lanes);
      if (held) {
        for (int s = 0; s < STATES; ++s) now[s] = old[s];
      } else {
        const float* parts = t.parts + (n - t.n0) * t.parts_row + (v / 2 - t.b0) * PARTS * UB + v % 2 * VL;
        for (int j = 0; j < THETAS; ++j) theta[j] = load(t.theta + j * t.theta_row + unit);
        for (int j = 0; j < PARTS; ++j) part[j] = load(parts + j * UB);
        load_tables(unit, table);
        gates(theta, part, old, table, now);
      }
      for (int s = 0; s < STATES; ++s) store(t.now[s] + at, now[s], lanes);
    }
  }
}

void backward(const BackwardTile& t) {
  for (long v = 2 * t.b0; v < 2 * t.b1; ++v) {
    const long unit = v * VL, lanes = t.H - unit, block = v / 2 - t.b0, half = v % 2 * VL;
    vf theta[THETAS + 1], table[TABLES + 1], sums[THETAS + 1];
    load_tables(unit, table);
    for (int j = 0; j < THETAS; ++j) {
      theta[j] = load(t.theta + j * t.theta_row + unit);
      sums[j] = load(t.dtheta + j * t.theta_row + unit);
    }
    for (long n = t.n0; n < t.n1; ++n) {
      const long place = (n - t.n0) * t.d_row + block * GATES * UB + half;
      float* carry = t.carry + n * t.carry_row + unit;
      vf dnew[STATES], old[STATES], part[PARTS], dpart[PARTS], dold[STATES], dtheta[THETAS + 1];
      for (int s = 0; s < STATES; ++s) dnew[s] = load(carry + s * t.carry_state);
      for (int s = 0; s < STATES; ++s)
        if (t.dafter[s]) dnew[s] += load(t.dafter[s] + n * t.H + unit, lanes);
      if (lanes <= 0 || (t.valid && !t.valid[n])) {
        for (int g = 0; g < GATES; ++g) {
          store(t.du + place + g * UB, vf{});
          if (SUMS != GATES) store(t.dv + place + g * UB, vf{});
        }
        for (int s = 0; s < STATES; ++s) store(carry + s * t.carry_state, dnew[s]);
        continue;
      }
      const float* const* from = t.resets && t.resets[n] ? t.restart : t.old;
      const float* parts = t.parts + (n - t.n0) * t.parts_row + block * PARTS * UB + half;
      for (int s = 0; s < STATES; ++s) old[s] = load(from[s] + n * t.H + unit, lanes);
      for (int j = 0; j < PARTS; ++j) part[j] = load(parts + j * UB);
      gates_vjp(theta, part, old, dnew, table, dtheta, dpart, dold);
      if (lanes < VL) {  // lanes beyond the last unit may hold anything, even NaN
        for (int j = 0; j < PARTS; ++j) dpart[j] = first(dpart[j], lanes);
        for (int s = 0; s < STATES; ++s) dold[s] = first(dold[s], lanes);
      }
      for (int g = 0; g < GATES; ++g) {
        store(t.du + place + g * UB, dpart[g]);
        if (SUMS != GATES) store(t.dv + place + g * UB, dpart[SLOT[g]]);
      }
      for (int s = 0; s < STATES; ++s) store(carry + s * t.carry_state, dold[s]);
      for (int j = 0; j < THETAS; ++j) sums[j] += dtheta[j];
    }
    for (int j = 0; j < THETAS; ++j) store(t.dtheta + j * t.theta_row + unit, sums[j]);
  }
}

constexpr Cell cell{GATES, SUMS, PARTS, STATES, HIDDEN_STATE, THETAS, SLOT, forward, backward};

// The entry points of the loop (see bind.cc), which is a library of its own.
typedef void* (*Entry)(void* frame, const Cell*);
Entry enter_forward, enter_backward;

}  // namespace

extern "C" {
const Cell* jrnn_cell() { return &cell; }
int jrnn_unit_block() { return UB; }
void jrnn_link(Entry forward, Entry backward) { enter_forward = forward, enter_backward = backward; }
void* jrnn_forward(void* frame) { return enter_forward(frame, &cell); }
void* jrnn_backward(void* frame) { return enter_backward(frame, &cell); }
}
