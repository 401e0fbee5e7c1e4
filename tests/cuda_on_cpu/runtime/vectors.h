// Vector types and their makers.
#pragma once

#define CUDA_ON_CPU_VECTORS(T, NAME, A2, A4)                                                     \
  struct NAME##1 { T x; };                                                                       \
  struct __attribute__((aligned(A2))) NAME##2 { T x, y; };                                       \
  struct __attribute__((aligned(A4))) NAME##4 { T x, y, z, w; };                                 \
  inline NAME##1 make_##NAME##1(T x) { return {x}; }                                             \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                     \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define CUDA_ON_CPU_VECTOR3(T, NAME)                                                             \
  struct NAME##3 { T x, y, z; };                                                                 \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }

CUDA_ON_CPU_VECTORS(signed char, char, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
CUDA_ON_CPU_VECTOR3(int, int)
CUDA_ON_CPU_VECTOR3(float, float)
CUDA_ON_CPU_VECTOR3(double, double)
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
