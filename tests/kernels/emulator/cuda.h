// What metal.cuh uses of CUDA, on the emulator's runtime: a warp is a simdgroup, a block a threadgroup.
#pragma once
#include "internal.h"

#define __device__
#define __global__ static
#define EMU_PLAIN(...) __VA_ARGS__
#define EMU_THREADGROUP(site, name, dimensions, ...)     \
  typedef __VA_ARGS__ emu_type_##name EMU_PLAIN dimensions; \
  emu_type_##name& name = *(emu_type_##name*)emu_threadgroup_memory(site, sizeof(emu_type_##name))

typedef unsigned long size_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef emu_uint3 uint3;
struct float4 {  // CUDA's own, without constructors
  float x, y, z, w;
};

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(x) {}
  operator float() const { return value; }
};

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const unsigned b = __builtin_bit_cast(unsigned, x);
    bits = x != x ? b >> 16 | 64 : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  }
  operator float() const { return __builtin_bit_cast(float, unsigned(bits) << 16); }
};

#define threadIdx current->attributes.thread_position_in_threadgroup
#define blockIdx current->attributes.threadgroup_position_in_grid
#define blockDim current->attributes.threads_per_threadgroup

inline void __syncthreads() { emu_barrier(3); }
inline void __syncwarp() { emu_exchange(EMU_BARRIER, 3); }
inline float __shfl_xor_sync(unsigned, float x, unsigned mask) {
  const emu_Exchange* e = emu_exchange(EMU_SHUFFLE, __builtin_bit_cast(unsigned, x));
  return __builtin_bit_cast(float, unsigned(e->slot[emu_lane() ^ mask]));
}

inline float expf(float x) { return __builtin_expf(x); }
inline float logf(float x) { return __builtin_logf(x); }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
