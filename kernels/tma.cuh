// Copies by the tensor memory accelerator (TMA), and the barriers that tell of them.
//
// One thread asks for a whole box of a tensor, up to some ten KiB; a unit of its own computes the
// addresses, fills with zeros what lies outside of the tensor, and writes it into shared memory,
// swizzled so that rows of 128 bytes lie in different banks: in row r (of 128 bytes, counted from
// a multiple of 1024) 16-byte chunk c goes to chunk c ^ r % 8. What tensor, what box and what
// swizzle is in a tensor map of 128 bytes, which the driver encodes (gpuconv/cuda/tensor_map.py)
// and a kernel gets as a __grid_constant__ parameter. Coordinates run from the innermost axis on.
//
//   tiled     the box starts at the coordinates
//   im2col    a box of pixels and channels: some pixels in a row, counted on along W, then H (and
//             D), then N, by the map's strides and from border to border of a box around the image
//             which the map holds - just as the rows of im2col's matrix follow each other -
//             each moved by the offsets: those of a tap. Outside of the image are zeros.
//
// An mbarrier is 64 bits in shared memory: a phase ends when as many arrivals as it was
// initialised with have come and all bytes that were announced (mbarrier_expect) have landed;
// the next one begins by itself. mbarrier_wait waits for the end of the phase of a parity: 0 for
// the first, 1 for the second, 0 again. A wait for parity 1 of a fresh barrier returns at once.
//
// Needs sm_90.
#pragma once

#if __CUDA_ARCH__ >= 900

typedef unsigned long long Mbarrier;

struct alignas(64) TensorMap {
  unsigned long long words[16];
};

// The address in shared memory that instructions take.
__device__ __forceinline__ unsigned shared_address(const void* p) {
#ifdef CUDA_ON_CPU
  return cuda_on_cpu::shared_address(p);
#else
  return unsigned(__cvta_generic_to_shared(p));
#endif
}

// ------------------------------------------------------------------------------------ barriers

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes the calling thread's initialised barriers, and what it wrote to shared memory, known to
// copies. Other threads know after a __syncthreads.
__device__ __forceinline__ void mbarrier_init_fence() {
#ifdef CUDA_ON_CPU
  cuda_on_cpu_proxy_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, int bytes) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::mbarrier_wait(barrier, parity);
#else
  unsigned done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  } while (!done);
#endif
}

// -------------------------------------------------------------------------------------- copies

// Fetches a map that is soon needed.
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
#ifndef CUDA_ON_CPU
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// The box at (x, y) of a tensor of two axes.
__device__ __forceinline__ void tensor_copy(void* to, const TensorMap* map, Mbarrier* barrier,
                                            int x, int y) {
#ifdef CUDA_ON_CPU
  const int at[] = {x, y};
  cuda_on_cpu::tensor_copy(to, map, barrier, 2, at, nullptr);
#else
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
#endif
}

// The box at (x, y, z) of a tensor of three axes.
__device__ __forceinline__ void tensor_copy(void* to, const TensorMap* map, Mbarrier* barrier,
                                            int x, int y, int z) {
#ifdef CUDA_ON_CPU
  const int at[] = {x, y, z};
  cuda_on_cpu::tensor_copy(to, map, barrier, 3, at, nullptr);
#else
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y),
               "r"(z)
               : "memory");
#endif
}

// Pixels from (w, h, n) on, channels from c on, moved by a tap's offsets.
__device__ __forceinline__ void tensor_copy_im2col(void* to, const TensorMap* map,
                                                   Mbarrier* barrier, int c, int w, int h, int n,
                                                   int tap_w, int tap_h) {
#ifdef CUDA_ON_CPU
  const int at[] = {c, w, h, n}, tap[] = {tap_w, tap_h};
  cuda_on_cpu::tensor_copy(to, map, barrier, 4, at, tap);
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w),
               "r"(h), "r"(n), "h"(short(tap_w)), "h"(short(tap_h))
               : "memory");
#endif
}

// The same of images that have depth.
__device__ __forceinline__ void tensor_copy_im2col(void* to, const TensorMap* map,
                                                   Mbarrier* barrier, int c, int w, int h, int d,
                                                   int n, int tap_w, int tap_h, int tap_d) {
#ifdef CUDA_ON_CPU
  const int at[] = {c, w, h, d, n}, tap[] = {tap_w, tap_h, tap_d};
  cuda_on_cpu::tensor_copy(to, map, barrier, 5, at, tap);
#else
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w),
               "r"(h), "r"(d), "r"(n), "h"(short(tap_w)), "h"(short(tap_h)), "h"(short(tap_d))
               : "memory");
#endif
}

#endif  // sm_90
