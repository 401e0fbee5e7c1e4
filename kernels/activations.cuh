// Activations as functions of z, and their derivatives as functions of the output y = act(z).
//
// ACT chooses one at compile time; ACT_A and ACT_B are its parameters. The formulas are those
// of gpuconv/activations.py, and so is the behaviour at the edges: NaN stays NaN, and the
// derivative at a kink is the one from the left.
#pragma once

#ifndef ACT
#define ACT 0
#endif
#ifndef ACT_A
#define ACT_A 0.0
#endif
#ifndef ACT_B
#define ACT_B 0.0
#endif

#define ACT_IDENTITY 0
#define ACT_AFFINE 1       // A z + B
#define ACT_RELU 2
#define ACT_LEAKY_RELU 3   // slope A below zero
#define ACT_ELU 4          // A
#define ACT_SELU 5         // A = alpha, B = scale
#define ACT_GELU_TANH 6
#define ACT_GELU_ERF 7
#define ACT_TANH 8
#define ACT_SIGMOID 9
#define ACT_HARD_SIGMOID 10
#define ACT_SOFTPLUS 11
#define ACT_EXPONENTIAL 12

// One name for the float and the double function, so that the text below is written once.
__device__ __forceinline__ float exp_of(float v) { return expf(v); }
__device__ __forceinline__ double exp_of(double v) { return exp(v); }
__device__ __forceinline__ float expm1_of(float v) { return expm1f(v); }
__device__ __forceinline__ double expm1_of(double v) { return expm1(v); }
__device__ __forceinline__ float log1p_of(float v) { return log1pf(v); }
__device__ __forceinline__ double log1p_of(double v) { return log1p(v); }
__device__ __forceinline__ float tanh_of(float v) { return tanhf(v); }
__device__ __forceinline__ double tanh_of(double v) { return tanh(v); }
__device__ __forceinline__ float erf_of(float v) { return erff(v); }
__device__ __forceinline__ double erf_of(double v) { return erf(v); }
__device__ __forceinline__ float abs_of(float v) { return fabsf(v); }
__device__ __forceinline__ double abs_of(double v) { return fabs(v); }

template <typename S> __device__ __forceinline__ S activate(S z) {
  const S a = S(ACT_A), b = S(ACT_B);
  (void)a, (void)b;
#if ACT == ACT_AFFINE
  return a * z + b;
#elif ACT == ACT_RELU
  return z < S(0) ? S(0) : z;
#elif ACT == ACT_LEAKY_RELU
  return z > S(0) ? z : a * z;
#elif ACT == ACT_ELU
  return z > S(0) ? z : a * expm1_of(z);
#elif ACT == ACT_SELU
  return b * (z > S(0) ? z : a * expm1_of(z));
#elif ACT == ACT_GELU_TANH
  return S(0.5) * z * (S(1) + tanh_of(S(0.7978845608028654) * (z + S(0.044715) * z * z * z)));
#elif ACT == ACT_GELU_ERF
  return S(0.5) * z * (S(1) + erf_of(z * S(0.7071067811865476)));
#elif ACT == ACT_TANH
  return tanh_of(z);
#elif ACT == ACT_SIGMOID
  const S e = exp_of(-abs_of(z));
  return (z < S(0) ? e : S(1)) / (S(1) + e);
#elif ACT == ACT_HARD_SIGMOID
  const S line = S(0.2) * z + S(0.5);
  return line < S(0) ? S(0) : (line > S(1) ? S(1) : line);
#elif ACT == ACT_SOFTPLUS
  return (z < S(0) ? S(0) : z) + log1p_of(exp_of(-abs_of(z)));
#elif ACT == ACT_EXPONENTIAL
  return exp_of(z);
#else
  return z;
#endif
}

// The derivative where the function's value is y.
template <typename S> __device__ __forceinline__ S activation_grad(S y) {
  const S a = S(ACT_A), b = S(ACT_B);
  (void)a, (void)b, (void)y;
#if ACT == ACT_AFFINE
  return a;
#elif ACT == ACT_RELU
  return y > S(0) ? S(1) : S(0);
#elif ACT == ACT_LEAKY_RELU
  return y > S(0) ? S(1) : a;
#elif ACT == ACT_ELU
  return y > S(0) ? S(1) : y + a;
#elif ACT == ACT_SELU
  return y > S(0) ? b : y + b * a;
#elif ACT == ACT_TANH
  return S(1) - y * y;
#elif ACT == ACT_SIGMOID
  return y * (S(1) - y);
#elif ACT == ACT_HARD_SIGMOID
  return y > S(0) && y < S(1) ? S(0.2) : S(0);
#elif ACT == ACT_SOFTPLUS
  return -expm1_of(-y);
#elif ACT == ACT_EXPONENTIAL
  return y;
#else
  return S(1);
#endif
}
