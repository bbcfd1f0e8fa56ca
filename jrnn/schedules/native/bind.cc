// The functions of the loop that XLA calls.

#include <exception>

#include "ffi.h"

namespace {

using Run = void (*)(const Cell&, const Array*, const Array*, const Options&);

XLA_FFI_Error* call(XLA_FFI_CallFrame* frame, const Cell* cell, Run run) {
  if (frame->struct_size != XLA_FFI_CallFrame_STRUCT_SIZE)
    return failure(*frame, XLA_FFI_Error_Code_FAILED_PRECONDITION, "jrnn: the loop was compiled for another jaxlib");
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata)
    return describe(*reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata);
  Options options{};
  long reverse = 0;
  const XLA_FFI_Attrs& attrs = frame->attrs;
  if (!find(attrs, "reverse", reverse) || !find(attrs, "parts_row", options.parts_row) ||
      !find(attrs, "chunk", options.chunk) || !find(attrs, "together", options.together))
    return failure(*frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "jrnn: an option of the loop is missing");
  options.reverse = reverse != 0;
  try {
    const std::vector<Array> in = plain(frame->args.args, frame->args.size);
    const std::vector<Array> out = plain(frame->rets.rets, frame->rets.size);
    run(*cell, in.data(), out.data(), options);
  } catch (const std::exception& error) {  // no memory, or no threads
    return failure(*frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, error.what());
  }
  return nullptr;
}

}  // namespace

// The functions that a cell's library calls (see cell.cc).
extern "C" {
XLA_FFI_Error* jrnn_enter_forward(XLA_FFI_CallFrame* frame, const Cell* cell) {
  return call(frame, cell, run_forward);
}
XLA_FFI_Error* jrnn_enter_backward(XLA_FFI_CallFrame* frame, const Cell* cell) {
  return call(frame, cell, run_backward);
}
}
