// What kernels/tma.cuh and kernels/wgmma.cuh need: barriers in shared memory, copies of boxes of
// tensors, and products of a warpgroup. The work is done in hopper.cpp.
#pragma once

namespace cuda_on_cpu {

inline unsigned shared_address(const void* p) { return cuda_on_cpu_shared_address(p); }

CUDA_ON_CPU_UNWATCHED void mbarrier_init(unsigned long long* barrier, int arrivals) {
  cuda_on_cpu_mbarrier_init(barrier, arrivals, __builtin_return_address(0));
}
CUDA_ON_CPU_UNWATCHED void mbarrier_arrive(unsigned long long* barrier, int bytes) {
  cuda_on_cpu_mbarrier_arrive(barrier, bytes, __builtin_return_address(0));
}
CUDA_ON_CPU_UNWATCHED void mbarrier_wait(unsigned long long* barrier, int parity) {
  cuda_on_cpu_mbarrier_wait(barrier, parity, __builtin_return_address(0));
}

CUDA_ON_CPU_UNWATCHED void tensor_copy(void* to, const void* map, unsigned long long* barrier,
                                       int axes, const int* at, const int* tap) {
  cuda_on_cpu_tensor_copy(to, map, barrier, axes, at, tap, __builtin_return_address(0));
}

enum { WGMMA_f16, WGMMA_bf16, WGMMA_tf32 };

CUDA_ON_CPU_UNWATCHED void wgmma(int kind, float* d, int count, unsigned long long a,
                                 unsigned long long b, bool a_across, bool b_across) {
  const cuda_on_cpu_product mine = {kind, count, a_across, b_across, d, a, b,
                                    __builtin_return_address(0)};
  cuda_on_cpu_wgmma(&mine);
}

}  // namespace cuda_on_cpu
