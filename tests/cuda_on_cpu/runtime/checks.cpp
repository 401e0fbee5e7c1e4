// Every memory access of a kernel, watched.
//
// Kernels are compiled with -fsanitize=thread, which has the compiler call __tsan_read4 and its
// like at every access that may meet another thread. The functions are defined here in the place
// of ThreadSanitizer's own, so that nothing in the sources takes part:
//
// - An access must lie in an array that the kernel was given, in its shared memory, in its own
//   variables or constants; shared memory must have been written before it is read.
// - Two threads race if they touch the same bytes, one of them at least by a plain write or one
//   plainly and the other atomically, with nothing that orders them. Threads of a block are
//   ordered by barriers, those of a warp by __syncwarp as well, threads of different blocks by
//   nothing within a launch. A race is found whether or not it did harm this time.
// - Chance makes a running thread give way before an access, so that races also do harm.

#include "runtime.h"

#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

struct Access {
  unsigned block, epoch;  // epoch 0: none
  unsigned short thread, warp_epoch;
  unsigned code;  // offset of the instruction in the kernel's module
  unsigned tick;  // of the thread's clock
  bool async;     // a copy of a tensor that landed: not the thread's own store
};

// The last accesses of a few bytes; two readers, as one may be the next writer itself.
struct Record {
  Access plain_write, atomic, read, other_read;
  Access copy;  // into them, that has started and not landed
  unsigned copies_from;  // such copies that may yet read them
  unsigned products;     // of a warpgroup that may yet read them
};

struct Watched {
  Region region;
  Record* records;
  bool shared;
  unsigned long long read, fresh, written;  // bytes; fresh ones are new to the block
};

// A loaded segment of the kernel's module or of this runtime.
struct Image {
  uintptr_t start, end;
  bool variables;  // the kernel's: writable, each variable in it is watched by itself
};

std::vector<Watched> watched;
std::vector<Image> images;
uintptr_t module_start;
unsigned preempt;
unsigned countdown;
uintptr_t dynamic_start;
size_t dynamic_most;
unsigned long long* traffic;
size_t traffic_count;
// Of the threads of the block: what each knows of the others' ticks, and the tick of its last fence
// between its own accesses and asynchronous ones. Empty where the block has no mbarriers.
std::vector<Clock> clocks;
std::vector<unsigned> fences;

Clock& clock_of(unsigned thread) {
  Clock& clock = clocks[thread];
  if (clock.empty()) clock.assign(clocks.size(), 0), clock[thread] = 1;
  return clock;
}

unsigned tick_now() {
  return clocks.empty() ? 0 : clock_of(thread_now.thread)[thread_now.thread];
}

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++)
    if (from[i] > into[i]) into[i] = from[i];
}

struct Search {
  uintptr_t address;
  bool kernel;
};

int add_images(dl_phdr_info* info, size_t, void* data) {
  const Search* search = (const Search*)data;
  std::vector<Image> found;
  bool inside = false;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t start = info->dlpi_addr + header.p_vaddr;
    const bool variables = search->kernel && header.p_flags & PF_W;
    found.push_back({start, start + header.p_memsz, variables});
    inside |= search->address - start < header.p_memsz;
  }
  if (!inside) return 0;
  if (search->kernel) module_start = info->dlpi_addr;
  images.insert(images.end(), found.begin(), found.end());
  return 1;
}

