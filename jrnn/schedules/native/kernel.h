// What bind.cc, which XLA calls, and kernel.cc, which knows nothing of XLA, say to each other.

#pragma once

#include <cstdint>

struct Array {
  void* data;
  long count;
  long dims[3];
};

extern "C" {
void jrnn_run_forward(const Array* args, const Array* rets, bool reverse, long parts_row);
void jrnn_run_backward(const Array* args, const Array* rets, bool reverse, long parts_row);
}
