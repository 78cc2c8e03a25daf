// Hopper's products of four warps (wgmma): A of 64 rows in registers, sixteen to a warp, B in shared memory, no loads.
//
// A and the accumulators lie as those of `multiply`, accumulators of 16 x 8 side by side. B lies in core matrices of
// 8 x 8, 128 bytes each. The products run on by themselves: accumulators are nobody's between `group_multiply` and the
// wait for the group that it was committed in, and B must stay.
#pragma once

#ifndef CUDA_ON_CPU
using Matrix = unsigned long long;  // a descriptor: address and strides, in units of 16 bytes
// Bytes from one core matrix to the next along the inner dimension, and along B's columns.
__device__ __forceinline__ Matrix matrix_of(const void* shared, int k_step, int n_step) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(shared);
  return (Matrix)((at & 0x3ffff) >> 4) | (Matrix)(k_step >> 4) << 16 | (Matrix)(n_step >> 4) << 32;
}
// Rows of 128 bytes, eight of them from a multiple of 1024 on, units of 16 bytes swizzled (see Tile).
__device__ __forceinline__ Matrix swizzled_matrix_of(const void* shared) {
  return matrix_of(shared, 16, 1024) | (Matrix)1 << 62;
}
__device__ __forceinline__ Matrix moved(Matrix b, int bytes) { return b + (bytes >> 4); }

__device__ __forceinline__ void group_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// What this thread has written to shared memory may be read by products after the next barrier.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A block's registers, shared out anew: all warps of four ask for the same.
template <int COUNT> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// Registers are not read before this, and what was written to them before it is there: said to the compiler, which
// does not know when products end.
template <int COUNT> __device__ __forceinline__ void settle(float (&x)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}

// c = a b, or c += a b if `add`. TRANSPOSED: core matrices have B's rows as rows; otherwise its columns.
template <int N, bool TRANSPOSED>
__device__ __forceinline__ void group_multiply(float* c, const unsigned (&a)[4], Matrix b, bool add) {
  static_assert(N == 16 || N == 32 || N == 48 || N == 64, "columns");
  if constexpr (N == 16) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, add, 1, 1, %14;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)TRANSPOSED));
  } else if constexpr (N == 32) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, add, 1, 1, %22;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)TRANSPOSED));
  } else if constexpr (N == 48) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %29, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23}, "
        "{%24, %25, %26, %27}, %28, add, 1, 1, %30;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)TRANSPOSED));
  } else {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, %38;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)TRANSPOSED));
  }
}
#else
template <int COUNT> inline void more_registers() {}
template <int COUNT> inline void fewer_registers() {}
template <int COUNT> inline void settle(float (&)[COUNT][4]) {}
#endif
