// What the kernels of this folder use of the Metal Shading Language, in CUDA. MLX puts this file between its own headers
// and a kernel, which it writes into the namespace mlx::core::cu: a name declared there hides CUDA's of that name.
//
// A simdgroup is a warp, a threadgroup a block. Arithmetic is float32 as the kernels write it: where a product meets a
// sum they say fma, so that no compiler has a choice.

namespace metal {

// --- types -----------------------------------------------------------------------------------------------------------

using ushort = unsigned short;
using uint = unsigned int;

template <typename T, int N>
struct vec;

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;

  vec() = default;  // so that arrays of it may be __shared__
  __device__ vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  __device__ explicit vec(T value) : vec(value, value, value, value) {}
  template <typename U>
  __device__ explicit vec(const vec<U, 4>& o)
      : vec(T(float(o.x)), T(float(o.y)), T(float(o.z)), T(float(o.w))) {}
};

using float4 = vec<float, 4>;

__device__ inline float4 operator-(float4 a) {
  return {-a.x, -a.y, -a.z, -a.w};
}
__device__ inline float4 operator+(float a, float4 b) {
  return {a + b.x, a + b.y, a + b.z, a + b.w};
}
__device__ inline float4 operator*(float4 a, float4 b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ inline float4 operator*(float4 a, float b) {
  return {a.x * b, a.y * b, a.z * b, a.w * b};
}
__device__ inline float4 operator/(float4 a, float4 b) {
  return {a.x / b.x, a.y / b.y, a.z / b.z, a.w / b.w};
}

// --- functions -------------------------------------------------------------------------------------------------------

__device__ inline float exp(float x) {
  return ::expf(x);
}
__device__ inline float4 exp(float4 v) {
  return {::expf(v.x), ::expf(v.y), ::expf(v.z), ::expf(v.w)};
}
__device__ inline float log(float x) {
  return ::logf(x);
}
__device__ inline float fabs(float x) {
  return ::fabsf(x);
}
__device__ inline float rsqrt(float x) {
  return ::rsqrtf(x);
}
__device__ inline float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
__device__ inline float4 fma(float4 a, float4 b, float4 c) {
  return {::fmaf(a.x, b.x, c.x), ::fmaf(a.y, b.y, c.y), ::fmaf(a.z, b.z, c.z), ::fmaf(a.w, b.w, c.w)};
}
template <typename T>
__device__ inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__device__ inline T max(T a, T b) {
  return a < b ? b : a;
}

// --- threads ---------------------------------------------------------------------------------------------------------

enum class mem_flags { mem_threadgroup };

// Each orders all memory, which is more than the flag asks for.
__device__ inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
__device__ inline void simdgroup_barrier(mem_flags) {
  __syncwarp();
}
__device__ inline float simd_shuffle_xor(float x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

__device__ inline uint3 in_threadgroup() {
  return {threadIdx.x, threadIdx.y, threadIdx.z};
}
__device__ inline uint3 of_grid() {
  return {blockIdx.x, blockIdx.y, blockIdx.z};
}
__device__ inline uint3 in_grid() {
  return {
      blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z};
}
__device__ inline uint index() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

} // namespace metal

namespace mlx::core::cu {

using metal::exp;
using metal::fabs;
using metal::float4;
using metal::fma;
using metal::log;
using metal::max;
using metal::mem_flags;
using metal::min;
using metal::rsqrt;
using metal::simd_shuffle_xor;
using metal::simdgroup_barrier;
using metal::threadgroup_barrier;
using metal::uint;
using metal::ushort;
using metal::vec;

} // namespace mlx::core::cu

// Pointers have no address space. Arrays of a threadgroup are declared __shared__ before the text comes here (fused.py).
#define device
#define threadgroup
#define thread_position_in_grid metal::in_grid()
#define thread_position_in_threadgroup metal::in_threadgroup()
#define threadgroup_position_in_grid metal::of_grid()
#define thread_index_in_simdgroup (metal::index() % 32)
#define simdgroup_index_in_threadgroup (metal::index() / 32)
