// The code shared by all functions that XLA calls. It uses the C interface to XLA's foreign functions, since the C++
// interface takes seconds to compile. It is compiled for one version of jaxlib, whose header it needs.

#pragma once

#include <cstring>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/c_api.h"

namespace {

XLA_FFI_Error* failure(const XLA_FFI_CallFrame& frame, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args{};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.errc = code;
  args.message = message;
  return frame.api->XLA_FFI_Error_Create(&args);
}

// When a function is registered, XLA asks it for the version of the interface that it was compiled for.
XLA_FFI_Error* describe(XLA_FFI_Metadata& metadata) {
  metadata.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  metadata.traits = 0;
  metadata.state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return nullptr;
}

Array plain(const void* operand) {
  const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(operand);
  Array array{buffer.data, 1, {}};
  for (int64_t i = 0; i < buffer.rank; ++i) {
    array.count *= buffer.dims[i];
    if (i < 3) array.dims[i] = buffer.dims[i];
  }
  return array;
}

std::vector<Array> plain(void* const* operands, int64_t count) {
  std::vector<Array> arrays;
  for (int64_t i = 0; i < count; ++i) arrays.push_back(plain(operands[i]));
  return arrays;
}

// Finds a 64-bit integer among the attributes of a call.
bool find(const XLA_FFI_Attrs& attrs, const char* name, long& value) {
  for (int64_t i = 0; i < attrs.size; ++i) {
    const XLA_FFI_ByteSpan& found = *attrs.names[i];
    if (found.len != std::strlen(name) || std::memcmp(found.ptr, name, found.len)) continue;
    const auto* scalar = static_cast<const XLA_FFI_Scalar*>(attrs.attrs[i]);
    if (attrs.types[i] != XLA_FFI_AttrType_SCALAR || scalar->dtype != XLA_FFI_DataType_S64) return false;
    value = *static_cast<const int64_t*>(scalar->value);
    return true;
  }
  return false;
}

}  // namespace
