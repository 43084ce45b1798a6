// What the threads of a simdgroup or threadgroup do together. A sum is a butterfly of ascending steps.
#pragma once

template <class T>
EMU_INLINE emu_u64 emu_pack(T value) {
  static_assert(sizeof(T) <= 8, "collectives take up to 8 bytes here");
  emu_u64 bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
EMU_INLINE T emu_unpack(emu_u64 bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of another lane. What Metal leaves undefined (a lane that is not there) comes as all bits set.
template <class T>
EMU_INLINE T emu_shuffle(T value, uint from) {
  emu_Exchange* e = emu_exchange(EMU_SHUFFLE, emu_pack(value));
  if (from < 32 && (e->active >> from & 1)) return emu_unpack<T>(e->slot[from]);
  emu_absent_lane(from);
  return emu_unpack<T>(~0ul);
}

template <class T, class Operation>
EMU_INLINE T emu_reduce(int kind, T value, Operation operation) {
  emu_Exchange* e = emu_exchange(kind, emu_pack(value));
  if (!e->computed) {
    emu_u64 slot[32];
    uint active = e->active;
    for (int i = 0; i < 32; i++) slot[i] = e->slot[i];
    for (int step = 1; step < 32; step *= 2)
      for (int i = 0; i + step < 32; i += 2 * step) {
        if (!(active >> (i + step) & 1)) continue;
        T other = emu_unpack<T>(slot[i + step]);
        slot[i] = active >> i & 1 ? emu_pack(T(operation(emu_unpack<T>(slot[i]), other))) : emu_pack(other);
        active |= 1u << i;
      }
    e->result = slot[0];
    e->computed = 1;
  }
  return emu_unpack<T>(e->result);
}

template <class T>
EMU_INLINE T emu_prefix(T value, uint inclusive) {
  emu_Exchange* e = emu_exchange(EMU_PREFIX, emu_pack(value));
  T sum = T(0);
  for (uint i = 0; i < emu_lane() + inclusive; i++) sum = T(sum + emu_unpack<T>(e->slot[i]));
  return sum;
}

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
EMU_INLINE mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

EMU_INLINE void threadgroup_barrier(mem_flags flags) { emu_barrier(uint(flags)); }
EMU_INLINE void simdgroup_barrier(mem_flags flags) { emu_exchange(EMU_BARRIER, uint(flags)); }

template <class T> EMU_INLINE T simd_shuffle(T x, ushort lane) { return emu_shuffle(x, lane); }
template <class T> EMU_INLINE T simd_shuffle_xor(T x, ushort mask) { return emu_shuffle(x, emu_lane() ^ mask); }
template <class T> EMU_INLINE T simd_broadcast(T x, ushort lane) { return emu_shuffle(x, lane); }
template <class T> EMU_INLINE T simd_broadcast_first(T x) { return emu_shuffle(x, 0); }

// Past the last lane (before the first) the value is undefined in Metal; here it is all bits set, and no fault.
template <class T>
EMU_INLINE T simd_shuffle_down(T x, ushort delta) {
  emu_Exchange* e = emu_exchange(EMU_SHUFFLE, emu_pack(x));
  uint from = emu_lane() + delta;
  return emu_unpack<T>(from < 32 && (e->active >> from & 1) ? e->slot[from] : ~0ul);
}
template <class T>
EMU_INLINE T simd_shuffle_up(T x, ushort delta) {
  emu_Exchange* e = emu_exchange(EMU_SHUFFLE, emu_pack(x));
  uint from = emu_lane() - delta;
  return emu_unpack<T>(from < 32 && (e->active >> from & 1) ? e->slot[from] : ~0ul);
}

#define EMU_REDUCE(name, kind, value) \
  template <class T>                  \
  EMU_INLINE T name(T x) {            \
    return emu_reduce(kind, x, [](T a, T b) __attribute__((always_inline)) { return value; }); \
  }
EMU_REDUCE(simd_sum, EMU_SUM, a + b)
EMU_REDUCE(simd_product, EMU_PRODUCT, a * b)
EMU_REDUCE(simd_max, EMU_MAX, a < b ? b : a)
EMU_REDUCE(simd_min, EMU_MIN, b < a ? b : a)
EMU_REDUCE(simd_and, EMU_AND, a & b)
EMU_REDUCE(simd_or, EMU_OR, a | b)
EMU_REDUCE(simd_xor, EMU_XOR, a ^ b)
EMU_INLINE bool simd_all(bool x) { return simd_and(int(x)); }
EMU_INLINE bool simd_any(bool x) { return simd_or(int(x)); }
template <class T> EMU_INLINE T simd_prefix_inclusive_sum(T x) { return emu_prefix(x, 1); }
template <class T> EMU_INLINE T simd_prefix_exclusive_sum(T x) { return emu_prefix(x, 0); }
}  // namespace metal
