// Asynchronous copies, which land as late as the waits allow.
//
// A copy is on its way from its start until its thread waits for its group. Meanwhile the bytes
// it will write hold ones (NaN), so that whoever reads them early, or needed what was there
// before, computes nonsense; the checking runtime says so.

#include "runtime.h"

#include <string.h>

namespace {

struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
  int size;
  unsigned group;
  void* caller;
};

struct Queue {
  std::vector<Copy> copies;  // in the order of their start
  size_t landed;             // so many at the front
  unsigned groups;           // committed so far
};

std::vector<Queue> queues;  // of the threads of the block

void land(Queue& queue, unsigned groups) {
  while (queue.landed < queue.copies.size() && queue.copies[queue.landed].group < groups) {
    const Copy copy = queue.copies[queue.landed++];
    checks_copy_lands(copy.to, copy.from, copy.size, copy.caller);
    if (copy.from) memcpy(copy.to, copy.from, copy.size);
    else memset(copy.to, 0, copy.size);
  }
  if (queue.landed == queue.copies.size()) queue.copies.clear(), queue.landed = 0;
}

}  // namespace

void copies_begin(unsigned threads) {
  queues.resize(threads);
  for (Queue& queue : queues) {
    queue.copies.clear();
    queue.landed = queue.groups = 0;
  }
}

void copies_end(unsigned thread) {
  const Queue& queue = queues[thread];
  if (queue.landed == queue.copies.size()) return;
  char who[128];
  const Copy& copy = queue.copies[queue.landed];
  cuda_on_cpu_fail("unfinished: %s returns with %zu asynchronous copies on their way, the first "
                   "of a group %s [code %x]",
                   where(thread_now.block, thread, who, sizeof who),
                   queue.copies.size() - queue.landed,
                   copy.group < queue.groups ? "not waited for" : "not committed",
                   checks_code(copy.caller));
}

extern "C" {

void cuda_on_cpu_copy_async(void* to, const void* from, int size, int valid, void* caller) {
  if (((uintptr_t)to | (uintptr_t)from) % size) {
    char who[128];
    cuda_on_cpu_fail("misaligned: %s copies %d bytes asynchronously from or to an address that is "
                     "no multiple of that [code %x]",
                     where(thread_now.block, thread_now.thread, who, sizeof who), size,
                     checks_code(caller));
  }
  if (!valid) from = nullptr;
  checks_copy_starts(to, from, size, caller);
  Queue& queue = queues[thread_now.thread];
  queue.copies.push_back({(char*)to, (const char*)from, size, queue.groups, caller});
  memset(to, 0xff, size);
}

void cuda_on_cpu_copy_commit() { queues[thread_now.thread].groups++; }

void cuda_on_cpu_copy_wait(int most) {
  Queue& queue = queues[thread_now.thread];
  if (queue.groups > (unsigned)most) land(queue, queue.groups - (unsigned)most);
}
}
