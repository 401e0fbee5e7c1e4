// The CUDA built-ins for a host compiler: included before every kernel source.
//
// No standard header is included, so that a kernel compiles in a fraction of a second and cannot
// come to rely on what NVRTC does not have. Words in CUDA_ON_CPU_* that stay in the preprocessed
// text mark what build.py looks for: kernels, their launch bounds, shared variables. It appends
// for each kernel what Kernel, at the end, describes.
#pragma once

#include "interface.h"

#define CUDA_ON_CPU 1
#define __CUDACC__ 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#define __device__
#define __host__
#define __constant__ static
#define __global__ CUDA_ON_CPU_KERNEL
#define __shared__ CUDA_ON_CPU_SHARED
#define __launch_bounds__(...) CUDA_ON_CPU_BOUNDS(__VA_ARGS__)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

const int warpSize = 32;

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;

extern "C" int printf(const char*, ...);

#define CUDA_ON_CPU_LINE int line = __builtin_LINE()

// Memory operations with a hook of their own are not to be watched a second time.
#if defined(CUDA_ON_CPU_CHECKED)
#define CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define CUDA_ON_CPU_UNWATCHED inline
#endif

#include "vectors.h"
#include "mathematics.h"
#include "together.h"
#include "atomics.h"
#include "tensor.h"
#include "hopper.h"

// ----------------------------------------------------------------------------- loads and stores

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }

inline unsigned long long clock64() { return 0; }
inline void __nanosleep(unsigned) { cuda_on_cpu_yield(); }
inline void __trap() { cuda_on_cpu_trap(); }
#define assert(condition) ((condition) ? void() : cuda_on_cpu_trap())

// ---------------------------------------------------------- calling a kernel through its arguments

namespace cuda_on_cpu {

// A pointer of any type, for the declaration of dynamic shared memory.
struct DynamicShared {
  template <class T> operator T*() const { return (T*)cuda_on_cpu_dynamic_shared(); }
};

template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I> struct MakeIndices<0, I...> { typedef Indices<I...> type; };

template <class... A, size_t... I>
CUDA_ON_CPU_UNWATCHED void call(void (*kernel)(A...), void** arguments, Indices<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <class... A>
CUDA_ON_CPU_UNWATCHED void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, typename MakeIndices<sizeof...(A)>::type());
}

// What an argument is, in one letter, as NumPy's kinds: f, i, u; p for a pointer; '?' for others.
template <class T> struct Kind { static const char value = '?'; };
template <class T> struct Kind<const T> : Kind<T> {};
#define CUDA_ON_CPU_KIND(T, K) template <> struct Kind<T> { static const char value = K; };
CUDA_ON_CPU_KIND(float, 'f')
CUDA_ON_CPU_KIND(double, 'f')
CUDA_ON_CPU_KIND(int, 'i')
CUDA_ON_CPU_KIND(short, 'i')
CUDA_ON_CPU_KIND(long, 'i')
CUDA_ON_CPU_KIND(long long, 'i')
CUDA_ON_CPU_KIND(unsigned, 'u')
CUDA_ON_CPU_KIND(unsigned short, 'u')
CUDA_ON_CPU_KIND(unsigned long, 'u')
CUDA_ON_CPU_KIND(unsigned long long, 'u')
CUDA_ON_CPU_KIND(bool, 'b')
#undef CUDA_ON_CPU_KIND

struct Parameter {
  int size;
  char kind;          // 'p': a pointer
  char element_kind;  // of what it points to
  short element_size;
};
template <class T> struct Describe {
  static constexpr Parameter value() { return {(int)sizeof(T), Kind<T>::value, '?', 0}; }
};
template <class T> struct Describe<T*> {
  static constexpr Parameter value() {
    return {(int)sizeof(T*), 'p', Kind<T>::value, (short)sizeof(T)};
  }
};
template <> struct Describe<void*> {
  static constexpr Parameter value() { return {(int)sizeof(void*), 'p', '?', 0}; }
};

struct Kernel {
  const char* name;
  void (*call)(void**);
  int max_threads;  // of __launch_bounds__; 0: none given
  int count;
  Parameter parameters[64];
};
template <class... A>
constexpr Kernel describe(const char* name, void (*call)(void**), int bound, void (*)(A...)) {
  static_assert(sizeof...(A) <= 64, "more parameters than Kernel has room for");
  return {name, call, bound, (int)sizeof...(A), {Describe<A>::value()...}};
}
constexpr int bound(int threads = 0, int = 0, int = 0) { return threads; }

}  // namespace cuda_on_cpu
