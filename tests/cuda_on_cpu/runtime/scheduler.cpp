// Blocks of threads on one CPU core.
//
// Blocks run one after the other. The threads of a block are fibers: a thread runs until it waits
// for others (a barrier, a warp collective) or, in the checking runtime, until chance has it
// make way at a memory access. A fiber whose thread has returned goes on with the next thread,
// so a kernel without barriers is a plain loop on one stack.
//
// What cannot go on is an error: threads that wait at a barrier which others have left the
// kernel without reaching, or reached at another line.

#include "context.h"
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

extern "C" {
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
}

// --------------------------------------------------------------------------------------- state

enum State { UNSTARTED, READY, AT_BARRIER, IN_WARP, AT_MBARRIER, FINISHED };
static const char* const STATES[] = {"have not started", "could run", "wait at a barrier",
                                     "wait in a warp collective", "wait at an mbarrier",
                                     "have returned"};

struct Fiber : Context {
  unsigned thread = 0;
};

// Threads of a warp on their way through one collective operation.
struct Meeting {
  int op, line;
  unsigned mask, here, left;  // lanes expected, arrived, and not yet gone on
  cuda_on_cpu_bits values[32];
  bool full() const { return here == mask; }
};

const size_t STACK = 256 * 1024, GUARD_PAGE = 64 * 1024, MOST_THREADS = 1024;
const size_t MOST_SHARED = 256 * 1024;

static const Launch* launch;
static char* stacks;  // all of them, one behind the other
static std::vector<Fiber*> fibers, idle;
static std::vector<unsigned> order, ready_list;  // threads to start; threads that can go on
static size_t ready_head;
static unsigned started, finished, thread_count;
static std::vector<State> states;
static std::vector<Fiber*> fiber_of;
static std::vector<std::vector<Meeting>> meetings;  // per warp
static struct {
  unsigned waiting;
  int op, line, first, sum, every, any, result;
} barrier;
static Fiber* current;
static char* message;
static size_t message_size;
static bool failed;
static unsigned long long random_state;
alignas(1024) static char dynamic_shared[MOST_SHARED];

Thread thread_now;
bool in_kernel;

