// The kernel's one argument, passed by value: where the tensors are and how they are strided.
// All strides count elements and all sizes are 64 bits wide. backends/cupy/arguments.py packs the same layout.
#pragma once

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

// Dtypes, presence, flags and HV / H are also known when the kernel is compiled, and used in that form: a test at run
// time costs a decode step more than it looks, for every branch not taken is code to fetch or to jump over.
template <class I, Access A = AT_ONCE> __device__ __forceinline__ int64 index_at(const Indices& x, int64 i) {
  return read<A>((const I*)x.data + i);
}