void describe(const Watched& w, uintptr_t address, size_t size, char* text, size_t room) {
  const Region& r = w.region;
  char name[160];
  if (r.argument >= 0)
    snprintf(name, sizeof name, "the array of argument %d (%zu bytes)", r.argument, r.size);
  else
    snprintf(name, sizeof name, "%s %s (%zu bytes)", w.shared ? "shared memory" : "variable",
             r.name, r.size);
  const uintptr_t end = r.start + r.size;
  if (address < r.start)
    snprintf(text, room, "%zu bytes before %s", (size_t)(r.start - address), name);
  else if (address >= end)
    snprintf(text, room, "%zu bytes past the end of %s", (size_t)(address - end), name);
  else if (address + size > end)
    snprintf(text, room, "across the end of %s", name);
  else
    snprintf(text, room, "at byte %zu of %s", (size_t)(address - r.start), name);
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t size, const char* what, unsigned code) {
  char place[256] = "a null pointer", who[128];
  const Watched* nearest = nullptr;
  uintptr_t least = address < 4096 ? 0 : ~(uintptr_t)0;
  for (const Watched& w : watched) {
    const uintptr_t end = w.region.start + w.region.size;
    const uintptr_t away = address < w.region.start ? w.region.start - address
                           : address < end          ? 0
                                                    : address - end;
    if (away < least) least = away, nearest = &w;
  }
  if (nearest) describe(*nearest, address, size, place, sizeof place);
  else if (address >= 4096) snprintf(place, sizeof place, "an address that is nowhere");
  where(thread_now.block, thread_now.thread, who, sizeof who);
  cuda_on_cpu_fail("out of bounds: %s %s %zu bytes at %s [code %x]", who, what, size, place, code);
}

bool ordered(const Access& before, bool shared) {
  if (before.epoch == 0) return true;
  if (before.block != thread_now.block) return shared;  // each block has its own shared memory
  if (before.epoch != thread_now.epoch || before.thread == thread_now.thread) return true;
  if (before.thread / 32 == thread_now.thread / 32 &&
      before.warp_epoch < thread_now.warp_epochs[thread_now.thread])
    return true;
  return before.tick && !clocks.empty() &&
         clock_of(thread_now.thread)[before.thread] >= before.tick;
}

[[noreturn]] void race(const Watched& w, uintptr_t address, size_t size, const Access& before,
                       const char* then, const char* now, unsigned code) {
  char place[256], first[128], second[128];
  describe(w, address, size, place, sizeof place);
  cuda_on_cpu_fail("race: %s %s and %s %s %s, with no barrier between [code %x] [code %x]",
                   where(before.block, before.thread, first, sizeof first), then,
                   where(thread_now.block, thread_now.thread, second, sizeof second), now, place,
                   before.code, code);
}

bool asynchronous;  // what is recorded is a copy or a product, not a thread's own access

enum Way { READ, WRITE, ATOMIC };
const char* const WAYS[] = {"reads", "writes", "atomically updates"};

template <class F> void each_record(Watched& w, uintptr_t address, size_t size, F act) {
  const unsigned shift = w.region.shift;
  const size_t last = (address + size - 1 - w.region.start) >> shift;
  for (size_t i = (address - w.region.start) >> shift; i <= last; i++) act(w.records[i]);
}

