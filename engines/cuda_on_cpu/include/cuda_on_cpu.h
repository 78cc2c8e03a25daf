// CUDA C++ for a host compiler: include this before a kernel's source and g++ builds it for the CPU.
//
// Threads are fibers of one operating-system thread: a thread runs until it meets a barrier or a shuffle, then another
// one does. Blocks run one after another. See runtime.cpp for who runs when, watch.cpp for what they may touch.
//
// Supported: 1-D to 3-D grids, static and dynamic shared memory, __syncthreads, named barriers of a whole block,
// __syncwarp, the four shuffles, votes, atomicAdd, the common intrinsics, vector types, products of bfloat16 matrices
// (16 x 8 x 16, and those of four warps) and the loads that go with them, asynchronous copies of 4, 8 and 16 bytes.
// Not supported: inline PTX, bulk copies and their barriers, barriers of a part of a block, clusters, textures, and
// anything in which blocks wait for each other. A kernel asks for CUDA_ON_CPU where it needs another spelling.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <type_traits>
#include <utility>

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
// One section holds all static shared memory, so that it can be filled with NaN before every block.
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_ON_CPU_VECTORS(T, NAME)                        \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };        \
  struct NAME##3 { T x, y, z; };                            \
  struct alignas(4 * sizeof(T)) NAME##4 { T x, y, z, w; };  \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
#undef CUDA_ON_CPU_VECTORS

namespace cuda_on_cpu {

// What the running thread sees of itself; the scheduler rewrites it with every switch.
struct Now {
  dim3 thread, block, block_size, grid_size;
  unsigned lane;  // within the warp
};
extern Now now;

void block_barrier();  // all threads at one place in the program, which is where this is called from
void named_barrier(unsigned name, unsigned count);  // all threads, `count` of them, wherever each of them is
void warp_barrier(unsigned mask);
void* dynamic_shared();
// Every lane of the mask hands over 8 bytes and gets those of lane `from` of its warp.
uint64_t exchange(unsigned mask, uint64_t mine, unsigned from);
// Every lane of the warp lays down `count` (at most 8) words. Returns all of them, lane by lane, 8 words apart: good
// until the next warp operation.
constexpr unsigned BOARD = 8;
const unsigned* lay_down(const unsigned* words, unsigned count);

// Tensor cores (tensor_core.cpp): one lane's part of c += a b, 16 x 8 x 16, and of a product of four warps.
struct Product {
  float* c;
  const unsigned* a;
  unsigned b[2];
};
void multiply_warp(const Product& mine);
struct GroupProduct {
  float* c;
  const unsigned* a;
  unsigned columns;
  bool transposed, add;
  const char* at;
  int k_step, n_step;  // both 0: rows of 128 bytes, swizzled
};
void group_begin();
void group_multiply(const GroupProduct& mine);
void group_commit();
void group_wait(unsigned left);
void publish_shared();
void wait_for_previous();  // the running thread may use what the kernels before left

// Asynchronous copies (copies.cpp) of the running thread.
void start_copy(void* to, const void* from, unsigned bytes);  // from null: zeros
void close_copies();  // those since the last call are a group
void wait_for_closed_copies(unsigned left);  // of all groups but the newest `left`
void wait_for_all_copies();
struct Copies {};

template <class To, class From> inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T> inline T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = exchange(mask, word, from);
  memcpy(&value, &word, sizeof value);
  return value;
}

struct Kernel {
  void (*call)(void* function, void** arguments);
  void* function;
  char *shared, *shared_end;  // static shared memory of the kernel's module
};

int run(const Kernel& kernel, const unsigned* grid, const unsigned* block, size_t dynamic_bytes, void** arguments);

// Code that is not the kernel's: the watch does not look at it.
#define CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize("thread")))

template <class F> struct Caller;
template <class... A> struct Caller<void (*)(A...)> {
  template <size_t... I> CUDA_ON_CPU_UNWATCHED static void spread(void* function, void** arguments, std::index_sequence<I...>) {
    ((void (*)(A...))function)(*(std::remove_cv_t<std::remove_reference_t<A>>*)arguments[I]...);
  }
  CUDA_ON_CPU_UNWATCHED static void call(void* function, void** arguments) {
    spread(function, arguments, std::index_sequence_for<A...>{});
  }
};

}  // namespace cuda_on_cpu

