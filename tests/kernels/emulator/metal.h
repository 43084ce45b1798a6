// The part of the Metal standard library that kernels here may use. With EMU_CHECK the address spaces are real and bfloat
// is a builtin type (clang then finds mixed spaces and writes to constants); without, memory is plain and bfloat strict.
#pragma once
#include "runtime.h"

#ifdef EMU_CHECK
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread
#define EMU_INLINE inline __attribute__((always_inline))

#define EMU_PLAIN(...) __VA_ARGS__
// A `threadgroup T name[n];` of the source: a reference to the memory that the threads share.
#define EMU_THREADGROUP(site, name, dimensions, ...)                             \
  typedef __VA_ARGS__ emu_type_##name EMU_PLAIN dimensions;                      \
  threadgroup emu_type_##name& name = *(threadgroup emu_type_##name*)emu_threadgroup_memory(site, sizeof(emu_type_##name))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef _Float16 half;
typedef half float16_t;

#ifdef EMU_CHECK
typedef __bf16 bfloat;
#else
// Rounds to nearest even; comes from another type only by an explicit conversion, as in Metal.
struct bfloat {
  ushort bits;
  bfloat() = default;
  template <class T>
  EMU_INLINE explicit bfloat(T value) {
    uint b = __builtin_bit_cast(uint, float(value));
    bits = value != value ? b >> 16 | 64 : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  }
  EMU_INLINE operator float() const { return __builtin_bit_cast(float, uint(bits) << 16); }
#define EMU_OPERATOR(op)                                                                                      \
  friend EMU_INLINE bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }           \
  friend EMU_INLINE bfloat& operator op##=(bfloat & a, bfloat b) { return a = bfloat(float(a) op float(b)); }
  EMU_OPERATOR(+)
  EMU_OPERATOR(-)
  EMU_OPERATOR(*)
  EMU_OPERATOR(/)
#undef EMU_OPERATOR
};
#endif
typedef bfloat bfloat16_t;

// emu_vec<T, N>: the vector type, its packed form, and make(...), which stands where Metal calls a constructor.
template <class T, int N>
struct emu_vec {
  typedef T type __attribute__((ext_vector_type(N)));
  typedef T packed __attribute__((ext_vector_type(N), aligned(alignof(T))));
  static EMU_INLINE type make(T x) { return type(x); }
  static EMU_INLINE type make(T x, T y) { return type{x, y}; }
  static EMU_INLINE type make(T x, T y, T z) { return type{x, y, z}; }
  static EMU_INLINE type make(T x, T y, T z, T w) { return type{x, y, z, w}; }
  template <class U>
  static EMU_INLINE type make(U __attribute__((ext_vector_type(N))) from) { return __builtin_convertvector(from, type); }
  template <class V, class = typename V::emu_elements>
  static EMU_INLINE type make(V from) {
    type r;
    for (int i = 0; i < N; i++) r[i] = T(from[i]);
    return r;
  }
};

#ifndef EMU_CHECK
template <int N>
struct emu_bfloats {
  typedef bfloat emu_elements;
  bfloat e[N];
  EMU_INLINE bfloat& operator[](int i) { return e[i]; }
  EMU_INLINE bfloat operator[](int i) const { return e[i]; }
};
template <int N>
struct emu_vec<bfloat, N> {
  typedef emu_bfloats<N> packed;
  struct alignas(2 * (N == 3 ? 4 : N)) type : emu_bfloats<N> {};
  static EMU_INLINE type make(bfloat x) {
    type r;
    for (int i = 0; i < N; i++) r[i] = x;
    return r;
  }
  template <class... A>
  static EMU_INLINE type make(bfloat x, bfloat y, A... rest) { return type{{{x, y, rest...}}}; }
  template <class V, class = decltype(V()[0])>
  static EMU_INLINE type make(V from) {
    type r;
    for (int i = 0; i < N; i++) r[i] = bfloat(from[i]);
    return r;
  }
};
#endif

#define EMU_VECTORS(T)                                                                               \
  typedef emu_vec<T, 2>::type T##2;                                                                  \
  typedef emu_vec<T, 3>::type T##3;                                                                  \
  typedef emu_vec<T, 4>::type T##4;                                                                  \
  typedef emu_vec<T, 2>::packed packed_##T##2;                                                       \
  typedef emu_vec<T, 3>::packed packed_##T##3;                                                       \
  typedef emu_vec<T, 4>::packed packed_##T##4;
EMU_VECTORS(float)
EMU_VECTORS(half)
EMU_VECTORS(bfloat)
EMU_VECTORS(int)
EMU_VECTORS(uint)
EMU_VECTORS(short)
EMU_VECTORS(ushort)
EMU_VECTORS(char)
EMU_VECTORS(uchar)
EMU_VECTORS(long)
EMU_VECTORS(ulong)

template <class To, class From>
EMU_INLINE To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, x);
}

namespace metal {
template <class T, int N>
using vec = typename emu_vec<T, N>::type;

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
};
template <class A, class B> struct is_same : integral_constant<bool, false> {};
template <class A> struct is_same<A, A> : integral_constant<bool, true> {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool c, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool c, class A, class B> using conditional_t = typename conditional<c, A, B>::type;
}  // namespace metal

#include "metal_math.h"
#include "metal_simd.h"

using namespace metal;