void record(Watched& w, uintptr_t address, size_t size, Way way, unsigned code) {
  const Access now = {thread_now.block, thread_now.epoch, (unsigned short)thread_now.thread,
                      thread_now.warp_epochs[thread_now.thread], code,
                      tick_now(), asynchronous};
  (way == READ ? w.read : w.written) += size;
  const unsigned shift = w.region.shift;
  const size_t records = ((address + size - 1 - w.region.start) >> shift) -
                         ((address - w.region.start) >> shift) + 1;
  each_record(w, address, size, [&](Record& r) {
    if (r.copy.epoch && r.copy.block == now.block) {
      char place[256], first[128], second[128];
      describe(w, address, size, place, sizeof place);
      cuda_on_cpu_fail("race: %s copies asynchronously and, before that copy has landed, %s %s %s "
                       "[code %x] [code %x]",
                       where(r.copy.block, r.copy.thread, first, sizeof first),
                       where(now.block, now.thread, second, sizeof second), WAYS[way], place,
                       r.copy.code, code);
    }
    if (r.copies_from && way != READ) {
      char place[256], who[128];
      describe(w, address, size, place, sizeof place);
      cuda_on_cpu_fail("race: %s %s %s, which an asynchronous copy that has not landed reads "
                       "[code %x]",
                       where(now.block, now.thread, who, sizeof who), WAYS[way], place, code);
    }
    if (r.products && way != READ) {
      char place[256], who[128];
      describe(w, address, size, place, sizeof place);
      cuda_on_cpu_fail("race: %s %s %s, which a product that has not ended reads [code %x]",
                       where(now.block, now.thread, who, sizeof who), WAYS[way], place, code);
    }
    if (asynchronous && w.shared && r.plain_write.epoch && r.plain_write.block == now.block &&
        !r.plain_write.async && r.plain_write.tick > fences[r.plain_write.thread]) {
      char place[256], first[128];
      describe(w, address, size, place, sizeof place);
      cuda_on_cpu_fail("race: %s writes %s, which a copy or product uses with no fence of the "
                       "asynchronous proxy between [code %x] [code %x]",
                       where(now.block, r.plain_write.thread, first, sizeof first), place,
                       r.plain_write.code, code);
    }
    if (w.shared && way != WRITE) {
      const bool written = r.plain_write.epoch && r.plain_write.block == now.block;
      const bool updated = r.atomic.epoch && r.atomic.block == now.block;
      if (!written && !updated) {
        char place[256], who[128];
        describe(w, address, size, place, sizeof place);
        cuda_on_cpu_fail("uninitialised: %s reads %s, which this block has not written [code %x]",
                         where(now.block, now.thread, who, sizeof who), place, code);
      }
    }
    if (!ordered(r.plain_write, w.shared))
      race(w, address, size, r.plain_write, WAYS[WRITE], WAYS[way], code);
    if (way != ATOMIC && !ordered(r.atomic, w.shared))
      race(w, address, size, r.atomic, WAYS[ATOMIC], WAYS[way], code);
    if (way != READ) {
      for (const Access* reader : {&r.read, &r.other_read})
        if (!ordered(*reader, w.shared)) race(w, address, size, *reader, WAYS[READ], WAYS[way], code);
      (way == WRITE ? r.plain_write : r.atomic) = now;
    } else {
      const bool known = (r.read.epoch && r.read.block == now.block) ||
                         (r.other_read.epoch && r.other_read.block == now.block);
      if (!known) w.fresh += size / records;
      // A reader that is ordered before this one gives up its place: what races with it races
      // with this one.
      const bool second = now.thread == r.other_read.thread && now.block == r.other_read.block;
      const bool first = now.thread == r.read.thread && now.block == r.read.block;
      (first || (!second && ordered(r.read, w.shared)) ? r.read : r.other_read) = now;
    }
  });
}

// The array or variable that the bytes lie in, or nullptr.
Watched* find(uintptr_t address, size_t size) {
  for (Watched& w : watched)
    if (address >= w.region.start && address + size <= w.region.start + w.region.size) return &w;
  return nullptr;
}

void check(const void* pointer, size_t size, Way way, void* caller) {
  if (!in_kernel) return;
  const uintptr_t address = (uintptr_t)pointer;
  if (in_stacks(address)) return;
  if (preempt && --countdown == 0) {
    countdown = 1 + random_below(2 * preempt - 1);
    cuda_on_cpu_yield();
  }
  const unsigned code = checks_code(caller);
  if (Watched* w = find(address, size)) return record(*w, address, size, way, code);
  // Constants, and the built-in variables; beside them nothing may be touched.
  const bool beyond_shared = address - dynamic_start < dynamic_most;
  for (const Image& image : images)
    if (way == READ && address >= image.start && address + size <= image.end && !image.variables &&
        !beyond_shared)
      return;
  out_of_bounds(address, size, WAYS[way], code);
}

}  // namespace

