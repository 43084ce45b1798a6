// What the parts of the runtime share: the launch as Python describes it (see run.py), lanes, and the police's hooks.
#pragma once
#include "runtime.h"

enum { INPUT = 0, CONSTANT = 1, OUTPUT = 2, FILLED_OUTPUT = 3 };  // kinds of buffers
enum { READY = 0, DONE = 1, BARRIER = 2, COLLECTIVE = 16 };       // states of lanes; COLLECTIVE + which one
enum { THREADGROUP_MEMORY = 2 };                                  // the flag of a barrier that orders it
enum { TG_LIMIT = 32 << 10, TG_ARENA = 1 << 20, TG_GAP = 64 };

struct emu_Buffer {
  char* data;
  emu_u64 size;
  const char* name;
  int kind;
  emu_u64 read, written, unique_read, unique_written;  // bytes: answers
};

struct emu_Fault {
  const char *kind, *what;
  long position;
  emu_u64 times;
  emu_uint3 threadgroup, thread;
};

struct emu_Launch {
  emu_uint3 grid, threadgroup;
  int backward, police;
  unsigned buffer_count, argument_count, fault_count, tg_next;
  emu_Buffer* buffers;
  void** pointers;  // the kernel's arguments
  char* arena;      // holds all buffers with red zones between them
  emu_u64 arena_size;
  char* tg;  // threadgroup memory, in the arena too
  emu_Fault* faults;
  emu_u64 barriers, collectives, tg_bytes, tg_read, tg_written;  // answers
};

struct Simdgroup {
  emu_Exchange exchange[2];  // by turns: a lane may be one collective ahead of the others
  unsigned first, count;
  unsigned fences;  // counts its own barriers that order threadgroup memory
};

struct Lane {
  void* sp;
  int state;
  unsigned collectives, flags;
  const void* site;
  Simdgroup* group;
  emu_Attributes attributes;
};

extern emu_Launch* launch;
extern Lane* current;
extern unsigned epoch, group_epoch;

void report(const char* kind, const char* what, long position);
void stop_lane();

void police_begin(char* stacks, emu_u64 size);
void police_end();
void police_threadgroup_block(unsigned offset, unsigned size);
