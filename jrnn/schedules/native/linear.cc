// The diagonal linear recurrence h[t] = a[t] * h[t-1] + b[t] and its gradient, as functions that XLA calls. Both are
// bound by memory, so each array is read once and each result is written once, past the caches if it is large.
//
// Arrays are (T, B, W): N = B * W independent columns. a may be (1, B, W), the same at every step. resets is (T, B), or
// has no elements if there are no resets. A complex number is two reals.

#include <algorithm>
#include <cstdint>
#include <exception>

#include "ffi.h"
#include "threads.h"

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR = 64;  // bytes
#elif defined(__AVX__)
constexpr int VECTOR = 32;
#else
constexpr int VECTOR = 16;
#endif

template <int size>
struct Bits;
template <>
struct Bits<4> {
  using type = int32_t;
};
template <>
struct Bits<8> {
  using type = int64_t;
};

// W reals.
template <class R, int W>
struct Vector {
  typedef R type __attribute__((vector_size(W * sizeof(R))));
  typedef typename Bits<sizeof(R)>::type mask __attribute__((vector_size(W * sizeof(R))));

  static type load(const R* p) {
    type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(R* p, type v) { __builtin_memcpy(p, &v, sizeof v); }
  static void stream(R* p, type v) {
#if defined(__AVX512F__)
    if constexpr (sizeof v == 64) {
      asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<type*>(p)) : "v"(v));
      return;
    }
#elif defined(__AVX__)
    if constexpr (sizeof v == 32) {
      asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<type*>(p)) : "x"(v));
      return;
    }
#endif
    store(p, v);
  }
};

template <class R, int W, class V = typename Vector<R, W>::type>
V times(V x, V y, std::false_type) {
  return x * y;
}

// The complex product of interleaved real and imaginary parts: (xr yr - xi yi, xr yi + xi yr).
template <class R, int W, class V = typename Vector<R, W>::type>
V times(V x, V y, std::true_type) {
  V real, imaginary, turned, sign;
#if defined(__clang__)
  for (int i = 0; i < W; ++i) real[i] = x[i & ~1], imaginary[i] = x[i | 1], turned[i] = y[i ^ 1];
#else
  typename Vector<R, W>::mask first, second, other;
  for (int i = 0; i < W; ++i) first[i] = i & ~1, second[i] = i | 1, other[i] = i ^ 1;
  real = __builtin_shuffle(x, first), imaginary = __builtin_shuffle(x, second), turned = __builtin_shuffle(y, other);
#endif
  for (int i = 0; i < W; ++i) sign[i] = i % 2 ? 1 : -1;
  return real * y + imaginary * turned * sign;
}

// The rows of an array: a pointer to the first row, and the distance from one row to the next.
template <class P>
struct Rows {
  P* at;
  long step;
  P* operator()(long i) const { return at + i * step; }
  Rows from(long i, long columns) const { return {at ? at + i * step + columns : nullptr, step}; }
};

// Some steps of some columns. `carry` holds h before the first of these steps, and afterwards h of the last.
template <class R>
struct Forward {
  static constexpr int arrays = 3;
  Rows<const R> a, b;
  Rows<R> h;

  Forward from(long t, long c) const { return {a.from(t, c), b.from(t, c), h.from(t, c)}; }

  template <int W, bool complex, bool stream>
  void step(long t, long c, typename Vector<R, W>::type& carry) const {
    using V = Vector<R, W>;
    carry = times<R, W>(V::load(a(t) + c), carry, std::bool_constant<complex>()) + V::load(b(t) + c);
    stream ? V::stream(h(t) + c, carry) : V::store(h(t) + c, carry);
  }
};

// The same steps backwards. With l[t] = dh[t] + a[t+1] * l[t+1]: db[t] = l[t] and da[t] = l[t] * h[t-1], where `before`
// is h[t-1]. `carry` holds a[t+1] * l[t+1] of the step after these, and afterwards a[t] * l[t] of the first of them.
template <class R>
struct Backward {
  static constexpr int arrays = 5;
  Rows<const R> a, before, dh;
  Rows<R> da, db;  // da and before are null if not needed; if a is the same at every step, da is a sum