void checks_begin(const Launch* launch, char* dynamic_shared, size_t most) {
  watched.clear();
  images.clear();
  dynamic_start = (uintptr_t)dynamic_shared;
  dynamic_most = most;
  for (size_t i = 0; i < launch->region_count; i++)
    watched.push_back({launch->regions[i], nullptr, launch->regions[i].argument == SHARED, 0, 0, 0});
  if (launch->dynamic_shared)
    watched.push_back(
        {{dynamic_start, launch->dynamic_shared, 0, SHARED, "(dynamic)"}, nullptr, true, 0, 0, 0});
  for (Watched& w : watched)
    w.records = (Record*)calloc((w.region.size >> w.region.shift) + 1, sizeof(Record));
  Search kernel = {(uintptr_t)launch->call, true}, runtime = {(uintptr_t)&checks_begin, false};
  dl_iterate_phdr(add_images, &kernel);
  dl_iterate_phdr(add_images, &runtime);
  preempt = launch->preempt;
  countdown = 1;
  traffic = launch->traffic;
  traffic_count = launch->region_count;
}

void checks_end() {
  for (size_t i = 0; traffic && i < traffic_count; i++) {
    const Watched& w = watched[i];
    traffic[3 * i] = w.read, traffic[3 * i + 1] = w.fresh, traffic[3 * i + 2] = w.written;
  }
  for (Watched& w : watched) free(w.records);
  watched.clear();
}

unsigned checks_code(void* caller) { return (unsigned)((uintptr_t)caller - module_start); }

// A copy may read and write at any time between its start and its wait: meanwhile nobody else may
// touch where it goes to, or write where it comes from.
void checks_copy_starts(void* to, const void* from, size_t size, void* caller) {
  if (from) check(from, size, READ, caller);
  check(to, size, WRITE, caller);
  Watched* w = find((uintptr_t)to, size);
  Watched* source = from ? find((uintptr_t)from, size) : nullptr;
  if (w == nullptr || !w->shared || (source && source->shared)) {
    char who[128];
    cuda_on_cpu_fail("%s copies asynchronously, but not from global to shared memory [code %x]",
                     where(thread_now.block, thread_now.thread, who, sizeof who),
                     checks_code(caller));
  }
  each_record(*w, (uintptr_t)to, size, [](Record& r) { r.copy = r.plain_write; });
  if (source) each_record(*source, (uintptr_t)from, size, [](Record& r) { r.copies_from++; });
}

void checks_copy_lands(void* to, const void* from, size_t size, void* caller) {
  Watched* w = find((uintptr_t)to, size);
  Watched* source = from ? find((uintptr_t)from, size) : nullptr;
  each_record(*w, (uintptr_t)to, size, [](Record& r) { r.copy = {}; });
  if (source) each_record(*source, (uintptr_t)from, size, [](Record& r) { r.copies_from--; });
  record(*w, (uintptr_t)to, size, WRITE, checks_code(caller));
}

// ------------------------------------------------------- copies of tensors, products, mbarriers

void checks_release(Clock& clock) {
  Clock& mine = clock_of(thread_now.thread);
  join(clock, mine);
  mine[thread_now.thread]++;
}

void checks_acquire(const Clock& clock) { join(clock_of(thread_now.thread), clock); }

void checks_join_warp() {
  if (clocks.empty()) return;
  const unsigned first = thread_now.thread / 32 * 32;
  Clock all;
  for (unsigned i = first; i < first + 32 && i < thread_now.warp_epochs.size(); i++) {
    join(all, clock_of(i));
    clock_of(i)[i]++;
  }
  for (unsigned i = first; i < first + 32 && i < thread_now.warp_epochs.size(); i++)
    join(clock_of(i), all);
}

void checks_proxy_fence() {
  if (clocks.empty()) return;
  Clock& mine = clock_of(thread_now.thread);
  fences[thread_now.thread] = mine[thread_now.thread]++;
}

void checks_block_begins() { clocks.clear(), fences.clear(); }

