// Runs a translated kernel: one fibre per Metal thread, the lanes of a simdgroup in lockstep from collective to collective.
#include "internal.h"

extern "C" {
void* mmap(void*, unsigned long, int, int, int, long);
int munmap(void*, unsigned long);
void emu_switch(void** from, void* to);
}

// Saves the callee's registers on the old stack and takes them from the new one (System V, x86-64).
asm(R"(
.globl emu_switch
.hidden emu_switch
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

emu_Launch* launch;
Lane* current;
unsigned tg_used;      // bytes of threadgroup memory declared so far
unsigned epoch;        // counts the barriers that order threadgroup memory
unsigned group_epoch;  // its value when the present threadgroup began

static Lane padded[1026];
static Lane* const lanes = padded + 1;  // a lane of no simdgroup at either end
static unsigned lane_count;
static Simdgroup groups[32];
static void* scheduler;
static const unsigned STACK = (64 << 10) + 192;  // not a power of two: neighbours' stacks would share cache lines

static struct {
  const char* kind;
  const char* what;
  emu_Fault* fault;
} known[64];

// Each kind of fault is kept once for each buffer, with the first thread that showed it.
void report(const char* kind, const char* what, long position) {
  for (unsigned i = 0; i < launch->fault_count; i++)
    if (known[i].kind == kind && known[i].what == what) {
      known[i].fault->times++;
      return;
    }
  if (launch->fault_count == 64) return;
  emu_Fault* f = &launch->faults[launch->fault_count];
  known[launch->fault_count++] = {kind, what, f};
  *f = {kind, what, position, 1, {~0u, ~0u, ~0u}, {~0u, ~0u, ~0u}};
  if (current) {
    f->threadgroup = current->attributes.threadgroup_position_in_grid;
    f->thread = current->attributes.thread_position_in_threadgroup;
  }
}

// Stops the present lane; its neighbour goes on if it is ready, else the scheduler decides.
static void leave(int state, const void* site) {
  Lane* me = current;
  me->state = state;
  me->site = site;
  Lane* next = launch->backward ? me - 1 : me + 1;
  if (next->group == me->group && next->state == READY) {
    current = next;
    emu_switch(&me->sp, next->sp);
  } else {
    emu_switch(&me->sp, scheduler);
  }
}

void stop_lane() { leave(DONE, 0); }

static void* arguments[128];  // here, where the police knows them as the program's own memory

static void run_lane() {
  emu_kernel(arguments, &current->attributes);
  leave(DONE, 0);
}

extern "C" emu_Exchange* emu_exchange(int kind, emu_u64 value) {
  Lane* me = current;
  Simdgroup* group = me->group;
  emu_Exchange* e = &group->exchange[me->collectives++ & 1];
  e->slot[me->attributes.thread_index_in_simdgroup] = value;
  leave(COLLECTIVE + kind, __builtin_return_address(0));
  return e;
}

extern "C" void emu_barrier(unsigned flags) {
  current->flags = flags;
  leave(BARRIER, __builtin_return_address(0));
}

extern "C" unsigned emu_lane() { return current->attributes.thread_index_in_simdgroup; }

extern "C" void emu_absent_lane(unsigned lane) { report("shuffle from a lane that is not there", "lane", lane); }

static struct {
  unsigned offset, size;
} sites[256];
static unsigned site_bits[8];

// Memory of one `threadgroup` declaration: the same for all threads, aligned to 16 bytes, behind a red zone.
extern "C" void* emu_threadgroup_memory(int site, unsigned size) {
  if (!(site_bits[site / 32] >> site % 32 & 1)) {
    site_bits[site / 32] |= 1u << site % 32;
    unsigned rounded = (size + 15) & ~15u;
    if (tg_used + rounded > TG_LIMIT) report("more than 32 KB of threadgroup memory", "bytes", tg_used + rounded);
    if (launch->tg_next + rounded + TG_GAP > TG_ARENA) {
      report("threadgroup memory beyond all measure", "bytes", size);
      stop_lane();
    }
    sites[site] = {launch->tg_next, size};
    police_threadgroup_block(launch->tg_next, size);
    launch->tg_next += rounded + TG_GAP;
    tg_used += rounded;
  }
  return launch->tg + sites[site].offset;
}

static Lane* ordered(unsigned first, unsigned count, unsigned i) {
  return &lanes[first + (launch->backward ? count - 1 - i : i)];
}

static void resume(Lane* lane) {
  current = lane;
  emu_switch(&scheduler, lane->sp);
  current = 0;
}

// Lets those lanes go on that wait where the first waiting lane waits; says so if that is not all of the simdgroup.
static bool release_collective(Simdgroup* g) {
  Lane* first = 0;
  unsigned active = 0;
  for (unsigned i = 0; i < g->count && !first; i++)
    if (lanes[g->first + i].state >= COLLECTIVE) first = &lanes[g->first + i];
  if (!first) return false;
  const void* site = first->site;
  int state = first->state;
  emu_Exchange* e = &g->exchange[(first->collectives - 1) & 1];
  for (unsigned i = 0; i < g->count; i++) {
    Lane* lane = &lanes[g->first + i];
    if (lane->state != state || lane->site != site) continue;
    active |= 1u << i;
    lane->state = READY;
  }
  if (active != (g->count == 32 ? ~0u : (1u << g->count) - 1)) {
    current = first;
    report("collective reached by a part of the simdgroup", "lanes", __builtin_popcount(active));
    current = 0;
  }
  e->active = active;
  e->computed = 0;
  if (state == COLLECTIVE + EMU_BARRIER && e->slot[first->attributes.thread_index_in_simdgroup] & THREADGROUP_MEMORY)
    g->fences++;
  launch->collectives++;
  return true;
}

static void run_simdgroup(Simdgroup* g) {
  do {
    for (unsigned i = 0; i < g->count; i++) {
      Lane* lane = ordered(g->first, g->count, i);
      if (lane->state == READY) resume(lane);
    }
  } while (release_collective(g));
}

// True when a barrier was reached and released, false when the threadgroup has ended.
static bool release_barrier() {
  Lane* first = 0;
  unsigned waiting = 0;
  for (unsigned i = 0; i < lane_count; i++) {
    if (lanes[i].state != BARRIER) continue;
    if (!first) first = &lanes[i];
    if (lanes[i].site == first->site) waiting++;
  }
  if (!first) return false;
  if (waiting != lane_count) {
    current = first;
    report("barrier not reached by all threads", "threads", waiting);
    current = 0;
  }
  for (unsigned i = 0; i < lane_count; i++)
    if (lanes[i].state == BARRIER) lanes[i].state = READY;
  if (first->flags & THREADGROUP_MEMORY) epoch++;
  launch->barriers++;
  return true;
}

static unsigned clipped(unsigned size, unsigned group, unsigned grid) {
  return size < grid - group * size ? size : grid - group * size;
}

// dispatchThreads: the threadgroups at the far edges have fewer threads where the grid is no multiple.
static void prepare(emu_uint3 group, emu_uint3 groups_in_grid, char* stacks) {
  emu_uint3 tg = launch->threadgroup, grid = launch->grid;
  emu_uint3 size = {clipped(tg.x, group.x, grid.x), clipped(tg.y, group.y, grid.y), clipped(tg.z, group.z, grid.z)};
  emu_uint3 nominal = {clipped(tg.x, 0, grid.x), clipped(tg.y, 0, grid.y), clipped(tg.z, 0, grid.z)};
  lane_count = size.x * size.y * size.z;
  unsigned simdgroups = (lane_count + 31) / 32;
  for (unsigned s = 0; s < simdgroups; s++) {
    unsigned left = lane_count - s * 32;
    groups[s].first = s * 32;
    groups[s].count = left < 32 ? left : 32;
  }
  for (unsigned i = 0; i < lane_count; i++) {
    Lane* lane = &lanes[i];
    emu_uint3 at = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    lane->attributes = {{group.x * tg.x + at.x, group.y * tg.y + at.y, group.z * tg.z + at.z}, at, group, size, nominal,
                        groups_in_grid, grid, i, i % 32, i / 32, simdgroups, 32};
    lane->group = &groups[i / 32];
    lane->state = READY;
    lane->collectives = 0;
    void** top = (void**)(((emu_u64)stacks + (i + 1ul) * STACK) & ~15ul);
    *--top = 0;                // keeps the stack aligned as behind a call
    *--top = (void*)run_lane;  // where the first switch returns to
    for (int r = 0; r < 6; r++) *--top = 0;
    lane->sp = top;
  }
}

static void run_threadgroup(emu_uint3 group, emu_uint3 groups_in_grid, char* stacks) {
  prepare(group, groups_in_grid, stacks);
  __builtin_memset(launch->tg, 0xff, launch->tg_next ? launch->tg_next : TG_ARENA);
  group_epoch = ++epoch;
  unsigned simdgroups = (lane_count + 31) / 32;
  do {
    for (unsigned s = 0; s < simdgroups; s++)
      run_simdgroup(&groups[launch->backward ? simdgroups - 1 - s : s]);
  } while (release_barrier());
}

static unsigned parts(unsigned grid, unsigned size) { return (grid + size - 1) / size; }

extern "C" int emu_run(emu_Launch* l) {
  launch = l;
  current = 0;
  tg_used = 0;
  for (unsigned i = 0; i < 8; i++) site_bits[i] = 0;
  emu_uint3 tg = l->threadgroup;
  if ((emu_u64)tg.x * tg.y * tg.z > 1024) {
    report("more than 1024 threads in a threadgroup", "threads", tg.x * tg.y * tg.z);
    return 1;
  }
  emu_uint3 n = {parts(l->grid.x, tg.x), parts(l->grid.y, tg.y), parts(l->grid.z, tg.z)};
  unsigned long bytes = 1024ul * STACK + 4096;
  char* stacks = (char*)mmap(0, bytes, 3, 0x22, -1, 0);
  if (stacks == (char*)-1) return 2;
  for (unsigned i = 0; i < l->argument_count; i++) arguments[i] = l->pointers[i];
  police_begin(stacks, bytes);
  unsigned total = n.x * n.y * n.z;
  for (unsigned i = 0; i < total; i++) {
    unsigned g = l->backward ? total - 1 - i : i;
    run_threadgroup({g % n.x, g / n.x % n.y, g / (n.x * n.y)}, n, stacks);
  }
  police_end();
  l->tg_bytes = tg_used;
  munmap(stacks, bytes);
  return 0;
}
