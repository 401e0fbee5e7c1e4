// The runtime without checks of memory accesses.
#include "runtime.h"

void checks_begin(const Launch*, char*, size_t) {}
void checks_end() {}
