// The kernel as XLA calls it. Compiled once for a version of jaxlib, whose headers it needs, and linked to every kernel.

#include <exception>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

Array plain(ffi::AnyBuffer buffer) {
  Array array{buffer.untyped_data(), static_cast<long>(buffer.element_count()), {}};
  for (size_t i = 0; i < buffer.dimensions().size() && i < 3; ++i) array.dims[i] = buffer.dimensions()[i];
  return array;
}

template <auto run>
ffi::Error call(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t reverse, int64_t parts_row) {
  std::vector<Array> in, out;
  for (size_t i = 0; i < args.size(); ++i) in.push_back(plain(*args.get<ffi::AnyBuffer>(i)));
  for (size_t i = 0; i < rets.size(); ++i) out.push_back(plain(**rets.get<ffi::AnyBuffer>(i)));
  try {
    run(in.data(), out.data(), reverse != 0, parts_row);
  } catch (const std::exception& error) {  // no memory
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

#define BIND ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<int64_t>("reverse").Attr<int64_t>("parts_row")
XLA_FFI_DEFINE_HANDLER_SYMBOL(jrnn_forward, call<jrnn_run_forward>, BIND);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jrnn_backward, call<jrnn_run_backward>, BIND);
