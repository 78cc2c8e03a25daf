// Programmatic dependent launch (from sm_90 on): a kernel may be on the chip before the one before it in the stream ends.
//
// What it does until it waits must not depend on that one, nor disturb it. Every block waits, also one that has nothing to
// do: a kernel that ended first would let the next one start before the one before. On other chips, and where the launch
// does not ask for it, both say nothing.
#pragma once

#ifndef CUDA_ON_CPU
// The next kernel may come as soon as all blocks of this one have said so, or have ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Until the kernel before has ended, and what it wrote can be read.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif
