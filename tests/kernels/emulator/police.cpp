// Watches every load and store of a kernel that was compiled with -fsanitize=thread: the compiler calls the __tsan hooks
// below instead of the sanitizer's own. In a launch without police nothing here is at work.
#include "internal.h"

extern "C" {
void* calloc(unsigned long, unsigned long);
void free(void*);
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
}

// Of one byte of threadgroup memory. Epochs count the barriers that order it, fences those of one simdgroup. Nothing else
// orders it: lanes that meet at a shuffle or a sum do not see each other's writes for that.
struct Shadow {
  unsigned write_epoch, write_fence, read_epoch, read_fence;  // of the last of each
  unsigned groups, lanes;  // readers since then: simdgroups in this epoch, lanes of the last one since its fence
  unsigned short writer, reader_group;
  bool there;
};

static Shadow* shadow;     // one for each byte of threadgroup memory
static unsigned** owners;  // of each output, for each byte: the thread that wrote it, + 1
static unsigned char** seen;  // of each buffer, for each byte: 1 read, 2 written
static char *stacks_start, *stacks_end;

void police_begin(char* stacks, emu_u64 size) {
  if (!launch->police) return;
  stacks_start = stacks;
  stacks_end = stacks + size;
  shadow = (Shadow*)calloc(TG_ARENA, sizeof(Shadow));
  owners = (unsigned**)calloc(launch->buffer_count, sizeof(*owners));
  seen = (unsigned char**)calloc(launch->buffer_count, sizeof(*seen));
  for (unsigned i = 0; i < launch->buffer_count; i++) {
    emu_Buffer* b = &launch->buffers[i];
    seen[i] = (unsigned char*)calloc(b->size + 1, 1);
    if (b->kind >= OUTPUT) owners[i] = (unsigned*)calloc(b->size + 1, sizeof(unsigned));
  }
}

void police_end() {
  if (!launch->police) return;
  for (unsigned i = 0; i < launch->buffer_count; i++) {
    emu_Buffer* b = &launch->buffers[i];
    long missing = -1;
    for (emu_u64 at = 0; at < b->size; at++) {
      b->unique_read += seen[i][at] & 1;
      b->unique_written += seen[i][at] >> 1;
      if (missing < 0 && !(seen[i][at] & 2)) missing = at;
    }
    if (b->kind == OUTPUT && missing >= 0) report("output never written", b->name, missing);
    free(seen[i]);
    free(owners[i]);
  }
  free(seen);
  free(owners);
  free(shadow);
}

void police_threadgroup_block(unsigned offset, unsigned size) {
  for (unsigned i = 0; launch->police && i < size; i++) shadow[offset + i].there = true;
}

static void threadgroup_access(unsigned offset, unsigned size, bool write) {
  (write ? launch->tg_written : launch->tg_read) += size;
  unsigned me = current->attributes.thread_index_in_threadgroup, group = me / 32, lane = 1u << me % 32;
  unsigned fence = current->group->fences;
  for (unsigned i = offset; i < offset + size; i++) {
    Shadow* s = &shadow[i];
    if (!s->there) return report("out of bounds", "threadgroup memory", offset);
    bool written = s->write_epoch >= group_epoch;
    bool other = s->write_epoch == epoch && s->writer != me, near = s->writer / 32 == group;
    bool read = s->read_epoch == epoch, fresh = !read || s->reader_group != group || s->read_fence != fence;
    if (!write && !written) report("threadgroup memory read before it is written", "threadgroup memory", i);
    if ((other && !near) || (write && read && s->groups & ~(1u << group)))
      report("race between simdgroups", "threadgroup memory", i);
    if ((other && near && s->write_fence == fence) || (write && !fresh && s->lanes & ~lane))
      report("race within a simdgroup", "threadgroup memory", i);
    if (write) {
      s->write_epoch = epoch;
      s->writer = me;
      s->write_fence = fence;
    } else {
      s->groups = (read ? s->groups : 0) | 1u << group;
      s->lanes = (fresh ? 0 : s->lanes) | lane;
      s->reader_group = group;
      s->read_epoch = epoch;
      s->read_fence = fence;
    }
  }
}

static unsigned thread_number() {
  emu_uint3 at = current->attributes.thread_position_in_grid, n = launch->grid;
  return (at.z * n.y + at.y) * n.x + at.x + 1;
}

static void device_access(unsigned index, emu_u64 at, unsigned size, bool write) {
  emu_Buffer* b = &launch->buffers[index];
  (write ? b->written : b->read) += size;
  if (write && b->kind < OUTPUT) return report("write to an input", b->name, at);
  unsigned me = owners[index] ? thread_number() : 0;
  for (emu_u64 i = at; i < at + size; i++) {
    seen[index][i] |= write ? 2 : 1;
    if (!owners[index]) continue;
    unsigned owner = owners[index][i];
    if (write && owner && owner != me) report("output written by two threads", b->name, i);
    if (!write && !owner && b->kind == OUTPUT) report("output read before it is written", b->name, i);
    if (!write && owner && owner != me) report("output read that another thread wrote", b->name, i);
    if (write) owners[index][i] = me;
  }
}

static void access(void* address, unsigned size, bool write) {
  char* p = (char*)address;
  if (!current || (p >= stacks_start && p < stacks_end)) return;
  if (p >= launch->tg && p + size <= launch->tg + TG_ARENA) return threadgroup_access(p - launch->tg, size, write);
  if (p >= launch->arena && p < launch->arena + launch->arena_size) {
    emu_Buffer* below = 0;
    for (unsigned i = 0; i < launch->buffer_count; i++) {
      emu_Buffer* b = &launch->buffers[i];
      if (p >= b->data && p + size <= b->data + b->size) return device_access(i, p - b->data, size, write);
      if (p >= b->data) below = b;
    }
    if (!below) below = &launch->buffers[0];
    return report("out of bounds", below->name, p - below->data);
  }
  if (p >= &__ehdr_start && p < &_end) return;
  report("wild address: the thread was stopped", write ? "store" : "load", 0);
  stop_lane();
}

#define HOOKS(n)                                                       \
  void __tsan_read##n(void* p) { access(p, n, false); }                \
  void __tsan_write##n(void* p) { access(p, n, true); }                \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false); }      \
  void __tsan_unaligned_write##n(void* p) { access(p, n, true); }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_init() {}
void* __tsan_memcpy(void* to, void* from, unsigned long n) {
  access(from, n, false);
  access(to, n, true);
  return __builtin_memcpy(to, from, n);
}
void* __tsan_memmove(void* to, void* from, unsigned long n) {
  access(from, n, false);
  access(to, n, true);
  return __builtin_memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, unsigned long n) {
  access(to, n, true);
  return __builtin_memset(to, value, n);
}
}