  Backward from(long t, long c) const {
    return {a.from(t, c), before.from(t, c), dh.from(t, c), da.from(t, c), db.from(t, c)};
  }

  template <int W, bool complex, bool stream>
  void step(long t, long c, typename Vector<R, W>::type& carry) const {
    using V = Vector<R, W>;
    const auto kind = std::bool_constant<complex>();
    const auto d = V::load(dh(t) + c) + carry;
    stream ? V::stream(db(t) + c, d) : V::store(db(t) + c, d);
    if (da.at) {
      auto found = times<R, W>(d, V::load(before(t) + c), kind);
      if (da.step)
        stream ? V::stream(da(t) + c, found) : V::store(da(t) + c, found);
      else
        V::store(da(0) + c, V::load(da(0) + c) + found);
    }
    carry = times<R, W>(V::load(a(t) + c), d, kind);
  }
};

// All steps of W * K columns, with the carry in registers.
template <int W, int K, bool complex, class R, class Work>
void strip(const Work& work, long steps, long c, R* carry) {
  typename Vector<R, W>::type held[K];
  for (int k = 0; k < K; ++k) held[k] = Vector<R, W>::load(carry + c + k * W);
  for (long t = 0; t < steps; ++t)
    for (int k = 0; k < K; ++k) work.template step<W, complex, false>(t, c + k * W, held[k]);
  for (int k = 0; k < K; ++k) Vector<R, W>::store(carry + c + k * W, held[k]);
}

template <int W, bool complex, class R, class Work>
void narrow(const Work& work, long steps, long c, long columns, R* carry) {
  for (; columns - c >= W; c += W) strip<W, 1, complex>(work, steps, c, carry);
  if constexpr (W > (complex ? 2 : 1)) narrow<W / 2, complex>(work, steps, c, columns, carry);
}

template <bool complex, bool stream, class R, class Work>
void wide(const Work& work, long steps, long columns, R* carry) {
  constexpr int W = VECTOR / sizeof(R);
  for (long t = 0; t < steps; ++t) {
    long c = 0;
    for (; columns - c >= W; c += W) {
      auto held = Vector<R, W>::load(carry + c);
      work.template step<W, complex, stream>(t, c, held);
      Vector<R, W>::store(carry + c, held);
    }
    if (c < columns) narrow<W / 2, complex>(work.from(t, 0), 1, c, columns, carry);
  }
}

constexpr long WIDE = 128;                // columns of a step that is long enough for the memory's full speed
constexpr long TILE = 128 << 10;          // bytes of all arrays in a tile of few columns
constexpr long STREAMED = 8 << 20;        // bytes from which on a result bypasses the caches
constexpr long SHARE = 1 << 15;           // numbers for which another thread pays

template <bool complex, class R, class Work>
void tile(const Work& work, long steps, long columns, R* carry, bool stream) {
  constexpr int W = VECTOR / sizeof(R);
  if (columns >= WIDE)
    return stream ? wide<complex, true>(work, steps, columns, carry) : wide<complex, false>(work, steps, columns, carry);
  const long most = std::max<long>(1, TILE / static_cast<long>(sizeof(R)) / Work::arrays / columns);
  for (long t = 0; t < steps; t += most) {
    const Work part = work.from(t, 0);
    const long count = std::min(most, steps - t);
    long c = 0;
    for (; columns - c >= 4 * W; c += 4 * W) strip<W, 4, complex>(part, count, c, carry);
    narrow<W, complex>(part, count, c, columns, carry);
  }
}

// --- whole calls -------------------------------------------------------------------------------------------------

// The resets of each step among the columns c0 to c1, in reals.
struct Resets {
  const uint8_t* flags;  // (T, B) or null
  long sequences, width, c0, c1;  // width: the number of reals of a sequence

  bool any(long t) const {
    if (!flags) return false;
    const uint8_t* row = flags + t * sequences;
    return std::any_of(row + c0 / width, row + (c1 - 1) / width + 1, [](uint8_t flag) { return flag; });
  }
  template <class Function>
  void each(long t, Function work) const {  // work(first, last) on the columns of each sequence that is reset
    for (long s = c0 / width; s <= (c1 - 1) / width; ++s)
      if (flags[t * sequences + s]) work(std::max(c0, s * width), std::min(c1, (s + 1) * width));
  }
  // `to` begins at column c0, `from` at column 0.
  template <class R>
  void clear(long t, R* to) const {
    each(t, [&](long first, long last) { std::fill(to + first - c0, to + last - c0, R(0)); });
  }
  template <class R>
  void copy(long t, const R* from, R* to) const {
    each(t, [&](long first, long last) { std::copy(from + first, from + last, to + first - c0); });
  }
};

