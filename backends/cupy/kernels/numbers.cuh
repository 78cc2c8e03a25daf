// Number formats of tensors, and moving them between memory and float registers, 16 bytes at a time.
#pragma once

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

// What C++ and the CUDA intrinsics cannot say without a toolkit header is one PTX instruction each. A host
// compiler that plays the GPU defines CUDA_ON_CPU and brings the same three functions.
#ifndef CUDA_ON_CPU
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {  // to nearest even, overflow to infinity
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ unsigned short float_to_bfloat(float x) {  // to nearest even
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// A format packed in 32-bit words: how many values a word holds, and how to take them out and put them in.
template <class T> struct Format;

template <> struct Format<float> {
  static constexpr int PER_WORD = 1;
  static __device__ __forceinline__ float get(unsigned word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ unsigned put(const float* x) { return __float_as_uint(x[0]); }
  static __device__ __forceinline__ unsigned read(const float* p) { return __float_as_uint(__ldg(p)); }
  static __device__ __forceinline__ float load(const float* p) { return *p; }
  static __device__ __forceinline__ void store(float* p, float x) { *p = x; }
};

template <> struct Format<bfloat16> {
  static constexpr int PER_WORD = 2;
  static __device__ __forceinline__ float get(unsigned word, int i) {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ unsigned put(const float* x) {
    return float_to_bfloat(x[0]) | (unsigned)float_to_bfloat(x[1]) << 16;
  }
  static __device__ __forceinline__ unsigned read(const bfloat16* p) { return __ldg(&p->bits); }
  static __device__ __forceinline__ float load(const bfloat16* p) { return get(p->bits, 0); }
  static __device__ __forceinline__ void store(bfloat16* p, float x) { p->bits = float_to_bfloat(x); }
};

template <> struct Format<float16> {
  static constexpr int PER_WORD = 2;
  static __device__ __forceinline__ float get(unsigned word, int i) {
    return half_to_float((unsigned short)(i ? word >> 16 : word & 0xffffu));
  }
  static __device__ __forceinline__ unsigned put(const float* x) {
    return float_to_half(x[0]) | (unsigned)float_to_half(x[1]) << 16;
  }
  static __device__ __forceinline__ unsigned read(const float16* p) { return __ldg(&p->bits); }
  static __device__ __forceinline__ float load(const float16* p) { return half_to_float(p->bits); }
  static __device__ __forceinline__ void store(float16* p, float x) { p->bits = float_to_half(x); }
};

// Gates may come in double precision; they are rounded to float where they are read.
template <> struct Format<double> {
  static constexpr int PER_WORD = 1;
  static __device__ __forceinline__ float get(unsigned word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ unsigned read(const double* p) { return __float_as_uint((float)__ldg(p)); }
};

// Streamed accesses ask the caches to drop the line first: a decode step's states are not read again soon.
template <bool STREAM, class W> __device__ __forceinline__ W load_words(const W* p) {
  if constexpr (STREAM) return __ldcs(p);
  else return *p;
}
template <bool STREAM, class W> __device__ __forceinline__ void store_words(W* p, W w) {
  if constexpr (STREAM) __stcs(p, w);
  else *p = w;
}

// N consecutive values at an address aligned to min(16, N * sizeof(T)) bytes.
template <bool STREAM, class T, int N> __device__ __forceinline__ void load_vector(const T* p, float (&x)[N]) {
  using F = Format<T>;
  constexpr int PER = F::PER_WORD;
  if constexpr (N % (4 * PER) == 0) {
#pragma unroll
    for (int i = 0; i < N / (4 * PER); i++) {
      const uint4 w = load_words<STREAM>((const uint4*)p + i);
#pragma unroll
      for (int e = 0; e < PER; e++) {
        x[(4 * i + 0) * PER + e] = F::get(w.x, e);
        x[(4 * i + 1) * PER + e] = F::get(w.y, e);
        x[(4 * i + 2) * PER + e] = F::get(w.z, e);
        x[(4 * i + 3) * PER + e] = F::get(w.w, e);
      }
    }
  } else if constexpr (N == 2 * PER) {
    const uint2 w = load_words<STREAM>((const uint2*)p);
#pragma unroll
    for (int e = 0; e < PER; e++) x[e] = F::get(w.x, e), x[PER + e] = F::get(w.y, e);
  } else if constexpr (N == PER) {
    const unsigned w = load_words<STREAM>((const unsigned*)p);
#pragma unroll
    for (int e = 0; e < PER; e++) x[e] = F::get(w, e);
  } else {
    static_assert(N == 1, "vectors are whole words, or one value");
    x[0] = F::load(p);
  }
}

template <bool STREAM, class T, int N> __device__ __forceinline__ void store_vector(T* p, const float (&x)[N]) {
  using F = Format<T>;
  constexpr int PER = F::PER_WORD;
  if constexpr (N % (4 * PER) == 0) {
#pragma unroll
    for (int i = 0; i < N / (4 * PER); i++) {
      const float* at = x + 4 * i * PER;
      const uint4 w = {F::put(at), F::put(at + PER), F::put(at + 2 * PER), F::put(at + 3 * PER)};
      store_words<STREAM>((uint4*)p + i, w);
    }
  } else if constexpr (N == 2 * PER) {
    const uint2 w = {F::put(x), F::put(x + PER)};
    store_words<STREAM>((uint2*)p, w);
  } else if constexpr (N == PER) {
    store_words<STREAM>((unsigned*)p, F::put(x));
  } else {
    static_assert(N == 1, "vectors are whole words, or one value");
    F::store(p, x[0]);
  }
}

__device__ __forceinline__ bool aligned(const void* p, long long stride_bytes, int bytes) {
  return (((unsigned long long)p | (unsigned long long)stride_bytes) & (unsigned long long)(bytes - 1)) == 0;
}
