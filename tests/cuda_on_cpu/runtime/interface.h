// What the runtime (scheduler.cpp, checks.cpp) and the kernels compiled against device.h share.
// The layout of Region and Launch is repeated in launch.py.
#pragma once

typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef __UINT64_TYPE__ cuda_on_cpu_bits;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

enum { SHARED = -1, VARIABLE = -2 };

// Memory that a kernel may touch: an array it was given, or a variable of its module.
struct Region {
  uintptr_t start;
  size_t size;
  unsigned shift;    // log2 of the bytes that share one record of accesses
  int argument;      // its number, or SHARED, or VARIABLE
  const char* name;  // of the variable
};

struct Launch {
  void (*call)(void**);
  void** arguments;
  unsigned grid[3], block[3];
  size_t dynamic_shared;
  const Region* regions;
  size_t region_count;
  size_t guard;       // bytes before and after each argument that hold 0xff
  unsigned preempt;   // a running thread makes way at one memory access in this many; 0: at none
  int shuffle;        // blocks and threads in a random order
  unsigned long long seed;
  // Of the checking runtime, three for each region, or null: bytes that threads read; of these, the
  // bytes that no thread of the same block had read before; bytes that they wrote.
  unsigned long long* traffic;
};

// A lane's part of a wgmma: its sums, and the descriptors of both operands.
struct cuda_on_cpu_product {
  int kind, count;
  bool a_across, b_across;
  float* d;
  unsigned long long a, b;
  void* caller;
};

extern "C" {
// Not const, though kernels must not change them: they change from thread to thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// Runs a grid. Returns 0, or 1 with what went wrong in message.
int cuda_on_cpu_launch(const Launch* launch, char* message, size_t size);

// Block barrier. op 0: none; 1: count; 2: and; 3: or, over the predicates.
int cuda_on_cpu_barrier(int op, int predicate, int line);

// Every thread of the warp named in mask gives a value and sees all of them: the primitive under
// shuffles, votes and whatever else a warp does together. Returns the lanes that took part: those
// of mask, as far as the block has such threads; others read as ones. A
// value may be a pointer to a thread's own variable (threads share one address space), valid
// for the others until this thread leaves its next gather.
unsigned cuda_on_cpu_gather(int op, unsigned mask, cuda_on_cpu_bits value, cuda_on_cpu_bits* all,
                            int line);

// The same for all 32 lanes; the last to arrive calls whole, if it is given, with their values
// before any goes on.
void cuda_on_cpu_whole_warp(int op, cuda_on_cpu_bits value, cuda_on_cpu_bits* all,
                            void (*whole)(const cuda_on_cpu_bits* all));

// Asynchronous copies (cp.async, commit_group, wait_group) of the thread that calls.
void cuda_on_cpu_copy_async(void* to, const void* from, int size, int valid, void* caller);
void cuda_on_cpu_copy_commit();
void cuda_on_cpu_copy_wait(int most);

// Barriers in shared memory, copies of tensors and products of a warpgroup (hopper.cpp).
unsigned cuda_on_cpu_shared_address(const void* p);
void cuda_on_cpu_proxy_fence();
void cuda_on_cpu_mbarrier_init(void* barrier, int arrivals, void* caller);
void cuda_on_cpu_mbarrier_arrive(void* barrier, int bytes, void* caller);
void cuda_on_cpu_mbarrier_wait(void* barrier, int parity, void* caller);
void cuda_on_cpu_tensor_copy(void* to, const void* map, void* barrier, int axes, const int* at,
                             const int* tap, void* caller);
void cuda_on_cpu_wgmma(const cuda_on_cpu_product* mine);
void cuda_on_cpu_wgmma_fence();
void cuda_on_cpu_wgmma_commit();
void cuda_on_cpu_wgmma_wait(int most);

unsigned cuda_on_cpu_active_mask();
unsigned cuda_on_cpu_lane();
void* cuda_on_cpu_dynamic_shared();
size_t cuda_on_cpu_dynamic_shared_size();
void cuda_on_cpu_yield();
[[noreturn]] void cuda_on_cpu_fail(const char* format, ...);
void cuda_on_cpu_trap();

// Of the checking runtime: an atomic operation is about to happen, called from there.
void cuda_on_cpu_atomic(const void* address, size_t size, void* caller);
}

enum {
  GATHER_SYNC, GATHER_SHUFFLE, GATHER_VOTE, GATHER_MATCH, GATHER_REDUCE, GATHER_USER,
  GATHER_LDMATRIX = 100,  // and twice the number of tiles, and whether they are transposed
  GATHER_MMA = 200,       // and the shape and type
  GATHER_WGMMA = 300,     // and 1 for its fence, 2 for its commit, 3 for its wait
};
