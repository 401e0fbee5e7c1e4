// CUDA's mathematical functions: the C library's, and overloads for float under the plain names.
#pragma once

#define CUDA_ON_CPU_MATH1(F)                                                                     \
  extern "C" double F(double) noexcept;                                                          \
  extern "C" float F##f(float) noexcept;                                                         \
  inline float F(float v) { return F##f(v); }
#define CUDA_ON_CPU_MATH2(F)                                                                     \
  extern "C" double F(double, double) noexcept;                                                  \
  extern "C" float F##f(float, float) noexcept;                                                  \
  inline float F(float a, float b) { return F##f(a, b); }

CUDA_ON_CPU_MATH1(exp)
CUDA_ON_CPU_MATH1(exp2)
CUDA_ON_CPU_MATH1(expm1)
CUDA_ON_CPU_MATH1(log)
CUDA_ON_CPU_MATH1(log2)
CUDA_ON_CPU_MATH1(log10)
CUDA_ON_CPU_MATH1(log1p)
CUDA_ON_CPU_MATH1(sqrt)
CUDA_ON_CPU_MATH1(cbrt)
CUDA_ON_CPU_MATH1(sin)
CUDA_ON_CPU_MATH1(cos)
CUDA_ON_CPU_MATH1(tan)
CUDA_ON_CPU_MATH1(asin)
CUDA_ON_CPU_MATH1(acos)
CUDA_ON_CPU_MATH1(atan)
CUDA_ON_CPU_MATH1(sinh)
CUDA_ON_CPU_MATH1(cosh)
CUDA_ON_CPU_MATH1(tanh)
CUDA_ON_CPU_MATH1(erf)
CUDA_ON_CPU_MATH1(erfc)
CUDA_ON_CPU_MATH1(tgamma)
CUDA_ON_CPU_MATH1(lgamma)
CUDA_ON_CPU_MATH1(floor)
CUDA_ON_CPU_MATH1(ceil)
CUDA_ON_CPU_MATH1(trunc)
CUDA_ON_CPU_MATH1(round)
CUDA_ON_CPU_MATH1(rint)
CUDA_ON_CPU_MATH1(fabs)
CUDA_ON_CPU_MATH2(pow)
CUDA_ON_CPU_MATH2(fmod)
CUDA_ON_CPU_MATH2(remainder)
CUDA_ON_CPU_MATH2(atan2)
CUDA_ON_CPU_MATH2(hypot)
CUDA_ON_CPU_MATH2(copysign)
CUDA_ON_CPU_MATH2(fmin)
CUDA_ON_CPU_MATH2(fmax)
#undef CUDA_ON_CPU_MATH1
#undef CUDA_ON_CPU_MATH2

extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
inline float ldexp(float a, int n) { return ldexpf(a, n); }

inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline float rsqrt(float v) { return rsqrtf(v); }

extern "C" int abs(int) noexcept;
inline long long abs(long long v) { return v < 0 ? -v : v; }
inline float abs(float v) { return fabsf(v); }
inline double abs(double v) { return fabs(v); }

#define CUDA_ON_CPU_MINMAX(T)                                                                    \
  inline T min(T a, T b) { return b < a ? b : a; }                                               \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_CPU_MINMAX(int)
CUDA_ON_CPU_MINMAX(unsigned)
CUDA_ON_CPU_MINMAX(long)
CUDA_ON_CPU_MINMAX(unsigned long)
CUDA_ON_CPU_MINMAX(long long)
CUDA_ON_CPU_MINMAX(unsigned long long)
#undef CUDA_ON_CPU_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline bool isnan(float v) { return v != v; }
inline bool isnan(double v) { return v != v; }
inline bool isinf(float v) { return __builtin_isinf(v); }
inline bool isinf(double v) { return __builtin_isinf(v); }
inline bool isfinite(float v) { return __builtin_isfinite(v); }
inline bool isfinite(double v) { return __builtin_isfinite(v); }
inline bool signbit(float v) { return __builtin_signbit(v); }
inline bool signbit(double v) { return __builtin_signbit(v); }

// The fast and the explicitly rounded ones. The fast ones are exact here.
inline float __expf(float v) { return expf(v); }
inline float __exp10f(float v) { return powf(10.0f, v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float __sinf(float v) { return sinf(v); }
inline float __cosf(float v) { return cosf(v); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }

template <class To, class From> inline To cuda_on_cpu_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &v, sizeof to);
  return to;
}
inline int __float_as_int(float v) { return cuda_on_cpu_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return cuda_on_cpu_cast<unsigned>(v); }
inline float __int_as_float(int v) { return cuda_on_cpu_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_cpu_cast<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_cpu_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_cpu_cast<double>(v); }

namespace cuda_on_cpu {

// The value of a float16.
inline float half_value(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
  const float tiny = (float)mantissa * 0x1p-24f;
  return sign ? -tiny : tiny;
}

}  // namespace cuda_on_cpu

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return (unsigned)((unsigned long long)a * b >> 32);
}
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1u) << (31 - i);
  return r;
}
