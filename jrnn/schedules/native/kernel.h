// The interface between the parts of the kernel: bind.cc, which XLA calls; kernel.cc, the loop, the same for all cells;
// and cell.cc, a library for each cell that holds only its gates. Sizes: N sequences, H units, in blocks of UB.

#pragma once

struct Array {
  void* data;
  long count;
  long dims[3];
};

// One step of sequences n0 to n1 and blocks of units b0 to b1. Unless noted, arrays begin at sequence 0 and unit 0.
struct ForwardTile {
  long n0, n1, b0, b1, H;
  const unsigned char *valid, *resets;  // (N,) or null
  const float* theta;                   // [vector][unit], vectors theta_row apart
  long theta_row;
  const float* parts;  // from n0 and b0: [sequence][block][part][UB], sequences parts_row apart
  long parts_row;
  const float *const *old, *const *restart;  // [state] (N, H); restart is used only with resets
  float* const* now;                         // [state] (N, H)
};

struct BackwardTile {
  long n0, n1, b0, b1, H;
  const unsigned char *valid, *resets;
  const float* theta;
  float* dtheta;  // the sum over sequences is added to it
  long theta_row;
  const float* parts;
  long parts_row;
  const float *const *old, *const *restart;
  const float* const* dafter;  // [state] (N, H), or null: the cotangents of the outputs
  float* carry;      // [state][sequence][unit]: the cotangent of the new state, replaced by that of the old
  long carry_state, carry_row;
  float *du, *dv;  // from n0 and b0: [sequence][block][gate][UB], sequences d_row apart; equal if all gates use u + v
  long d_row;
};

// A cell, as the loop sees it.
struct Cell {
  int gates, sums, parts, states, hidden_state, thetas;  // as in cell.h
  const int* slot;
  void (*forward)(const ForwardTile&);
  void (*backward)(const BackwardTile&);
};

// The attributes of a call. parts_row: the floats in a row of gate inputs. If only the state before each chunk of steps
// is a residual, chunk is its length and together the number of chunks that are recomputed at once; else both are 0.
struct Options {
  bool reverse;
  long parts_row, chunk, together;
};

void run_forward(const Cell& cell, const Array* args, const Array* rets, const Options& options);
void run_backward(const Cell& cell, const Array* args, const Array* rets, const Options& options);