unsigned random_below(unsigned bound) {
  random_state += 0x9e3779b97f4a7c15ull;  // splitmix64
  unsigned long long z = random_state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (unsigned)(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

const char* where(unsigned block, unsigned thread, char* text, size_t size) {
  const unsigned* g = launch->grid;
  const unsigned* b = launch->block;
  snprintf(text, size, "thread (%u, %u, %u) of block (%u, %u, %u)", thread % b[0],
           thread / b[0] % b[1], thread / b[0] / b[1], block % g[0], block / g[0] % g[1],
           block / g[0] / g[1]);
  return text;
}

bool in_stacks(uintptr_t address) {
  return address - (uintptr_t)stacks < MOST_THREADS * STACK;
}

static void set_thread(unsigned thread) {
  const unsigned* b = launch->block;
  threadIdx = {thread % b[0], thread / b[0] % b[1], thread / b[0] / b[1]};
  thread_now.thread = thread;
}

// -------------------------------------------------------------------------------- who goes next

static void fiber_main();

static Fiber* idle_fiber() {
  if (!idle.empty()) {
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
  }
  Fiber* fiber = new Fiber;
  fiber->stack = stacks + fibers.size() * STACK + GUARD_PAGE;
  fiber->stack_size = STACK - GUARD_PAGE;
  mprotect(stacks + fibers.size() * STACK, GUARD_PAGE, PROT_NONE);
  enter(*fiber, fiber_main);
  fibers.push_back(fiber);
  return fiber;
}

static size_t ready_count() { return ready_list.size() - ready_head; }

static void make_ready(unsigned thread) {
  states[thread] = READY;
  ready_list.push_back(thread);
}

static unsigned take_ready() {
  if (launch->shuffle) {
    unsigned& chosen = ready_list[ready_head + random_below((unsigned)ready_count())];
    unsigned thread = chosen;
    chosen = ready_list.back();
    ready_list.pop_back();
    return thread;
  }
  unsigned thread = ready_list[ready_head++];
  if (ready_head == ready_list.size()) ready_list.clear(), ready_head = 0;
  return thread;
}

static bool start_one() {
  const unsigned left = thread_count - started;
  if (left == 0) return false;
  if (ready_count() == 0) return true;
  return launch->shuffle ? random_below(left + (unsigned)ready_count()) < left : true;
}

[[noreturn]] static void stuck() {
  unsigned counts[6] = {};
  for (unsigned t = 0; t < thread_count; t++) counts[states[t]]++;
  char text[512];
  int length = 0;
  for (int s = 0; s < 6; s++)
    if (counts[s])
      length += snprintf(text + length, sizeof text - length, "%s%u threads %s",
                         length ? ", " : "", counts[s], STATES[s]);
  if (counts[AT_BARRIER])
    cuda_on_cpu_fail("divergent barrier in block (%u, %u, %u): the barrier of line %d is not "
                     "reached by all threads: %s",
                     blockIdx.x, blockIdx.y, blockIdx.z, barrier.line, text);
  char which[256];
  if (hopper_describe(which, sizeof which))
    cuda_on_cpu_fail("a wait without end in block (%u, %u, %u): %s: %s", blockIdx.x, blockIdx.y,
                     blockIdx.z, which, text);
  cuda_on_cpu_fail("divergent warp collective in block (%u, %u, %u): lanes named in the mask do "
                   "not take part: %s",
                   blockIdx.x, blockIdx.y, blockIdx.z, text);
}

// Leaves this fiber: for the next thread that can go on, or a new one, or (all done) the launch.
static void go_on_elsewhere() {
  Fiber* self = current;
  if (start_one()) {
    current = idle_fiber();
  } else if (ready_count()) {
    const unsigned thread = take_ready();
    current = fiber_of[thread];
    set_thread(thread);
  } else if (finished == thread_count) {
    hopper_block_ends();
    switch_to(main_context);
    return;  // taken up again by a later block
  } else {
    stuck();
  }
  if (current != self) switch_to(*current);
}

static void suspend(State state) {
  const unsigned thread = current->thread;
  states[thread] = state;
  go_on_elsewhere();
  set_thread(thread);
}

void park() { suspend(AT_MBARRIER); }

void wake(unsigned thread) {
  if (states[thread] == AT_MBARRIER) make_ready(thread);
}

static void fiber_main() {
  arrived();
  for (;;) {
    Fiber* self = current;
    const unsigned thread = order[started++];
    self->thread = thread;
    fiber_of[thread] = self;
    states[thread] = READY;
    set_thread(thread);
    launch->call(launch->arguments);
    copies_end(thread);
    hopper_end(thread);
    states[thread] = FINISHED;
    finished++;
    if (start_one()) continue;
    idle.push_back(self);
    go_on_elsewhere();
    // Woken as an idle fiber: whoever did so has made it current.
  }
}

// --------------------------------------------------------------------------- what kernels call

extern "C" {

void cuda_on_cpu_yield() {
  if (ready_count() == 0 && started == thread_count) return;
  make_ready(current->thread);
  suspend(READY);
}

int cuda_on_cpu_barrier(int op, int predicate, int line) {
  if (barrier.waiting == 0) {
    barrier.op = op, barrier.line = line, barrier.first = (int)current->thread;
    barrier.sum = barrier.any = 0, barrier.every = 1;
  } else if (line != barrier.line || op != barrier.op) {
    char here[128], there[128];
    const unsigned block = thread_now.block;
    cuda_on_cpu_fail("divergent barrier: %s waits at line %d, %s at line %d",
                     where(block, (unsigned)barrier.first, there, sizeof there), barrier.line,
                     where(block, current->thread, here, sizeof here), line);
  }
  barrier.waiting++;
  barrier.sum += predicate != 0;
  barrier.every &= predicate != 0;
  barrier.any |= predicate != 0;
  if (barrier.waiting < thread_count) {
    suspend(AT_BARRIER);
  } else {
    barrier.waiting = 0;
    barrier.result = op == 1 ? barrier.sum : op == 2 ? barrier.every : barrier.any;
    thread_now.epoch++;
    for (unsigned t = 0; t < thread_count; t++)
      if (states[t] == AT_BARRIER) make_ready(t);
    if (launch->shuffle) cuda_on_cpu_yield();
  }
  return barrier.result;
}

unsigned cuda_on_cpu_lane() { return thread_now.thread % 32; }

static unsigned meet(int op, unsigned mask, cuda_on_cpu_bits value, cuda_on_cpu_bits* all,
                     void (*whole)(const cuda_on_cpu_bits*), int line) {
  const unsigned lane = thread_now.thread % 32, warp = thread_now.thread / 32;
  if (!(mask >> lane & 1))
    cuda_on_cpu_fail("line %d: lane %u calls a warp collective whose mask %08x does not name it",
                     line, lane, mask);
  if (const unsigned lanes = thread_count - warp * 32; lanes < 32) mask &= (1u << lanes) - 1;
  std::vector<Meeting>& all_meetings = meetings[warp];
  size_t at = all_meetings.size();
  for (size_t i = 0; i < all_meetings.size(); i++)  // the meeting that waits for this lane
    if (!all_meetings[i].full() && all_meetings[i].mask == mask) at = i;
  if (at == all_meetings.size()) {  // a new one, in a place that all have left
    for (at = 0; at < all_meetings.size(); at++)
      if (all_meetings[at].full() && all_meetings[at].left == 0) break;
    if (at == all_meetings.size()) all_meetings.emplace_back();
    all_meetings[at] = {op, line, mask, 0, mask, {}};
    memset(all_meetings[at].values, 0xff, sizeof all_meetings[at].values);
  }
  Meeting* m = &all_meetings[at];
  if (m->op != op) {
    cuda_on_cpu_fail("divergent warp collective: lanes of one mask %08x meet at line %d and, in "
                     "another operation, at line %d", mask, m->line, line);
  }
  m->values[lane] = value;
  m->here |= 1u << lane;
  if (m->full()) {
    if (whole) whole(m->values);
    if (op == GATHER_SYNC && mask == 0xffffffffu) checks_join_warp();
    for (unsigned t = warp * 32; t < thread_count && t < warp * 32 + 32; t++)
      if (mask >> (t % 32) & 1 && t != thread_now.thread) make_ready(t);
    if (launch->shuffle) cuda_on_cpu_yield();
  } else {
    suspend(IN_WARP);
  }
  m = &all_meetings[at];  // the list may have grown meanwhile
  memcpy(all, m->values, sizeof m->values);
  m->left &= ~(1u << lane);
  if (op == GATHER_SYNC) thread_now.warp_epochs[thread_now.thread]++;
  return mask;
}

unsigned cuda_on_cpu_gather(int op, unsigned mask, cuda_on_cpu_bits value, cuda_on_cpu_bits* all,
                            int line) {
  return meet(op, mask, value, all, nullptr, line);
}

void cuda_on_cpu_whole_warp(int op, cuda_on_cpu_bits value, cuda_on_cpu_bits* all,
                            void (*whole)(const cuda_on_cpu_bits*)) {
  if (thread_count - thread_now.thread / 32 * 32 < 32)
    cuda_on_cpu_fail("an operation of a whole warp, in a block of %u threads whose last warp has "
                     "fewer than 32", thread_count);
  meet(op, 0xffffffffu, value, all, whole, 0);
}

unsigned cuda_on_cpu_active_mask() {
  const unsigned first = thread_now.thread / 32 * 32;
  unsigned mask = 0;
  for (unsigned t = first; t < thread_count && t < first + 32; t++)
    if (states[t] != FINISHED) mask |= 1u << (t - first);
  return mask;
}

void* cuda_on_cpu_dynamic_shared() { return dynamic_shared; }
size_t cuda_on_cpu_dynamic_shared_size() { return launch->dynamic_shared; }

// Gives up the launch: back to where it was called, its fibers abandoned.
void cuda_on_cpu_fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, message_size, format, arguments);
  va_end(arguments);
  failed = true;
  in_kernel = false;
  switch_to(main_context, true);
  abort();
}

void cuda_on_cpu_trap() { cuda_on_cpu_fail("the kernel called __trap or an assertion failed"); }

// -------------------------------------------------------------------------------------- launches

static void shuffle(std::vector<unsigned>& items) {
  for (size_t i = items.size(); i > 1; i--) {
    const unsigned j = random_below((unsigned)i);
    const unsigned item = items[i - 1];
    items[i - 1] = items[j], items[j] = item;
  }
}

static void numbered(std::vector<unsigned>& items, size_t count) {
  items.resize(count);
  for (size_t i = 0; i < count; i++) items[i] = (unsigned)i;
}

static void run_block(unsigned block) {
  const unsigned* g = launch->grid;
  blockIdx = {block % g[0], block / g[0] % g[1], block / g[0] / g[1]};
  thread_now.block = block;
  thread_now.epoch++;
  numbered(order, thread_count);
  if (launch->shuffle) shuffle(order);
  ready_list.clear();
  ready_head = 0;
  started = finished = 0;
  states.assign(thread_count, UNSTARTED);
  for (auto& warp : meetings) warp.clear();
  barrier = {};
  copies_begin(thread_count);
  hopper_begin(thread_count);
  checks_block_begins();
  // What shared memory holds at first is undefined: NaN, so that its use shows.
  memset(dynamic_shared, 0xff, launch->dynamic_shared);
  for (size_t i = 0; i < launch->region_count; i++)
    if (launch->regions[i].argument == SHARED)
      memset((void*)launch->regions[i].start, 0xff, launch->regions[i].size);
  current = idle_fiber();
  switch_to(*current);
}

static const Region* overwritten() {
  for (size_t i = 0; i < launch->region_count; i++) {
    const Region& r = launch->regions[i];
    if (r.argument < 0) continue;
    const unsigned char* before = (const unsigned char*)r.start - launch->guard;
    const unsigned char* after = (const unsigned char*)r.start + r.size;
    for (size_t k = 0; k < launch->guard; k++)
      if (before[k] != 0xff || after[k] != 0xff) return &r;
  }
  return nullptr;
}

int cuda_on_cpu_launch(const Launch* wanted, char* text, size_t size) {
  launch = wanted;
  message = text, message_size = size;
  failed = false;
  random_state = launch->seed;
  thread_count = launch->block[0] * launch->block[1] * launch->block[2];
  if (launch->dynamic_shared > MOST_SHARED || thread_count > MOST_THREADS) {
    snprintf(text, size, "more threads or shared memory than the runtime provides");
    return 1;
  }
  if (stacks == nullptr) {
    void* place = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) {
      snprintf(text, size, "no memory for the threads' stacks");
      return 1;
    }
    stacks = (char*)place;
  }
  blockDim = dim3(launch->block[0], launch->block[1], launch->block[2]);
  gridDim = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
  fiber_of.assign(thread_count, nullptr);
  meetings.resize((thread_count + 31) / 32);
  thread_now.epoch = 0;
  thread_now.warp_epochs.assign(thread_count, 0);
  running = &main_context;
  main_context.stack = nullptr;
  checks_begin(launch, dynamic_shared, MOST_SHARED);
#if WITH_ASAN
  __asan_poison_memory_region(dynamic_shared, MOST_SHARED);
  __asan_unpoison_memory_region(dynamic_shared, launch->dynamic_shared);
#endif
  std::vector<unsigned> blocks;
  numbered(blocks, (size_t)launch->grid[0] * launch->grid[1] * launch->grid[2]);
  if (launch->shuffle) shuffle(blocks);
  in_kernel = true;
  for (unsigned block : blocks) {
    run_block(block);
    if (failed) break;
  }
  in_kernel = false;
  checks_end();
  if (failed) {  // fibers stopped in the middle of a thread start afresh
    idle.clear();
    for (Fiber* fiber : fibers) {
#if WITH_ASAN
      __asan_unpoison_memory_region(fiber->stack, fiber->stack_size);
      fiber->fake_stack = nullptr;
#endif
      enter(*fiber, fiber_main);
      idle.push_back(fiber);
    }
    return 1;
  }
  if (launch->guard) {
    if (const Region* region = overwritten()) {
      snprintf(text, size, "the kernel wrote outside of argument %d (%zu bytes)",
               region->argument, region->size);
      return 1;
    }
  }
  return 0;
}
}