extern "C" {
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

// Makes `launch_NAME(grid, block, dynamic_bytes, arguments)` of the kernel NAME.
#define CUDA_ON_CPU_EXPORT(NAME)                                                                         \
  extern "C" __attribute__((visibility("default"))) CUDA_ON_CPU_UNWATCHED int launch_##NAME(             \
      const unsigned* grid, const unsigned* block, size_t bytes, void** arguments) {                     \
    return cuda_on_cpu::run({cuda_on_cpu::Caller<decltype(&NAME)>::call, (void*)&NAME,                   \
                             __start_cuda_shared, __stop_cuda_shared}, grid, block, bytes, arguments);   \
  }

#define threadIdx (cuda_on_cpu::now.thread)
#define blockIdx (cuda_on_cpu::now.block)
#define blockDim (cuda_on_cpu::now.block_size)
#define gridDim (cuda_on_cpu::now.grid_size)
#define warpSize 32

__forceinline__ void __syncthreads() { cuda_on_cpu::block_barrier(); }  // inlined: its place is the caller's
template <int NAME, int THREADS> inline void meet_by_name() {
  static_assert(NAME > 0 && NAME < 16 && THREADS % 32 == 0, "a name that is not __syncthreads', and whole warps");
  cuda_on_cpu::named_barrier(NAME, THREADS);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// A shuffle past the end of its segment returns the lane's own value, as on the GPU.
template <class T> inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  const unsigned lane = cuda_on_cpu::now.lane, base = lane & ~(width - 1u);
  return cuda_on_cpu::shuffle(mask, x, base | ((unsigned)from & (width - 1u)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32) {
  const unsigned lane = cuda_on_cpu::now.lane, from = lane ^ (unsigned)with;
  return cuda_on_cpu::shuffle(mask, x, from / width <= lane / width ? from : lane);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  const unsigned lane = cuda_on_cpu::now.lane;
  return cuda_on_cpu::shuffle(mask, x, (lane & (width - 1u)) + by < (unsigned)width ? lane + by : lane);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
  const unsigned lane = cuda_on_cpu::now.lane;
  return cuda_on_cpu::shuffle(mask, x, (lane & (width - 1u)) >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) votes |= cuda_on_cpu::shuffle(mask, (unsigned)(predicate != 0), lane) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T> inline T atomicAdd(T* p, T x) {  // fibers do not interrupt each other
  const T before = *p;
  *p = before + x;
  return before;
}

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T x) { *p = x; }
template <class T> inline void __stcg(T* p, T x) { *p = x; }

inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
using std::max;
using std::min;

// 16-bit floats, by the hardware's own rules: to nearest even, one NaN, overflow to infinity.
inline float half_to_float(unsigned short bits) { return (float)cuda_on_cpu::bits_as<_Float16>(bits); }
inline unsigned short float_to_half(float x) {
  return x != x ? 0x7fff : cuda_on_cpu::bits_as<unsigned short>((_Float16)x);
}
inline unsigned short float_to_bfloat(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fff : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Tensor cores: see backends/cupy_chunked/kernels/tensor_core.cuh for who holds what.
inline float bfloat_to_float(unsigned bits) { return __uint_as_float(bits << 16); }
inline unsigned bfloat_pair(float first, float second) {
  return float_to_bfloat(first) | (unsigned)float_to_bfloat(second) << 16;
}
using Shared = const char*;
inline Shared shared_of(const void* p) { return (Shared)p; }
inline void load_matrices(unsigned (&r)[4], Shared row) {
  const unsigned lane = cuda_on_cpu::now.lane;
  for (unsigned m = 0; m < 4; m++) {
    const auto at = (const unsigned short*)cuda_on_cpu::exchange(~0u, (uint64_t)row, 8 * m + lane / 4) + 2 * (lane % 4);
    r[m] = at[0] | (unsigned)at[1] << 16;
  }
}
inline void load_transposed(unsigned (&r)[4], Shared row) {
  const unsigned lane = cuda_on_cpu::now.lane;
  for (unsigned m = 0; m < 4; m++) {
    const auto first = (const unsigned short*)cuda_on_cpu::exchange(~0u, (uint64_t)row, 8 * m + 2 * (lane % 4));
    const auto second = (const unsigned short*)cuda_on_cpu::exchange(~0u, (uint64_t)row, 8 * m + 2 * (lane % 4) + 1);
    r[m] = first[lane / 4] | (unsigned)second[lane / 4] << 16;
  }
}
CUDA_ON_CPU_UNWATCHED inline unsigned transposed(unsigned pair) {
  const unsigned lane = cuda_on_cpu::now.lane, shift = lane / 4 % 2 * 16;
  const unsigned *const board = cuda_on_cpu::lay_down(&pair, 1), *const column = board + lane / 8 * cuda_on_cpu::BOARD;
  const unsigned first = column[2 * (lane % 4) * 4 * cuda_on_cpu::BOARD] >> shift & 0xffffu;
  return first | (column[(2 * (lane % 4) + 1) * 4 * cuda_on_cpu::BOARD] >> shift & 0xffffu) << 16;
}
CUDA_ON_CPU_UNWATCHED inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  float sum[4] = {c[0], c[1], c[2], c[3]};
  const unsigned left[4] = {a[0], a[1], a[2], a[3]};
  cuda_on_cpu::multiply_warp({sum, left, {b0, b1}});
  for (int e = 0; e < 4; e++) c[e] = sum[e];
}

// Asynchronous copies (cp.async), see backends/cupy/kernels/numbers.cuh: until the thread has waited for one, its place
// holds NaN. That file brings a twin for the CPU that copies at once and has nothing to wait for. The ones here are
// called in its stead: specializations of its template, and a wait that the macro gives an argument. Where the file
// defines its own wait, the macro turns the argument into a parameter, `Copies (*)()`, and nobody calls that one.
template <int BYTES> inline void copy_async(void* shared, const void* global, bool live);
template <> inline void copy_async<4>(void* shared, const void* global, bool live) {
  cuda_on_cpu::start_copy(shared, live ? global : nullptr, 4);
}
template <> inline void copy_async<8>(void* shared, const void* global, bool live) {
  cuda_on_cpu::start_copy(shared, live ? global : nullptr, 8);
}
template <> inline void copy_async<16>(void* shared, const void* global, bool live) {
  cuda_on_cpu::start_copy(shared, live ? global : nullptr, 16);
}
inline void wait_for_copies(cuda_on_cpu::Copies) { cuda_on_cpu::wait_for_all_copies(); }
#define wait_for_copies() wait_for_copies(cuda_on_cpu::Copies())
inline void group_copies() { cuda_on_cpu::close_copies(); }
template <int LEFT> inline void wait_for_group() {
  static_assert(LEFT >= 0, "groups");
  cuda_on_cpu::wait_for_closed_copies(LEFT);
}

// Group products (wgmma), see backends/cupy_chunked/kernels/group.cuh. Until they have been waited for, accumulators
// hold NaN, and B has not been read.
struct Matrix {
  Shared at;
  int k_step, n_step;  // bytes from one core matrix to the next, along the inner dimension and along the columns; or 0
};
inline Matrix matrix_of(const void* shared, int k_step, int n_step) { return {shared_of(shared), k_step, n_step}; }
inline Matrix swizzled_matrix_of(const void* shared) { return {shared_of(shared), 0, 0}; }
inline Matrix moved(Matrix m, int bytes) { return {m.at + bytes, m.k_step, m.n_step}; }
inline void group_begin() { cuda_on_cpu::group_begin(); }
template <int N, bool TRANSPOSED>
CUDA_ON_CPU_UNWATCHED inline void group_multiply(float* c, const unsigned (&a)[4], Matrix b, bool add) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "columns");
  cuda_on_cpu::group_multiply({c, a, N, TRANSPOSED, add, b.at, b.k_step, b.n_step});
}
inline void group_commit() { cuda_on_cpu::group_commit(); }
template <int LEFT> inline void group_wait() {
  static_assert(LEFT >= 0 && LEFT < 8, "groups");
  cuda_on_cpu::group_wait(LEFT);
}
inline void publish_shared() { cuda_on_cpu::publish_shared(); }

// Programmatic dependent launch, see backends/cupy_chunked/kernels/overlap.cuh: launches follow one another here,
// and the watch objects to what would not have been in order.
inline void let_next_start() {}
inline void wait_for_previous() { cuda_on_cpu::wait_for_previous(); }