void checks_mbarrier(void* barrier, bool init, void* caller) {
  if (init && clocks.empty()) {
    clocks.resize(thread_now.warp_epochs.size());
    fences.resize(clocks.size());
  }
  check(barrier, 8, init ? WRITE : ATOMIC, caller);
}

void checks_async_starts(void* to, const void* from, size_t size, int bytes, void* caller) {
  asynchronous = true;
  const unsigned code = checks_code(caller);
  Watched* w = find((uintptr_t)to, size);
  if (w == nullptr || !w->shared) out_of_bounds((uintptr_t)to, size, WAYS[WRITE], code);
  record(*w, (uintptr_t)to, size, WRITE, code);
  each_record(*w, (uintptr_t)to, size, [](Record& r) { r.copy = r.plain_write; });
  if (from) {
    Watched* source = find((uintptr_t)from, (size_t)bytes);
    if (source == nullptr) out_of_bounds((uintptr_t)from, (size_t)bytes, WAYS[READ], code);
    record(*source, (uintptr_t)from, (size_t)bytes, READ, code);
    each_record(*source, (uintptr_t)from, (size_t)bytes, [](Record& r) { r.copies_from++; });
  }
  asynchronous = false;
}

void checks_async_lands(void* to, const void* from, size_t size, int bytes, void* caller) {
  asynchronous = true;
  Watched* w = find((uintptr_t)to, size);
  each_record(*w, (uintptr_t)to, size, [](Record& r) {
    r.copy = {};
    r.plain_write = r.read = r.other_read = {};  // all of them were ordered before its start
  });
  if (from)
    each_record(*find((uintptr_t)from, (size_t)bytes), (uintptr_t)from, (size_t)bytes,
                [](Record& r) { r.copies_from--; });
  record(*w, (uintptr_t)to, size, WRITE, checks_code(caller));
  asynchronous = false;
}

void checks_product_starts(void* from, size_t size, void* caller) {
  asynchronous = true;
  Watched* w = find((uintptr_t)from, size);
  record(*w, (uintptr_t)from, size, READ, checks_code(caller));
  each_record(*w, (uintptr_t)from, size, [](Record& r) { r.products++; });
  asynchronous = false;
}

void checks_product_ends(void* from, size_t size, void* caller) {
  asynchronous = true;
  Watched* w = find((uintptr_t)from, size);
  each_record(*w, (uintptr_t)from, size, [](Record& r) { r.products--; });
  record(*w, (uintptr_t)from, size, READ, checks_code(caller));
  asynchronous = false;
}

// ---------------------------------------------------------- what the compiled kernels call

#define CALLER __builtin_return_address(0)
#define SIZED(N)                                                                                 \
  void __tsan_read##N(void* p) { check(p, N, READ, CALLER); }                                    \
  void __tsan_write##N(void* p) { check(p, N, WRITE, CALLER); }                                  \
  void __tsan_unaligned_read##N(void* p) { check(p, N, READ, CALLER); }                          \
  void __tsan_unaligned_write##N(void* p) { check(p, N, WRITE, CALLER); }                        \
  void __tsan_volatile_read##N(void* p) { check(p, N, READ, CALLER); }                           \
  void __tsan_volatile_write##N(void* p) { check(p, N, WRITE, CALLER); }                         \
  void __tsan_read_write##N(void* p) { check(p, N, READ, CALLER), check(p, N, WRITE, CALLER); }

extern "C" {
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
void __tsan_read_range(void* p, size_t n) { check(p, n, READ, CALLER); }
void __tsan_write_range(void* p, size_t n) { check(p, n, WRITE, CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  check(from, n, READ, CALLER), check(to, n, WRITE, CALLER);
  return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  check(to, n, WRITE, CALLER);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void cuda_on_cpu_atomic(const void* p, size_t n, void* caller) { check(p, n, ATOMIC, caller); }
}
