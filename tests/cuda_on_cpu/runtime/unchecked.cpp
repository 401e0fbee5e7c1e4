// The runtime without checks of memory accesses.
#include "runtime.h"

void checks_begin(const Launch*, char*, size_t) {}
void checks_end() {}
void checks_copy_starts(void*, const void*, size_t, void*) {}
void checks_copy_lands(void*, const void*, size_t, void*) {}
unsigned checks_code(void*) { return 0; }
