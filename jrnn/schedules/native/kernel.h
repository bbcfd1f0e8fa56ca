// What the parts of the kernel say to each other: bind.cc, which XLA calls; kernel.cc, the loop, the same for all cells;
// and cell.cc, a library for each cell with its gates alone. Sizes: N sequences, H units, in blocks of UB.

#pragma once

struct Array {
  void* data;
  long count;
  long dims[3];
};

// One step of sequences n0 to n1 and blocks of units b0 to b1. Arrays begin at sequence 0 and unit 0 unless said.
struct ForwardTile {
  long n0, n1, b0, b1, H;
  const unsigned char *valid, *resets;  // (N,) or null
  const float* theta;                   // [vector][unit], a vector every theta_row
  long theta_row;
  const float* parts;  // from n0 and b0: [sequence][block][part][UB], a sequence every parts_row
  long parts_row;
  const float *const *old, *const *restart;  // [state] (N, H); restart where there are resets
  float* const* now;                         // [state] (N, H)
};

struct BackwardTile {
  long n0, n1, b0, b1, H;
  const unsigned char *valid, *resets;
  const float* theta;
  float* dtheta;  // summed over sequences, onto what is there
  long theta_row;
  const float* parts;
  long parts_row;
  const float *const *old, *const *restart;
  const float* const* dafter;  // [state] (N, H), or null: what the state is told from outside the loop
  float* carry;      // [state][sequence][unit]: the gradient of the new state, then that of the old
  long carry_state, carry_row;
  float *du, *dv;  // from n0 and b0: [sequence][block][gate][UB], a sequence every d_row; the same where all gates sum
  long d_row;
};

// A cell, as the loop knows it.
struct Cell {
  int gates, sums, parts, states, hidden_state, thetas;  // as in cell.h
  const int* slot;
  void (*forward)(const ForwardTile&);
  void (*backward)(const BackwardTile&);
};

// Beside operands and results: the floats of a row of what the gates read; and, where only the states before each chunk
// of steps are kept, its length and how many are made again together, else 0.
struct Options {
  bool reverse;
  long parts_row, chunk, together;
};

void run_forward(const Cell& cell, const Array* args, const Array* rets, const Options& options);
void run_backward(const Cell& cell, const Array* args, const Array* rets, const Options& options);
