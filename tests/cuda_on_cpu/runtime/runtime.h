// What the files of the runtime share among themselves.
#pragma once

#include "interface.h"

#include <vector>

// The thread that runs. Epochs count the barriers of the launch: accesses of one block in
// different epochs are ordered. A thread's warp epoch counts its __syncwarp.
struct Thread {
  unsigned block, thread, epoch;
  std::vector<unsigned short> warp_epochs;
};

extern Thread thread_now;
extern bool in_kernel;

unsigned random_below(unsigned bound);
bool in_stacks(uintptr_t address);
const char* where(unsigned block, unsigned thread, char* text, size_t size);

// Of copies.cpp: before a block's first thread, and after each thread's end.
void copies_begin(unsigned threads);
void copies_end(unsigned thread);

// Of hopper.cpp: before a block's first thread, after each thread's end, and after the last's.
void hopper_begin(unsigned threads);
void hopper_end(unsigned thread);
void hopper_block_ends();
bool hopper_describe(char* text, size_t room);  // an mbarrier that is waited for, if there is one

// Of scheduler.cpp: leaves this thread until another wakes it.
void park();
void wake(unsigned thread);

// What a thread, or a barrier, knows of: of each thread the last of its ticks.
typedef std::vector<unsigned> Clock;

// Of checks.cpp; a runtime without checks has empty ones. Copies without a source write zeros.
void checks_begin(const Launch* launch, char* dynamic_shared, size_t most);
void checks_end();
void checks_copy_starts(void* to, const void* from, size_t size, void* caller);
void checks_copy_lands(void* to, const void* from, size_t size, void* caller);
void checks_block_begins();
// What the caller has done is known to those who acquire the clock later.
void checks_release(Clock& clock);
void checks_acquire(const Clock& clock);
void checks_join_warp();
void checks_proxy_fence();
void checks_mbarrier(void* barrier, bool init, void* caller);
// Of 16 bytes of a copy of a tensor, `bytes` of them from memory; and of a product's operand.
void checks_async_starts(void* to, const void* from, size_t size, int bytes, void* caller);
void checks_async_lands(void* to, const void* from, size_t size, int bytes, void* caller);
void checks_product_starts(void* from, size_t size, void* caller);
void checks_product_ends(void* from, size_t size, void* caller);
unsigned checks_code(void* caller);  // where that is in the kernel's module
