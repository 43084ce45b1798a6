// Functions of numbers. Each has one overload for each type, so that an ambiguous call is an error, as in Metal.
#pragma once

#ifndef INFINITY
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f

namespace metal {
#define EMU_EACH_SIZE(M, name) M(2, name) M(3, name) M(4, name)

#define EMU_UNARY_VECTOR(N, name)                     \
  EMU_INLINE float##N name(float##N x) {              \
    float##N r;                                       \
    for (int i = 0; i < N; i++) r[i] = name(x[i]);    \
    return r;                                         \
  }
#define EMU_UNARY(name, value)                                    \
  EMU_INLINE float name(float x) { return value; }                \
  EMU_INLINE half name(half x) { return half(name(float(x))); }   \
  EMU_EACH_SIZE(EMU_UNARY_VECTOR, name)

EMU_UNARY(exp, __builtin_expf(x))
EMU_UNARY(exp2, __builtin_exp2f(x))
EMU_UNARY(log, __builtin_logf(x))
EMU_UNARY(log2, __builtin_log2f(x))
EMU_UNARY(sqrt, __builtin_sqrtf(x))
EMU_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
EMU_UNARY(fabs, __builtin_fabsf(x))
EMU_UNARY(floor, __builtin_floorf(x))
EMU_UNARY(ceil, __builtin_ceilf(x))
EMU_UNARY(trunc, __builtin_truncf(x))
EMU_UNARY(rint, __builtin_rintf(x))
EMU_UNARY(round, __builtin_roundf(x))
EMU_UNARY(sin, __builtin_sinf(x))
EMU_UNARY(cos, __builtin_cosf(x))
EMU_UNARY(tan, __builtin_tanf(x))
EMU_UNARY(tanh, __builtin_tanhf(x))
EMU_UNARY(saturate, x < 0 ? 0.0f : x > 1 ? 1.0f : x)
EMU_INLINE float pow(float x, float y) { return __builtin_powf(x, y); }
EMU_INLINE float powr(float x, float y) { return __builtin_powf(x, y); }
EMU_INLINE float fmod(float x, float y) { return __builtin_fmodf(x, y); }
EMU_INLINE bool isnan(float x) { return x != x; }
EMU_INLINE bool isinf(float x) { return __builtin_fabsf(x) == INFINITY; }

namespace precise {
using namespace metal;
}
namespace fast {
using namespace metal;
}

EMU_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMU_INLINE half fma(half a, half b, half c) { return half(__builtin_fma(double(a), double(b), double(c))); }
EMU_INLINE float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
EMU_INLINE float fmin(float a, float b) { return __builtin_fminf(a, b); }

#define EMU_ORDER(T)                                                                              \
  EMU_INLINE T min(T a, T b) { return b < a ? b : a; }                                            \
  EMU_INLINE T max(T a, T b) { return a < b ? b : a; }                                            \
  EMU_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }                       \
  EMU_INLINE T select(T a, T b, bool which) { return which ? b : a; }
EMU_ORDER(float)
EMU_ORDER(half)
EMU_ORDER(bfloat)
EMU_ORDER(int)
EMU_ORDER(uint)
EMU_ORDER(short)
EMU_ORDER(ushort)
EMU_ORDER(long)
EMU_ORDER(ulong)
EMU_INLINE float abs(float x) { return __builtin_fabsf(x); }
EMU_INLINE half abs(half x) { return x < 0 ? -x : x; }
EMU_INLINE int abs(int x) { return x < 0 ? -x : x; }
EMU_INLINE int popcount(uint x) { return __builtin_popcount(x); }
EMU_INLINE uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
EMU_INLINE float mix(float a, float b, float t) { return a + (b - a) * t; }

#define EMU_VECTOR_MATH(N, T)                                                                     \
  EMU_INLINE T##N fma(T##N a, T##N b, T##N c) { return __builtin_elementwise_fma(a, b, c); }      \
  EMU_INLINE T##N min(T##N a, T##N b) { return b < a ? b : a; }                                   \
  EMU_INLINE T##N max(T##N a, T##N b) { return a < b ? b : a; }                                   \
  EMU_INLINE T##N abs(T##N x) { return x < 0 ? -x : x; }                                          \
  EMU_INLINE T##N clamp(T##N x, T##N low, T##N high) { return min(max(x, low), high); }           \
  EMU_INLINE T dot(T##N a, T##N b) {                                                              \
    T sum = a[0] * b[0];                                                                          \
    for (int i = 1; i < N; i++) sum += a[i] * b[i];                                               \
    return sum;                                                                                   \
  }                                                                                               \
  EMU_INLINE T length_squared(T##N a) { return dot(a, a); }                                       \
  EMU_INLINE T length(T##N a) { return sqrt(dot(a, a)); }
EMU_EACH_SIZE(EMU_VECTOR_MATH, float)
EMU_EACH_SIZE(EMU_VECTOR_MATH, half)
}  // namespace metal
