// __nv_bfloat16 for a host compiler: the upper half of a float, rounded to nearest even.
#pragma once

struct __nv_bfloat16 {
  unsigned short __x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) __x = 0x7fff;  // NaN
    else __x = (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  operator float() const { return __uint_as_float((unsigned)__x << 16); }
};

inline float __bfloat162float(__nv_bfloat16 v) { return (float)v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }

namespace cuda_on_cpu {
template <> struct Kind<__nv_bfloat16> { static const char value = 'V'; };  // as NumPy says
}  // namespace cuda_on_cpu