struct Sizes {
  long time, columns, sequences;  // columns in reals
  bool constant, reverse;         // a is the same at every step
};

// Runs work(c0, c1) over all columns, on threads that take whole cache lines each.
template <class R, class Function>
void share_columns(const Sizes& sizes, Function work) {
  const long line = 64 / sizeof(R), lines = (sizes.columns + line - 1) / line;
  const long wanted = std::min({static_cast<long>(processors()), lines, sizes.time * sizes.columns / SHARE});
  Crew crew(std::max(1L, wanted));
  crew.run(crew.size(), [&](long id) {
    const auto [first, last] = share(lines, crew.size(), id);
    const long c0 = first * line, c1 = std::min(sizes.columns, last * line);
    if (c0 < c1) work(c0, c1);
    __sync_synchronize();
  });
}

bool streams(const Sizes& sizes, size_t real, std::initializer_list<const void*> results) {
  bool aligned = sizes.columns * real % VECTOR == 0;
  for (const void* p : results) aligned = aligned && reinterpret_cast<uintptr_t>(p) % VECTOR == 0;
  return aligned && sizes.time * sizes.columns * static_cast<long>(real) >= STREAMED;
}

template <bool complex, class R>
void forward(const Sizes& sizes, const R* a, const R* b, const R* h0, const uint8_t* flags, R* h) {
  const long T = sizes.time, N = sizes.columns, way = sizes.reverse ? -1 : 1, begin = sizes.reverse ? T - 1 : 0;
  const bool stream = streams(sizes, sizeof(R), {h});
  share_columns<R>(sizes, [&](long c0, long c1) {
    const Resets resets{flags, sizes.sequences, flags ? N / sizes.sequences : N, c0, c1};
    const Forward<R> all{{a + (sizes.constant ? 0 : begin * N), sizes.constant ? 0 : way * N},
                         {b + begin * N, way * N},
                         {h + begin * N, way * N}};
    Scratch scratch((c1 - c0) * sizeof(R) / 4 + 16);
    R* carry = reinterpret_cast<R*>(scratch.take((c1 - c0) * sizeof(R) / 4));
    std::copy(h0 + c0, h0 + c1, carry);
    for (long i = 0; i < T;) {
      const long t = begin + way * i;
      const bool reset = resets.any(t);
      long next = flags ? i + 1 : T;
      while (!reset && next < T && !resets.any(begin + way * next)) ++next;
      tile<complex>(all.from(i, c0), next - i, c1 - c0, carry, stream && !reset);
      if (reset) {  // h is b, even if a is NaN
        resets.copy(t, b + t * N, h + t * N + c0);
        resets.copy(t, b + t * N, carry);
      }
      i = next;
    }
  });
}

