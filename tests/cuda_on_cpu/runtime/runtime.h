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

// Of checks.cpp; a runtime without checks has empty ones. Copies without a source write zeros.
void checks_begin(const Launch* launch, char* dynamic_shared, size_t most);
void checks_end();
void checks_copy_starts(void* to, const void* from, size_t size, void* caller);
void checks_copy_lands(void* to, const void* from, size_t size, void* caller);
unsigned checks_code(void* caller);  // where that is in the kernel's module
