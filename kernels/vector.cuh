// Neighbouring elements as one: loads and stores of up to 16 bytes, the widest a thread has.
#pragma once

// Aligned to all of its bytes: a load of it is one instruction.
template <typename T, int N> struct alignas(N * sizeof(T)) Vector {
  T v[N];
};

// The address must be a multiple of the vector's bytes.
template <int N, typename T> __device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, N>& value) {
  *reinterpret_cast<Vector<T, N>*>(to) = value;
}
