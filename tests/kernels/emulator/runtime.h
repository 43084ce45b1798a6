// What a translated kernel and the runtime know of each other.
#pragma once

typedef unsigned long emu_u64;

struct emu_uint3 {
  unsigned x, y, z;
};

// The thread attributes of Metal, under their own names.
struct emu_Attributes {
  emu_uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  emu_uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, threads_per_simdgroup;
};

// What the lanes of a simdgroup do together. A barrier shows the flags of the memory that it orders.
enum emu_Collective { EMU_BARRIER, EMU_SHUFFLE, EMU_SUM, EMU_PRODUCT, EMU_MAX, EMU_MIN, EMU_AND, EMU_OR, EMU_XOR, EMU_PREFIX };

// What the lanes of a simdgroup show each other at a collective: `active` has a bit for each lane that came.
struct emu_Exchange {
  emu_u64 slot[32];
  unsigned active;
  int computed;
  emu_u64 result;
};

extern "C" {
// Of the kernel: one Metal thread, from start to end.
void emu_kernel(void** buffers, const emu_Attributes* attributes);

// Of the runtime. Both calls return when everybody who has to come is there.
emu_Exchange* emu_exchange(int kind, emu_u64 value) __attribute__((convergent));
void emu_barrier(unsigned flags) __attribute__((convergent));
void* emu_threadgroup_memory(int site, unsigned size);
void emu_absent_lane(unsigned lane);
unsigned emu_lane();
}