template <bool complex, class R>
void backward(const Sizes& sizes, const R* a, const R* h0, const R* h, const R* dh, const uint8_t* flags, R* da, R* db,
              R* dh0) {
  // From the last step to the first: i counts the steps in this order, and the step itself is begin + way * i.
  const long T = sizes.time, N = sizes.columns, way = sizes.reverse ? 1 : -1, begin = sizes.reverse ? 0 : T - 1;
  const bool stream = streams(sizes, sizeof(R), {da, db});
  share_columns<R>(sizes, [&](long c0, long c1) {
    const long columns = c1 - c0;
    const Resets resets{flags, sizes.sequences, flags ? N / sizes.sequences : N, c0, c1};
    const Backward<R> all{{a + (sizes.constant ? 0 : begin * N), sizes.constant ? 0 : way * N},
                          {h ? h + (begin + way) * N : nullptr, way * N},
                          {dh + begin * N, way * N},
                          {da ? da + (sizes.constant ? 0 : begin * N) : nullptr, sizes.constant ? 0 : way * N},
                          {db + begin * N, way * N}};
    Scratch scratch(2 * (columns * sizeof(R) / 4 + 16));
    R* carry = reinterpret_cast<R*>(scratch.take(columns * sizeof(R) / 4));
    R* before = reinterpret_cast<R*>(scratch.take(columns * sizeof(R) / 4));
    std::fill(carry, carry + columns, R(0));
    if (da && sizes.constant) std::fill(da + c0, da + c1, R(0));
    for (long i = 0; i < T;) {
      const long t = begin + way * i;
      const bool reset = resets.any(t);
      if (!reset && i < T - 1) {  // all steps up to the next reset, whose h before them is in memory
        long next = flags ? i + 1 : T - 1;
        while (next < T - 1 && !resets.any(begin + way * next)) ++next;
        tile<complex>(all.from(i, c0), next - i, columns, carry, stream);
        i = next;
        continue;
      }
      if (da) {
        const R* source = (i < T - 1 ? h + (t + way) * N : h0) + c0;
        std::copy(source, source + columns, before);
        if (reset) resets.clear(t, before);
      }
      Backward<R> one = all.from(i, c0);
      one.before = {before, 0};
      tile<complex>(one, 1, columns, carry, stream);
      if (reset) resets.clear(t, carry);
      ++i;
    }
    std::copy(carry, carry + columns, dh0 + c0);
  });
}

// --- the functions that XLA calls --------------------------------------------------------------------------------

template <class R>
R* data(const Array& array) {
  return array.count ? static_cast<R*>(array.data) : nullptr;
}

template <bool complex, class R>
void run(bool is_forward, bool reverse, const std::vector<Array>& in, const std::vector<Array>& out) {
  const Array &a = in[0], &h = in[is_forward ? 1 : 3];
  const long columns = h.dims[1] * h.dims[2] * (complex ? 2 : 1);
  const Sizes sizes{h.dims[0], columns, h.dims[1], a.dims[0] == 1, reverse};
  for (const Array& array : out) in_large_pages(array.data, array.count * sizeof(R) * (complex ? 2 : 1));
  const auto* flags = data<const uint8_t>(in.back());
  const auto given = [&](int i) { return data<const R>(in[i]); };
  const auto made = [&](int i) { return data<R>(out[i]); };
  if (is_forward)
    forward<complex>(sizes, given(0), given(1), given(2), flags, made(0));
  else
    backward<complex>(sizes, given(0), given(1), given(2), given(3), flags, made(0), made(1), made(2));
}

XLA_FFI_Error* call(XLA_FFI_CallFrame* frame, bool is_forward) {
  if (frame->struct_size != XLA_FFI_CallFrame_STRUCT_SIZE)
    return failure(*frame, XLA_FFI_Error_Code_FAILED_PRECONDITION, "jrnn: linear_scan was compiled for another jaxlib");
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata)
    return describe(*reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata);
  long reverse = 0;
  if (!find(frame->attrs, "reverse", reverse))
    return failure(*frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "jrnn: an option of linear_scan is missing");
  try {
    const std::vector<Array> in = plain(frame->args.args, frame->args.size);
    const std::vector<Array> out = plain(frame->rets.rets, frame->rets.size);
    switch (static_cast<const XLA_FFI_Buffer*>(frame->args.args[1])->dtype) {
      case XLA_FFI_DataType_F32:
        run<false, float>(is_forward, reverse != 0, in, out);
        break;
      case XLA_FFI_DataType_F64:
        run<false, double>(is_forward, reverse != 0, in, out);
        break;
      case XLA_FFI_DataType_C64:
        run<true, float>(is_forward, reverse != 0, in, out);
        break;
      case XLA_FFI_DataType_C128:
        run<true, double>(is_forward, reverse != 0, in, out);
        break;
      default:
        return failure(*frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "jrnn: linear_scan takes floats of 32 or 64 bits");
    }
  } catch (const std::exception& error) {  // no memory, or no threads
    return failure(*frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, error.what());
  }
  return nullptr;
}

}  // namespace

extern "C" {
XLA_FFI_Error* jrnn_linear_forward(XLA_FFI_CallFrame* frame) { return call(frame, true); }
XLA_FFI_Error* jrnn_linear_backward(XLA_FFI_CallFrame* frame) { return call(frame, false); }
}
