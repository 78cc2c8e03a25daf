// The kernel's one argument, passed by value: where the tensors are and how they are strided.
// All strides count elements and all sizes are 64 bits wide. backends/cupy/arguments.py packs the same layout.
#pragma once

struct Addresses {  // null for what the call has not; side by side, so that a repeated call writes them as one block
  const void *q, *k, *v, *a, *b;
  void* out;
  const void *A_log, *dt_bias;
  void *pool, *steps;
  const void *cu_seqlens, *read, *write, *rows, *parents;  // contiguous int32 or int64
};

struct Tokens {  // strides of [B, T, heads, dim], or of [B, T, heads] with element = 0
  int64 batch, time, head, element;
};

struct States {  // strides of pool [slots, HV, K, V] (step = 0) or buffer [rows, steps, HV, K, V]
  int64 slot, step, head, key, value;
};

struct Vector {  // strides of A_log [HV] (element = 0) or dt_bias [HV] / [HV, K]
  int64 head, element;
};

struct Arguments {
  Addresses data;
  Tokens q, k, v, a, b, out;
  Vector A_log, dt_bias;
  States pool, steps;
  int64 parent_stride;  // steps per row of parents
  int64 n, length;      // sequences; tokens per batch row
  float scale, softplus_beta, softplus_threshold, lower_bound, beta_factor, softplus_unit;  // unit: 1 / softplus_beta
};

// Dtypes, presence, flags and HV / H are known when the kernel is compiled, and not passed: a test at run time costs a
// decode step more than it looks, for every branch not taken is code to fetch or to jump over.
template <class I, Access A = AT_ONCE> __device__ __forceinline__ int64 index_at(const void* indices, int64 i) {
  return read<A>((const I*)indices + i);
}
