// __half for a host compiler: every conversion rounds to nearest even, and arithmetic rounds once.
#pragma once

namespace cuda_on_cpu {

inline unsigned short half_bits(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fff;                            // NaN
  if (a >= 0x47800000u) return (unsigned short)(sign | 0x7c00);  // 65536 and more
  if (a >= 0x38800000u)                                          // normal; may carry to infinity
    return (unsigned short)(sign | (a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13);
  if (a <= 0x33000000u) return (unsigned short)sign;  // up to half the smallest subnormal
  const unsigned shift = 126u - (a >> 23), whole = (a & 0x7fffffu) | 0x800000u;
  const unsigned rest = whole & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
  unsigned q = whole >> shift;
  if (rest > middle || (rest == middle && (q & 1u))) q++;
  return (unsigned short)(sign | q);
}

// Rounds to float so that rounding again, to half, is as rounding once: an inexact result is
// taken toward zero and made odd.
inline float to_odd(double value) {
  float f = (float)value;
  if ((double)f == value || f != f) return f;
  unsigned bits = __float_as_uint(f);
  if (fabs((double)f) > fabs(value)) bits--;
  return __uint_as_float(bits | 1u);
}

}  // namespace cuda_on_cpu

struct __half_raw {
  unsigned short x;
};

struct __half {
  unsigned short __x;
  __half() = default;
  __half(const __half_raw& raw) : __x(raw.x) {}
  __half(float v) : __x(cuda_on_cpu::half_bits(v)) {}
  __half(double v) : __x(cuda_on_cpu::half_bits(cuda_on_cpu::to_odd(v))) {}
  __half(int v) : __half((double)v) {}
  __half(unsigned v) : __half((double)v) {}
  __half(long long v) : __half((double)v) {}
  operator float() const { return cuda_on_cpu::half_value(__x); }
  operator __half_raw() const { return {__x}; }
  __half& operator+=(__half b);
  __half& operator-=(__half b);
  __half& operator*=(__half b);
  __half& operator/=(__half b);
};
typedef __half half;

struct __attribute__((aligned(4))) __half2 {
  __half x, y;
};
typedef __half2 half2;

inline float __half2float(__half v) { return cuda_on_cpu::half_value(v.__x); }
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half __double2half(double v) { return __half(v); }
inline __half __ushort_as_half(unsigned short v) { return __half(__half_raw{v}); }
inline unsigned short __half_as_ushort(__half v) { return v.__x; }
inline __half __int2half_rn(int v) { return __half(v); }
inline int __half2int_rz(__half v) { return (int)__half2float(v); }

// A float holds sums and products of halves exactly, or close enough to round to the same half.
#define CUDA_ON_CPU_HALF(OP, NAME)                                                               \
  inline __half operator OP(__half a, __half b) {                                                \
    return __half(__half2float(a) OP __half2float(b));                                           \
  }                                                                                              \
  inline __half& __half::operator OP##=(__half b) { return *this = *this OP b; }                 \
  inline __half NAME(__half a, __half b) { return a OP b; }                                      \
  inline __half2 NAME##2(__half2 a, __half2 b) { return {a.x OP b.x, a.y OP b.y}; }              \
  inline __half2 operator OP(__half2 a, __half2 b) { return NAME##2(a, b); }
CUDA_ON_CPU_HALF(+, __hadd)
CUDA_ON_CPU_HALF(-, __hsub)
CUDA_ON_CPU_HALF(*, __hmul)
CUDA_ON_CPU_HALF(/, __hdiv)
#undef CUDA_ON_CPU_HALF
inline __half operator-(__half a) { return __ushort_as_half(a.__x ^ 0x8000); }
inline __half __hneg(__half a) { return -a; }
inline __half __habs(__half a) { return __ushort_as_half(a.__x & 0x7fff); }

#define CUDA_ON_CPU_HALF(OP, NAME)                                                               \
  inline bool operator OP(__half a, __half b) { return __half2float(a) OP __half2float(b); }     \
  inline bool NAME(__half a, __half b) { return a OP b; }
CUDA_ON_CPU_HALF(==, __heq)
CUDA_ON_CPU_HALF(!=, __hne)
CUDA_ON_CPU_HALF(<, __hlt)
CUDA_ON_CPU_HALF(>, __hgt)
CUDA_ON_CPU_HALF(<=, __hle)
CUDA_ON_CPU_HALF(>=, __hge)
#undef CUDA_ON_CPU_HALF
inline bool __hisnan(__half a) { return a != a; }
inline __half __hmax(__half a, __half b) { return __half(fmaxf(a, b)); }
inline __half __hmin(__half a, __half b) { return __half(fminf(a, b)); }

// The product is exact in float, its sum with c in double, or rounded to odd.
inline __half __hfma(__half a, __half b, __half c) {
  return __half((double)__half2float(a) * __half2float(b) + (double)__half2float(c));
}

inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

CUDA_ON_CPU_ATOMIC(atomicAdd, __half, old + value)
inline __half2 atomicAdd(__half2* address, __half2 value) {  // each half by itself, as on a GPU
  return {atomicAdd(&address->x, value.x), atomicAdd(&address->y, value.y)};
}

namespace cuda_on_cpu {
template <> struct Kind<__half> { static const char value = 'f'; };
}  // namespace cuda_on_cpu
