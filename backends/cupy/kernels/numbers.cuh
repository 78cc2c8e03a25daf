// Number formats of tensors, and moving them between memory and float registers, 16 bytes at a time.
#pragma once

typedef long long int64;
struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

// What C++ and the CUDA intrinsics cannot say without a toolkit header is one PTX instruction each. A host
// compiler that plays the GPU defines CUDA_ON_CPU and brings the three conversions and the barrier.
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

// Start copying BYTES (4, 8 or 16) to shared memory, zeros unless `live`; wait for what this thread has started.
template <int BYTES> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool live) {
  const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
  const int read = live ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(read), "n"(BYTES)
                 : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Wait until THREADS threads, of whole warps, have come to barrier NAME (1 to 15; 0 is that of __syncthreads), wherever
// in the program each of them does. Orders memory among them.
template <int NAME, int THREADS> __device__ __forceinline__ void meet_by_name() {
  asm volatile("barrier.sync %0, %1;" ::"n"(NAME), "n"(THREADS) : "memory");
}
#else
template <int BYTES> inline void copy_async(void* shared, const void* global, bool live) {
  for (int w = 0; w < BYTES / 4; w++) ((unsigned*)shared)[w] = live ? ((const unsigned*)global)[w] : 0;
}
inline void wait_for_copies() {}
#endif

// Inputs stay as they are while the kernel runs. Those that are asked for at once are loaded where the source says so:
// the compiler would put a load off until a branch has decided that it is needed. States are read and written, and
// streamed ones ask the caches to drop the line first: a decode step's states are not read again soon.
enum Access { INPUT, AT_ONCE, STATE, STREAMED };

template <Access ACCESS, class W> __device__ __forceinline__ W read(const W* p) {
  if constexpr (ACCESS == INPUT) return __ldg(p);
  else if constexpr (ACCESS == AT_ONCE) return *(const volatile W*)p;
  else if constexpr (ACCESS == STREAMED) return __ldcs(p);
  else return *p;
}
template <Access ACCESS, class W> __device__ __forceinline__ void write(W* p, W w) {
  if constexpr (ACCESS == STREAMED) __stcs(p, w);
  else *p = w;
}

// A format packed in 32-bit words: how many values a word holds, and how to take them out and put them in. One value
// alone travels in a word's low bits.
template <class T> struct Format;

template <> struct Format<float> {
  static constexpr int PER_WORD = 1;
  static __device__ __forceinline__ float get(unsigned word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ unsigned put(const float* x) { return __float_as_uint(x[0]); }
  template <Access A> static __device__ __forceinline__ unsigned load(const float* p) {
    return __float_as_uint(read<A>(p));
  }
  template <Access A> static __device__ __forceinline__ void store(float* p, float x) { write<A>(p, x); }
};

template <> struct Format<bfloat16> {
  static constexpr int PER_WORD = 2;
  static __device__ __forceinline__ float get(unsigned word, int i) {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ unsigned put(const float* x) {
    return float_to_bfloat(x[0]) | (unsigned)float_to_bfloat(x[1]) << 16;
  }
  template <Access A> static __device__ __forceinline__ unsigned load(const bfloat16* p) { return read<A>(&p->bits); }
  template <Access A> static __device__ __forceinline__ void store(bfloat16* p, float x) {
    p->bits = float_to_bfloat(x);
  }
};

template <> struct Format<float16> {
  static constexpr int PER_WORD = 2;
  static __device__ __forceinline__ float get(unsigned word, int i) {
    return half_to_float((unsigned short)(i ? word >> 16 : word & 0xffffu));
  }
  static __device__ __forceinline__ unsigned put(const float* x) {
    return float_to_half(x[0]) | (unsigned)float_to_half(x[1]) << 16;
  }
  template <Access A> static __device__ __forceinline__ unsigned load(const float16* p) { return read<A>(&p->bits); }
  template <Access A> static __device__ __forceinline__ void store(float16* p, float x) { p->bits = float_to_half(x); }
};

// Gates may come in double precision; they are rounded to float where they are read.
template <> struct Format<double> {
  static constexpr int PER_WORD = 1;
  static __device__ __forceinline__ float get(unsigned word, int) { return __uint_as_float(word); }
  template <Access A> static __device__ __forceinline__ unsigned load(const double* p) {
    return __float_as_uint((float)read<A>(p));
  }
};

// N consecutive values as the words they come in: asked for now, understood when they are needed. A load and a use in
// turn cost one memory latency each, loads in a row cost one together.
template <class T, int N> struct Raw {
  static constexpr int PER = Format<T>::PER_WORD, WORDS = N < PER ? 1 : N / PER;
  static constexpr int BYTES = N * (int)sizeof(T) < 16 ? N * (int)sizeof(T) : 16;  // of one access
  unsigned word[WORDS];

  // Of values `step` apart, the first `count`; the others are zero. WIDE: step is 1, p is aligned to BYTES, and
  // count is N or more, or 0 or less.
  template <bool WIDE, Access A> __device__ __forceinline__ void load(const T* p, int64 step, int count) {
    clear();
    if constexpr (WIDE && WORDS % 4 == 0) {
#pragma unroll
      for (int w = 0; w < WORDS; w += 4)
        if (count > 0) {
          const uint4 x = read<A>((const uint4*)p + w / 4);
          word[w] = x.x, word[w + 1] = x.y, word[w + 2] = x.z, word[w + 3] = x.w;
        }
    } else if constexpr (WIDE && WORDS == 2) {
      if (count > 0) {
        const uint2 x = read<A>((const uint2*)p);
        word[0] = x.x, word[1] = x.y;
      }
    } else if constexpr (WIDE && N == PER) {
      if (count > 0) word[0] = read<A>((const unsigned*)p);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++)
        if (i < count) word[i / PER] |= Format<T>::template load<A>(p + i * step) << 16 * (i % PER);
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int w = 0; w < WORDS; w++) word[w] = 0;
  }
  __device__ __forceinline__ float get(int i) const { return Format<T>::get(word[i / PER], i % PER); }

  // The reverse, from x.
  template <bool WIDE, Access A>
  static __device__ __forceinline__ void store(T* p, int64 step, int count, const float (&x)[N]) {
    if constexpr (WIDE && WORDS % 4 == 0) {
#pragma unroll
      for (int w = 0; w < WORDS; w += 4)
        if (count > 0) {
          const float* const at = x + w * PER;
          const uint4 words = {Format<T>::put(at), Format<T>::put(at + PER), Format<T>::put(at + 2 * PER),
                               Format<T>::put(at + 3 * PER)};
          write<A>((uint4*)p + w / 4, words);
        }
    } else if constexpr (WIDE && WORDS == 2) {
      if (count > 0) write<A>((uint2*)p, uint2{Format<T>::put(x), Format<T>::put(x + PER)});
    } else if constexpr (WIDE && N == PER) {
      if (count > 0) write<A>((unsigned*)p, Format<T>::put(x));
    } else {
#pragma unroll
      for (int i = 0; i < N; i++)
        if (i < count) Format<T>::template store<A>(p + i * step, x[i]);
    }
  }

  // Bits that are zero where rows from p on, those strides (or-ed) apart, allow WIDE.
  static __device__ __forceinline__ unsigned misaligned(const void* p, int64 strides) {
    return ((unsigned)(unsigned long long)p | (unsigned)strides * (unsigned)sizeof(T)) & (BYTES - 1);
  }
};
