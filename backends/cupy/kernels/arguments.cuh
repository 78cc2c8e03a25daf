// The kernel's one argument, passed by value: where the tensors are and how they are strided.
// All strides count elements and all sizes are 64 bits wide. backends/cupy/arguments.py packs the same layout.
#pragma once

typedef long long int64;

struct Tokens {  // [B, T, heads, dim], or [B, T, heads] with element = 0
  const void* data;
  int64 batch, time, head, element;
};

struct States {  // pool [slots, HV, K, V] (step = 0) or buffer [rows, steps, HV, K, V]
  void* data;
  int64 slot, step, head, key, value;
};

struct Indices {  // contiguous int32 or int64; null when the call has none
  const void* data;
  int64 bytes;  // per index: 4 or 8
};

struct Vector {  // A_log [HV] (element = 0) or dt_bias [HV] / [HV, K], of dtype code `format`
  const void* data;
  int64 head, element, format;
};

struct Arguments {
  Tokens q, k, v, a, b, out;
  Vector A_log, dt_bias;
  States pool, steps;
  Indices cu_seqlens, read, write, rows, parents;
  int64 parent_stride;        // steps per row of parents
  int64 n, length, group;     // sequences; tokens per batch row; value heads per query/key head
  int64 a_format, b_format;   // dtype codes of the gate inputs
  int64 l2norm, bounded;      // flags
  float scale, softplus_beta, softplus_threshold, lower_bound, beta_factor, softplus_unit;  // unit: 1 / softplus_beta
};

// Loads in a row cost one memory latency, a load and a use in turn cost one each. So what an index or scalar of a
// dtype known only now means is worked out where it is needed, and only its bits are asked for at first.
struct Index {
  int low = -1, high = -1;  // -1 where there are no indices
  __device__ __forceinline__ void fetch(const Indices& x, int64 i) {
    if (x.data) load(x, i);
  }
  __device__ __forceinline__ void load(const Indices& x, int64 i) {
    const int* p = (const int*)((const char*)x.data + i * x.bytes);
    low = __ldg(p);
    if (x.bytes == 8) high = __ldg(p + 1);
  }
  __device__ __forceinline__ int64 value(const Indices& x) const {
    return x.bytes == 8 ? (int64)((unsigned long long)(unsigned)high << 32 | (unsigned)low) : (int64)low;
  }
};

__device__ __forceinline__ int64 index_at(const Indices& x, int64 i) {
  Index index;
  index.fetch(x, i);
  return index.value(x);
}

// Scalars whose dtype is a matter of the call and not of the kernel. Codes: 0 float32, 1 bfloat16, 2 float16, 3 float64.
__device__ __forceinline__ unsigned fetch_bits(const void* data, int64 i, int64 format) {
  if (format == 0) return __float_as_uint(__ldg((const float*)data + i));
  if (format == 3) return Format<double>::read((const double*)data + i);
  return __ldg((const unsigned short*)data + i);
}
__device__ __forceinline__ float understand(unsigned bits, int64 format) {
  if (format == 1) return Format<bfloat16>::get(bits, 0);
  if (format == 2) return Format<float16>::get(bits, 0);
  return __uint_as_float(bits);
}
