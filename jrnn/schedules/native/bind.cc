// The loop as XLA calls it. Compiled once for a version of jaxlib, whose headers it needs.

#include <exception>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

thread_local const Cell* called;  // the cell of the call that this thread is in

Array plain(ffi::AnyBuffer buffer) {
  Array array{buffer.untyped_data(), static_cast<long>(buffer.element_count()), {}};
  for (size_t i = 0; i < buffer.dimensions().size() && i < 3; ++i) array.dims[i] = buffer.dimensions()[i];
  return array;
}

template <auto run>
ffi::Error call(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t reverse, int64_t parts_row, int64_t chunk,
                int64_t together) {
  std::vector<Array> in, out;
  for (size_t i = 0; i < args.size(); ++i) in.push_back(plain(*args.get<ffi::AnyBuffer>(i)));
  for (size_t i = 0; i < rets.size(); ++i) out.push_back(plain(**rets.get<ffi::AnyBuffer>(i)));
  try {
    run(*called, in.data(), out.data(), Options{reverse != 0, parts_row, chunk, together});
  } catch (const std::exception& error) {  // no memory, or no threads
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

#define BIND                              \
  ffi::Ffi::Bind()                        \
      .RemainingArgs()                    \
      .RemainingRets()                    \
      .Attr<int64_t>("reverse")           \
      .Attr<int64_t>("parts_row")         \
      .Attr<int64_t>("chunk")             \
      .Attr<int64_t>("together")
XLA_FFI_DEFINE_HANDLER(forward, call<run_forward>, BIND);
XLA_FFI_DEFINE_HANDLER(backward, call<run_backward>, BIND);

// What a cell's library calls (see cell.cc).
extern "C" {
XLA_FFI_Error* jrnn_enter_forward(XLA_FFI_CallFrame* frame, const Cell* cell) {
  called = cell;
  return forward(frame);
}
XLA_FFI_Error* jrnn_enter_backward(XLA_FFI_CallFrame* frame, const Cell* cell) {
  called = cell;
  return backward(frame);
}
}
