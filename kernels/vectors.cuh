// Several neighbouring elements loaded and stored as one access of up to 16 bytes.
#pragma once

// COUNT elements, aligned to all of their bytes: a load of it is one instruction.
template <typename T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack { T v[COUNT]; };

template <int COUNT, typename T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, COUNT>*>(from);
}
template <int COUNT, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, COUNT>& pack) {
  *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
}
